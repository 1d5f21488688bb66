"""Step 11, showing: a plan as a table for people, at most 100 columns wide where the names allow it."""

import itertools
import textwrap
from collections.abc import Mapping, Sequence

from tiepolicy._external import ExternalTie
from tiepolicy._facts import TensorSpec
from tiepolicy._groups import Companion, RefusedClaim, TieGroup

#: Characters below which a column is not made narrower.
_MIN_COLUMN = 8


def render(
    tensors: Mapping[str, TensorSpec],
    groups: Sequence[TieGroup],
    refused: Sequence[RefusedClaim],
    external: Sequence[ExternalTie] = (),
    companions: Sequence[Companion] = (),
    *,
    bytes_saved: int,
) -> str:
    """The groups with what each saves, what other models own, companions, and every refused claim as a sentence."""
    parts = [summary(len(tensors), len(groups), len(refused), bytes_saved=bytes_saved)]
    if groups:
        rows: list[tuple[str, ...]] = [("stored", "also named", "shape", "dtype", "saved", "because")]
        rows += [row for group in groups for row in _rows(group, tensors)]
        parts.append(columns(rows))
    if external:
        rows = [("belongs to", "name here", "shape", "dtype", "digest")]
        parts.append(columns(rows + [_external_row(tie, tensors) for tie in external]))
    if companions:
        parts.append("\n".join(["companions", *(f"  {companion}" for companion in companions)]))
    if refused:
        parts.append("\n".join(["refused", *(f"  {refusal}" for refusal in refused)]))
    return "\n\n".join(parts)


def summary(num_tensors: int, num_groups: int, num_refused: int, *, bytes_saved: int) -> str:
    """The first line of a plan: `2 tensors, 1 tied group (48 B saved), 0 claims refused`."""
    counts = f"{count(num_tensors, 'tensor')}, {count(num_groups, 'tied group')}"
    return f"{counts} ({format_bytes(bytes_saved)} saved), {count(num_refused, 'claim')} refused"


def format_bytes(count: int) -> str:
    """A `count` of bytes with three significant digits in decimal units: `525 MB`."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _rows(group: TieGroup, tensors: Mapping[str, TensorSpec]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for position, alias in enumerate(group.aliases):
        spec = tensors[alias.name]
        rows.append(
            (
                group.canonical if position == 0 else "",
                alias.name,
                str(spec.shape),
                str(spec.dtype).removeprefix("torch."),
                format_bytes(spec.nbytes),
                alias.reason.value,
            )
        )
    return rows


def _external_row(tie: ExternalTie, tensors: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    spec = tensors[tie.name]
    dtype = str(spec.dtype).removeprefix("torch.")
    return tie.source, tie.name, str(spec.shape), dtype, tie.digest[:12] if tie.digest else "none, so stored"


def columns(rows: Sequence[tuple[str, ...]], *, width: int | None = None) -> str:
    """Lines of aligned cells; to fit a width, cells of the widest columns go on in further lines, set in."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    while width is not None and sum(widths) + 2 * (len(widths) - 1) > width and max(widths) > _MIN_COLUMN:
        widths[widths.index(max(widths))] -= 1
    return "\n".join(
        "  ".join(part.ljust(size) for part, size in zip(line, widths, strict=True)).rstrip()
        for row in rows
        for line in itertools.zip_longest(*map(_folded, row, widths), fillvalue="")
    )


def _folded(cell: str, width: int) -> list[str]:
    return [cell] if len(cell) <= width else textwrap.wrap(cell, width, subsequent_indent="  ", break_on_hyphens=False)


def printable(text: str) -> str:
    """A text in ASCII without control characters: names come from files, and go to terminals and pictures."""
    escaped = text.encode("ascii", "backslashreplace").decode()
    return "".join(character if " " <= character <= "~" else f"\\x{ord(character):02x}" for character in escaped)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
