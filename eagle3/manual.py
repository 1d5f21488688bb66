"""Step 44: the help of the command line: every setting with its meaning and default, as a parser of plain argparse.

It prints `--help` and completion scripts. Settings are read by `options`, which knows YAML files and nested types.
"""

import argparse
import json
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal, NoReturn, get_args, get_origin

import shtab

from eagle3.errors import ConfigError
from eagle3.options import Setting, alternatives, described_sections, shipped_configs

_EPILOG = "exit codes: 0 fine, 2 wrong input (said in one sentence), 130 interrupted"


class _Parser(argparse.ArgumentParser):
    """Leaves it to the program to say what is wrong."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command.

    Attributes:
        help: What it is for, in a sentence.
        example: What one may type behind its name.
        settings: The dataclass that it reads.
        run: Does it, and returns the exit code if that is not 0.
        unnamed: The setting that is given without its name, in front of the options; a list takes all of these.
    """

    help: str
    example: str
    settings: type
    run: Callable[[Any], int | None]
    unnamed: str | None = None


def help_parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """A parser that knows all commands and settings, to print help, the version and completion scripts.

    Args:
        commands: By name, in the order to show them in.
    """
    parser = _Parser(
        prog="eagle3",
        description="Trains EAGLE-3 drafts of transformers models.",
        epilog=f"eagle3 COMMAND --help lists the settings of a command; {_EPILOG}",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"eagle3 {version('tiepolicy')}", help="show the version"
    )
    shtab.add_argument_to(parser, ["--print-completion"], help="print a completion script for this shell")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in commands.items():
        _add_command(subparsers.add_parser(name, help=command.help, description=command.help, epilog=_EPILOG), command)
    return parser


def _add_command(parser: argparse.ArgumentParser, command: Command) -> None:
    sections = list(described_sections(command.settings))
    usage = [parser.prog]
    for setting in (setting for _, settings in sections for setting in settings if setting.name == command.unnamed):
        takes_all = get_origin(setting.kind) is list
        shown = setting.name.removesuffix("s").upper()
        usage.append(f"{shown} [{shown} ...]" if takes_all else shown)
        nargs = "+" if takes_all else None
        _complete_files(parser.add_argument(setting.name, metavar=shown, nargs=nargs, help=_say(setting)))
    config_help = "YAML file with any of the settings below"
    if len(sections) > 1:
        config_help += f", or one that comes along: {', '.join(shipped_configs())}"
    _complete_files(parser.add_argument("--config", metavar="FILE", help=config_help))
    for summary, settings in sections:
        group = parser.add_argument_group(settings[0].name.split(".")[0], summary) if summary else parser
        for setting in settings:
            if setting.name != command.unnamed:
                _add_setting(group, setting)
    # A group, since a paragraph of its own keeps its line.
    parser.add_argument_group("example", f"{parser.prog} {command.example}")
    parser.usage = f"{' '.join(usage)} [--config FILE] [--SETTING VALUE ...]"


def _add_setting(group: argparse._ActionsContainer, setting: Setting) -> None:
    """A setting with what may stand behind it, in as few letters as make it plain."""
    option, meaning = f"--{setting.name}", _say(setting)
    kind = next(part for part in alternatives(setting.kind) if part is not types.NoneType)
    if kind is bool:
        group.add_argument(option, nargs="?", choices=["true", "false"], help=meaning)
    elif get_origin(kind) is Literal:
        group.add_argument(option, choices=get_args(kind), help=meaning)
    elif kind is str:
        _complete_files(group.add_argument(option, metavar="TEXT", help=meaning))
    else:
        group.add_argument(option, metavar={int: "N", float: "X"}.get(kind, "LIST"), help=meaning)


def _say(setting: Setting) -> str:
    """What a setting means, and what it is if nobody sets it."""
    shown = "required" if setting.is_required else f"default: {json.dumps(setting.default).strip(chr(34))}"
    return f"{setting.meaning} ({shown})".replace("%", "%%")


def _complete_files(action: argparse.Action) -> None:
    action.complete = shtab.FILE  # type: ignore[attr-defined]  # how shtab is told
