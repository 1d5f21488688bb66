"""Step 28, comparing: what two checkpoints hold under which names, and which of these are one tensor."""

from dataclasses import dataclass

from tiepolicy._contents import DCP, MODEL_PREFIX, Contents


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One name about which two checkpoints disagree."""

    name: str
    #: `only in A`, `only in B`, `differs` (shape or dtype) or `tied differently`.
    kind: str
    #: What each of them has; empty for nothing.
    a: str
    b: str


def diff(a: Contents, b: Contents) -> list[Difference]:
    """The names of which two checkpoints hold different things, sorted; their values are not read.

    If one is a DCP folder and the other is not, the model of the first, without `model.`, is compared.
    """
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
            kind = "differs" if first[0] != second[0] else "tied differently"
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
