"""The settings of `eagle3`, from the typed trees that read them."""

import json
from collections.abc import Sequence

from eagle3.cli import COMMANDS
from eagle3.config import RunConfig
from eagle3.options import Setting, described_sections, in_words


def settings() -> str:
    """A table for each section of a run, and one for each command with settings of its own."""
    parts, of_run = [], set()
    for summary, section in described_sections(RunConfig):
        of_run |= {setting.name for setting in section}
        heading = section[0].name.split(".")[0] if summary else "Every run"
        parts.append("\n\n".join(filter(None, [f"## {heading}", summary, table(section)])))
    for name, command in COMMANDS.items():
        ((_, top), *_) = described_sections(command.settings)
        own = top if not issubclass(command.settings, RunConfig) else [s for s in top if s.name not in of_run]
        also = ", beside those above" if issubclass(command.settings, RunConfig) else ""
        if own:
            parts.append(f"## eagle3 {name}\n\nSettings of this command{also}.\n\n{table(own)}")
    return "\n".join(parts)


def table(rows: Sequence[Setting]) -> str:
    """One line for each setting: its name, its type and default in words, and what its docstring says."""
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for row in rows:
        default = "required" if row.is_required else f"`{json.dumps(row.default).strip(chr(34))}`"
        cells = (f"`{row.name}`", in_words(row.kind), default, row.meaning)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"
