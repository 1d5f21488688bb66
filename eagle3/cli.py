"""Step 43: the command line.

What a command needs is imported when it runs: torch and transformers take seconds, for which nobody should wait who
asks for help, or has mistyped a setting. Help and completion scripts come from a parser of plain argparse; settings are
read by `options`, which knows YAML files and nested types.
"""

import argparse
import difflib
import itertools
import json
import logging
import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

try:
    import shtab

    from eagle3.commands import DemoConfig, EstimateConfig, EvaluateConfig, ExportConfig, ReportConfig
    from eagle3.config import RunConfig
    from eagle3.errors import ConfigError, Eagle3Error
    from eagle3.options import Setting, alternatives, described_sections, read_settings, shipped_configs
    from eagle3.terminal import StderrHandler, say, waiting
except ModuleNotFoundError as error:
    sys.exit(f"eagle3: error: {error.name} is missing: pip install 'tiepolicy[eagle3]'")

if TYPE_CHECKING:
    from eagle3.parallel import Ranks

logger = logging.getLogger("eagle3")

_EPILOG = "exit codes: 0 fine, 2 wrong input (said in one sentence), 130 interrupted"


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; `eagle3 --help` lists them.

    Returns:
        0 if all went well, 2 if something in the input is wrong, which is then printed as one sentence, and 130 if a
        person interrupted it.
    """
    try:
        try:
            return _obey(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            say("")  # so that what argparse has printed is written here, where an error is met
    except Eagle3Error as error:
        return _fail(error)
    except KeyboardInterrupt:
        sys.stderr.write("eagle3: interrupted\n")
        return 130


def _obey(arguments: list[str]) -> int:
    command = _choose(arguments)
    settings: Any = read_settings(command.settings, _named(command, arguments[1:]))
    with waiting("Loading torch and transformers"):
        from transformers.utils import logging as transformers_logging

        from tiepolicy.errors import TiePolicyError

    # Bars that end within a second, once per process, only hide the lines that matter.
    transformers_logging.disable_progress_bar()
    try:
        return command.run(settings) or 0
    except TiePolicyError as error:
        return _fail(error)


def _fail(error: Exception) -> int:
    if "RANK" in os.environ:
        from eagle3.parallel import joined

        # Every process meets it.
        with joined() as ranks:
            ranks.report(str(error))
    else:
        sys.stderr.write(f"eagle3: error: {error}\n")
    return 2


def _train(config: RunConfig) -> int:
    from eagle3.trainer import train

    return _together(lambda ranks: train(config, ranks))


def _cache(config: RunConfig) -> int:
    from eagle3.inputs import write_cache

    return _together(lambda ranks: write_cache(config, ranks))


def _together(work: Callable[["Ranks"], None]) -> int:
    """Run something in all processes that torchrun started, and say once what is wrong."""
    from eagle3.parallel import joined
    from tiepolicy.errors import TiePolicyError

    with joined() as ranks:
        _log_to_stderr(logging.INFO if ranks.is_first else logging.ERROR)
        try:
            work(ranks)
        except (Eagle3Error, TiePolicyError) as error:
            ranks.report(str(error))
            return 2
    return 0


def _named(command: Command, arguments: Sequence[str]) -> list[str]:
    """The arguments, with `--NAME` before what was given without it."""
    values = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    if command.unnamed is None or not values:
        return list(arguments)
    takes_all = get_origin(get_type_hints(command.settings)[command.unnamed]) is list
    value = json.dumps(values) if takes_all else values[0]
    return [f"--{command.unnamed}={value}", *arguments[len(values) if takes_all else 1 :]]


def _vocab(config: RunConfig) -> None:
    from eagle3.inputs import write_vocab

    _log_to_stderr(logging.INFO)
    write_vocab(config)


def _estimate(config: EstimateConfig) -> None:
    from eagle3.estimate import print_estimate

    print_estimate(config)


def _demo(config: DemoConfig) -> None:
    from eagle3.demo import run_demo

    run_demo(config)


def _evaluate(config: EvaluateConfig) -> None:
    from eagle3.evaluate import run_evaluate

    run_evaluate(config)


def _export(config: ExportConfig) -> None:
    from eagle3.export import run_export

    run_export(config)


def _draw(config: ReportConfig) -> None:
    from eagle3.report import run_report

    run_report(config)


#: In the order in which a run needs them.
COMMANDS = {
    "demo": Command(
        help="Make a small target, train a draft on it, measure and export it: minutes on a CPU.",
        example="--out demo",
        settings=DemoConfig,
        run=_demo,
    ),
    "estimate": Command(
        help="Say what a run will take: parameters, memory, steps, time, disk. Loads nothing.",
        example="--config qwen3-8b.yaml --processes 8",
        settings=EstimateConfig,
        run=_estimate,
    ),
    "vocab": Command(
        help="Choose the draft vocabulary and keep it.",
        example="--config qwen3-8b.yaml --data.train chats.jsonl --out run",
        settings=RunConfig,
        run=_vocab,
    ),
    "cache": Command(
        help="Write the target's states to disk, to train from. Works under torchrun.",
        example="--config qwen3-8b.yaml --target.cache states",
        settings=RunConfig,
        run=_cache,
    ),
    "train": Command(
        help="Train a draft, or go on with a run. Works under torchrun.",
        example="--config qwen3-8b.yaml --data.train chats.jsonl --out run",
        settings=RunConfig,
        run=_train,
    ),
    "evaluate": Command(
        help="Write answers with the draft of a run, and measure what it gains.",
        example="run --num_prompts 64",
        settings=EvaluateConfig,
        run=_evaluate,
        unnamed="run",
    ),
    "export": Command(
        help="Write the draft of a run for serving engines.",
        example="run --out draft",
        settings=ExportConfig,
        run=_export,
        unnamed="run",
    ),
    "report": Command(
        help="Draw what one or several runs measured.",
        example="run another-run --out report",
        settings=ReportConfig,
        run=_draw,
        unnamed="runs",
    ),
}


def _choose(arguments: Sequence[str]) -> Command:
    """The command that is asked for. `--help` and nonsense end the program, as they do elsewhere.

    Raises:
        ConfigError: There is none of that name.
    """
    name = arguments[0] if arguments else ""
    if name and not name.startswith("-") and name not in COMMANDS:
        (close,) = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)
        raise ConfigError(f"{name} is not a command; did you mean {close}? There are {', '.join(COMMANDS)}.")
    if name not in COMMANDS or {"-h", "--help"} & set(arguments):
        help_parser(COMMANDS).parse_args(arguments)
    return COMMANDS[name]


class _Parser(argparse.ArgumentParser):
    """Leaves it to the program to say what is wrong."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


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


def _log_to_stderr(level: int) -> None:
    handler = StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False
