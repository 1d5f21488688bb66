"""Step 28, reporting: what the commands found, as text and as JSON, with every name in full, and how far they are."""

import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tiepolicy._contents import Contents
from tiepolicy._diff import FILE_DIFFERS, Comparison, Values
from tiepolicy._digests import read_digests
from tiepolicy._display import Link, LinkKind, columns, count, draw, format_bytes, refusal_link, summary
from tiepolicy._display import printable as printable
from tiepolicy._external import ExternalTie
from tiepolicy._groups import RefusedClaim
from tiepolicy._plugins import Plugin
from tiepolicy.errors import TiePolicyError

#: Columns that every sentence fits where nothing is said about the terminal, if no single word is longer.
WIDTH = 100
#: Columns below which tables are not made narrower.
_MIN_WIDTH = 60

_NO_MANIFEST = "no manifest: nothing says which names are one tensor"


def show_contents(contents: Contents) -> str:
    """Every name with its shape and place, then the claims that were refused."""
    aliases = contents.aliases()
    rows = [("name", "shape", "dtype", "size", "stored in")]
    external = contents.external()
    for name in sorted({*contents.tensors, *aliases, *external}):
        shape, dtype = contents.spec(name)
        if name in external:
            rows.append((name, str(shape), dtype, "", _owner(external[name])))
        elif name in aliases:
            canonical, reason = aliases[name]
            rows.append((name, str(shape), dtype, "", f"= {canonical} ({reason})"))
        else:
            stored = contents.tensors[name]
            place = stored.files[0] if len(stored.files) == 1 else count(len(stored.files), "file")
            rows.append((name, str(shape), dtype, format_bytes(stored.nbytes), place))
    refused = _refused(contents)
    parts = [_summary(contents), _columns(rows)]
    if refused:
        parts.append("\n".join(["refused", *(sentence(str(refusal), indent="  ") for refusal in refused)]))
    return "\n\n".join(parts)


def _owner(tie: ExternalTie) -> str:
    return f"= {tie.source} ({tie.digest[:12] if tie.digest else 'stored here too'})"


def _summary(contents: Contents) -> str:
    lines = [f"{contents.path}: {_counts(contents)}"]
    if contents.plan is not None:
        apart = contents.apart()
        of_apart = sum(contents.plan.tensors[name.removeprefix(contents.prefix)].nbytes for name in apart)
        counts = len(contents.plan.groups), len(contents.plan.owned_elsewhere), len(contents.plan.refused)
        lines.append(
            f"manifest: {summary(*counts, bytes_saved=contents.plan.bytes_saved - of_apart)}"
            + (f", {count(len(apart), 'tied name')} stored apart" if apart else "")
        )
        if contents.plan.external:
            owners = sorted({tie.owner for tie in contents.plan.external})
            number = count(len(contents.plan.external), "tensor")
            lines.append(f"{number} of other models: {', '.join(owners)} (with the SHA-256 of what is not stored)")
    elif contents.recorded:
        lines.append(f"no manifest; {count(len(contents.recorded), 'tie')} noted in the metadata of the file")
    else:
        lines.append(_NO_MANIFEST)
    if contents.objects:
        lines.append(
            f"{count(len(contents.objects), 'pickled object')} beside the tensors, which are never read: to get them "
            "needs more than the safe subset of pickle"
        )
    return "\n".join(map(sentence, lines))


def draw_contents(contents: Contents) -> str:
    """The ties, external ties and refused claims of a checkpoint as an SVG document."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for alias, (canonical, reason) in contents.aliases().items():
        groups.setdefault(canonical, []).append((alias, reason))
    links = [
        Link(kind=LinkKind.TIED, left=(canonical, _what(contents, canonical)), right=aliases)
        for canonical, aliases in sorted(groups.items())
    ]
    links += [
        Link(kind=LinkKind.EXTERNAL, left=(tie.source, ""), right=[(name, _what(contents, name))])
        for name, tie in contents.external().items()
    ]
    links += [refusal_link(refusal, contents.prefix) for refusal in _refused(contents)]
    known = contents.plan is not None or contents.recorded
    return draw(f"{contents.path.name}: {_counts(contents)}", links, [] if known else [_NO_MANIFEST])


def _what(contents: Contents, name: str) -> str:
    shape, dtype = contents.spec(name)
    return f"{shape} {dtype}"


def _counts(contents: Contents) -> str:
    num_stored = len(contents.tensors.keys() - contents.aliases().keys())
    return f"{contents.form}, {count(num_stored, 'tensor')} of {format_bytes(contents.nbytes)}"


def contents_values(contents: Contents) -> dict[str, Any]:
    """The same for programs."""
    groups: dict[str, list[dict[str, str]]] = {}
    for alias, (canonical, reason) in contents.aliases().items():
        groups.setdefault(canonical, []).append({"name": alias, "reason": reason})
    return {
        "path": str(contents.path),
        "form": contents.form,
        "bytes": contents.nbytes,
        "manifest": contents.plan is not None,
        "tensors": {
            name: {
                "shape": list(stored.shape),
                "dtype": stored.dtype,
                "bytes": stored.nbytes,
                "files": list(stored.files),
            }
            for name, stored in contents.tensors.items()
        },
        "groups": [{"canonical": name, "aliases": members} for name, members in sorted(groups.items())],
        "external": [
            {"name": name, "owner": tie.owner, "owner_name": tie.owner_name, "sha256": tie.digest}
            for name, tie in sorted(contents.external().items())
        ],
        "refused": [
            {
                "names": [contents.prefix + name for name in refusal.claim.names],
                "reason": refusal.verdict.reason.value,
                "sentence": str(refusal),
            }
            for refusal in _refused(contents)
        ],
        "objects": list(contents.objects),
    }


_COMPARED = {
    Values.READ: "and the same values",
    Values.DIGESTS: "and the same values, by the digests that were recorded of their files",
    Values.UNKNOWN: "only headers were compared, so their values may differ (--values reads them)",
}


def show_differences(a: Path, b: Path, comparison: Comparison) -> str:
    """One line for each name, or one sentence if there is none."""
    differences = comparison.differences
    if not differences:
        head = f"A {a} and B {b} hold the same names with the same shapes, dtypes and ties"
        return sentence(f"{head}{';' if comparison.values is Values.UNKNOWN else ''} {_COMPARED[comparison.values]}")
    rows = [("name", "difference", "A", "B"), *((d.name, d.kind, d.a, d.b) for d in differences)]
    num_files = sum(difference.kind == FILE_DIFFERS for difference in differences)
    counts = [(len(differences) - num_files, "name"), (num_files, "file")]
    head = sentence(f"A {a} and B {b} differ in {' and '.join(count(*pair) for pair in counts if pair[0])}")
    return f"{head}\n\n{_columns(rows)}"


def difference_values(a: Path, b: Path, comparison: Comparison) -> dict[str, Any]:
    """The same for programs; `same` is null where nothing differs and the values are not known."""
    listed = [asdict(difference) for difference in comparison.differences]
    same = None if not listed and comparison.values is Values.UNKNOWN else not listed
    return {"a": str(a), "b": str(b), "same": same, "values": comparison.values, "differences": listed}


def show_problems(path: Path, problems: Sequence[str]) -> str:
    """One sentence for each problem."""
    if not problems:
        return sentence(f"{path}: nothing wrong{_unread(path)}")
    return "\n".join([sentence(f"{path}: {count(len(problems), 'problem')}"), *_indented(problems)])


def _unread(path: Path) -> str:
    records = (read_digests(path) if path.is_dir() else None) or {}
    return (
        ""
        if records and all(record.digest for record in records.values())
        else ". No digests were recorded, so the values of tensors were not checked"
    )


def problem_values(path: Path, problems: Sequence[str]) -> dict[str, Any]:
    """The same for programs."""
    return {"path": str(path), "ok": not problems, "problems": list(problems)}


def show_plugins(plugins: Iterable[Plugin]) -> str:
    """One line for each hook of each plugin."""
    rows = [("plugin", "module", "hook", "distribution", "version")]
    for plugin in plugins:
        for position, hook in enumerate(plugin.hooks or ("none",)):
            row = (plugin.name, plugin.module, hook, plugin.distribution, plugin.version)
            rows.append(row if position == 0 else ("", "", hook, "", ""))
    return _columns(rows)


def plugin_values(plugins: Iterable[Plugin]) -> dict[str, Any]:
    """The same for programs."""
    return {"plugins": [asdict(plugin) for plugin in plugins]}


def error_values(error: TiePolicyError) -> dict[str, Any]:
    """An error for programs."""
    return {"error": {"type": type(error).__name__, "message": str(error), "names": list(error.names)}}


def to_json(values: dict[str, Any]) -> str:
    """Values as JSON text of ASCII characters."""
    return json.dumps(values, indent=2)


def sentence(text: str, *, indent: str = "") -> str:
    """A sentence in lines that fit; what follows the first is set in further."""
    return textwrap.fill(
        printable(text),
        min(_width(), WIDTH),
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    cells = [tuple(printable(cell) for cell in row) for row in rows]
    return columns(cells, width=_width() if sys.stdout.isatty() else None)


def _width() -> int:
    """Columns of the terminal, or what the variable COLUMNS says."""
    return max(_MIN_WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns)


def _indented(sentences: Iterable[str]) -> list[str]:
    return [sentence(text, indent="  ") for text in sentences]


def _refused(contents: Contents) -> tuple[RefusedClaim, ...]:
    return () if contents.plan is None else contents.plan.refused


_PATIENCE_SECONDS, _PAUSE_SECONDS = 1.0, 0.2


class Meter:
    """Counts bytes and shows them on standard error, if that is a terminal; takes its line away at the end.

    Args:
        label: What is being done.
        total: How many bytes there will be; None if nobody knows.
    """

    def __init__(self, label: str, *, total: int | None = None) -> None:
        self._label, self._total = label, total
        self._count = self._length = 0
        self._next = time.monotonic() + _PATIENCE_SECONDS
        self._shows = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if self._length:
            self._write("")

    def __call__(self, nbytes: int) -> None:
        """Count bytes that were read."""
        self._count += nbytes
        if self._shows and time.monotonic() >= self._next:
            total = "" if self._total is None else f" of {format_bytes(self._total)}"
            self._write(f"{self._label}: {format_bytes(self._count)}{total}")
            self._next = time.monotonic() + _PAUSE_SECONDS

    def _write(self, text: str) -> None:
        sys.stderr.write(f"\r{text.ljust(self._length)}" + ("" if text else "\r"))
        sys.stderr.flush()
        self._length = len(text)
