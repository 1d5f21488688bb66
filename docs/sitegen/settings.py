"""The settings of `eagle3`, from the typed trees that read them."""

import dataclasses
import json
from typing import Any, get_type_hints

from docstring_parser import parse

from eagle3.cli import COMMANDS
from eagle3.config import RunConfig
from eagle3.options import in_words


def settings() -> str:
    """A table for each section of a run, and one for each command with settings of its own."""
    hints = get_type_hints(RunConfig)
    top = [field for field in dataclasses.fields(RunConfig) if not dataclasses.is_dataclass(hints[field.name])]
    parts = [f"## Every run\n\n{table(RunConfig, top)}"]
    for field in dataclasses.fields(RunConfig):
        section = hints[field.name]
        if dataclasses.is_dataclass(section):
            parts.append(_section(f"## {field.name}", section, f"{field.name}."))
    shared = {field.name for field in dataclasses.fields(RunConfig)}
    for name, command in COMMANDS.items():
        own = [field for field in dataclasses.fields(command.settings) if field.name not in shared]
        if command.settings is not RunConfig and own:
            own = own if issubclass(command.settings, RunConfig) else list(dataclasses.fields(command.settings))
            also = " beside those above" if issubclass(command.settings, RunConfig) else ""
            parts.append(f"## eagle3 {name}\n\nSettings of this command{also}.\n\n{table(command.settings, own)}")
    return "\n".join(parts)


def table(kind: type, fields: list["dataclasses.Field[Any]"], prefix: str = "") -> str:
    """One line for each setting: its name, its type and default in words, and what its docstring says."""
    hints = get_type_hints(kind)
    meaning = {parameter.arg_name: parameter.description or "" for parameter in parse(kind.__doc__ or "").params}
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for field in fields:
        cells = (
            f"`{prefix}{field.name}`",
            in_words(hints[field.name]),
            _default(field),
            " ".join(meaning[field.name].split()),
        )
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _section(heading: str, kind: Any, prefix: str) -> str:
    summary = parse(kind.__doc__ or "").short_description
    return f"{heading}\n\n{summary}\n\n{table(kind, list(dataclasses.fields(kind)), prefix)}"


def _default(field: "dataclasses.Field[Any]") -> str:
    """As it is written in YAML."""
    if field.default is not dataclasses.MISSING:
        return f"`{json.dumps(field.default).strip(chr(34))}`"
    if field.default_factory is not dataclasses.MISSING:
        return f"`{json.dumps(field.default_factory())}`"
    return "required"
