"""Step 27, comparing: what two checkpoints hold under which names, and which of these are one tensor."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from tiepolicy._contents import DCP, MODEL_PREFIX, Contents, read_pieces
from tiepolicy._digests import Seen, read_digests
from tiepolicy.errors import CheckpointError

FILE_DIFFERS = "file differs"
TIED_DIFFERENTLY = "tied differently"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One name about which two checkpoints disagree."""

    name: str
    #: `only in A`, `only in B`, `differs` (shape or dtype), `tied differently`, `values differ`, or `file differs`.
    kind: str
    #: What each of them has; empty for nothing.
    a: str
    b: str


class Values(StrEnum):
    """What is known about the values of two checkpoints."""

    #: All were read and compared.
    READ = "read"
    #: The digests that were recorded of the files with tensors were compared.
    DIGESTS = "digests"
    #: Only headers were compared.
    UNKNOWN = "not compared"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How two checkpoints differ, and how closely they were looked at."""

    differences: Sequence[Difference]
    values: Values


def diff(a: Contents, b: Contents) -> Comparison:
    """The names of which two checkpoints hold different things, sorted, then the files that hold different tensors.

    Reads no tensor: values are compared by the digests of files, where both sides recorded them of the same files. If
    one is a DCP folder and the other is not, the model of the first, without `model.`, is compared.
    """
    files = _different_files(a, b)
    return Comparison(
        differences=[*_different_names(a, b), *(files or ())],
        values=Values.UNKNOWN if files is None else Values.DIGESTS,
    )


def diff_values(a: Contents, b: Contents, seen: Seen = lambda _: None) -> Comparison:
    """The same, with the values of what has one shape and dtype in both read and compared, a few megabytes at a time.

    Args:
        a: One.
        b: The other.
        seen: Is told of the bytes of `a` that were read.

    Raises:
        CheckpointError: If one of them is a DCP folder, or a file cannot be read.
    """
    for contents in (a, b):
        if contents.form == DCP:
            raise CheckpointError(
                f"{contents.path} is a DCP folder, whose values --values does not read: leave it out to compare the "
                "digests of two such folders, or compare safetensors files that were exported from them"
            )
    names = _different_names(a, b)
    other = {difference.name for difference in names if difference.kind != TIED_DIFFERENTLY}
    same = sorted((_names(a) & _names(b)) - other)
    values = [difference for name in same if (difference := _different_value(name, a, b, seen)) is not None]
    return Comparison(differences=[*names, *values], values=Values.READ)


def _different_files(a: Contents, b: Contents) -> list[Difference] | None:
    """The files with tensors whose recorded digests differ; None where the digests do not tell."""
    files = [{file for stored in contents.tensors.values() for file in stored.files} for contents in (a, b)]
    in_a, in_b = read_digests(a.path), read_digests(b.path)
    if in_a is None or in_b is None or files[0] != files[1] or not files[0] <= in_a.keys() & in_b.keys():
        return None
    if not all(in_each[file].digest for in_each in (in_a, in_b) for file in files[0]):
        return None
    return [
        Difference(name=file, kind=FILE_DIFFERS, a=in_a[file].digest[:12], b=in_b[file].digest[:12])
        for file in sorted(files[0])
        if in_a[file] != in_b[file]
    ]


def _different_value(name: str, a: Contents, b: Contents, seen: Seen) -> Difference | None:
    position = 0
    for first, second in zip(read_pieces(a, name), read_pieces(b, name), strict=True):
        if first != second:
            at = next(index for index, (x, y) in enumerate(zip(first, second, strict=True)) if x != y)
            shown = [f"byte {position + at} is {piece[at]:#04x}" for piece in (first, second)]
            return Difference(name=name, kind="values differ", a=shown[0], b=shown[1])
        position += len(first)
        seen(len(first))
    return None


def _names(contents: Contents) -> set[str]:
    """What is stored, or an alias of it."""
    return {*contents.tensors, *contents.aliases()}


def _different_names(a: Contents, b: Contents) -> list[Difference]:
    model_only = (a.form == DCP) != (b.form == DCP)
    in_a, in_b = _entries(a, model_only=model_only), _entries(b, model_only=model_only)
    differences = []
    for name in sorted(in_a.keys() | in_b.keys()):
        first, second = in_a.get(name), in_b.get(name)
        if first == second:
            continue
        if first is None or second is None:
            kind = "only in B" if first is None else "only in A"
        else:
            kind = "differs" if first[0] != second[0] else TIED_DIFFERENTLY
        differences.append(Difference(name=name, kind=kind, a=_show(first), b=_show(second)))
    return differences


_Entry = tuple[tuple[tuple[int, ...], str], str]


def _entries(contents: Contents, *, model_only: bool) -> dict[str, _Entry]:
    """Shape, dtype and canonical name of every tensor, stored or not."""
    aliases = contents.aliases()
    names = [*contents.tensors, *(name for name in aliases if name not in contents.tensors)]
    entries = {name: (contents.spec(name), aliases.get(name, ("", ""))[0]) for name in names}
    if not model_only or contents.form != DCP:
        return entries
    return {
        name.removeprefix(MODEL_PREFIX): (spec, canonical.removeprefix(MODEL_PREFIX))
        for name, (spec, canonical) in entries.items()
        if name.startswith(MODEL_PREFIX)
    }


def _show(entry: _Entry | None) -> str:
    if entry is None:
        return ""
    (shape, dtype), canonical = entry
    return f"{shape} {dtype}{f' = {canonical}' if canonical else ''}"
