"""Step 13, showing: a plan as a table for people, at most 100 columns wide where the names allow it."""

from collections.abc import Mapping, Sequence

from tiepolicy._external import ExternalTie
from tiepolicy._facts import TensorSpec
from tiepolicy._groups import RefusedClaim, TieGroup


def render(
    tensors: Mapping[str, TensorSpec],
    groups: Sequence[TieGroup],
    refused: Sequence[RefusedClaim],
    external: Sequence[ExternalTie] = (),
    *,
    bytes_saved: int,
) -> str:
    """The groups with what each saves, then what other models own, then every refused claim as a sentence."""
    counts = f"{_count(len(tensors), 'tensor')}, {_count(len(groups), 'tied group')}"
    parts = [f"{counts} ({format_bytes(bytes_saved)} saved), {_count(len(refused), 'claim')} refused"]
    if groups:
        rows: list[tuple[str, ...]] = [("stored", "also named", "shape", "dtype", "saved", "because")]
        rows += [row for group in groups for row in _rows(group, tensors)]
        parts.append(_columns(rows))
    if external:
        rows = [("belongs to", "name here", "shape", "dtype", "digest")]
        parts.append(_columns(rows + [_external_row(tie, tensors) for tie in external]))
    if refused:
        parts.append("\n".join(["refused", *(f"  {refusal}" for refusal in refused)]))
    return "\n\n".join(parts)


def format_bytes(count: int) -> str:
    """A count of bytes with three significant digits in decimal units: `525 MB`."""
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


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
