"""Step 29, commands: `tiepolicy inspect`, `diff`, `verify` and `plugins`."""

import argparse
import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from tiepolicy import _inspect
from tiepolicy._contents import read_contents
from tiepolicy._diff import diff, diff_values
from tiepolicy._inspect import Meter
from tiepolicy._policy import default_policy
from tiepolicy._verify import find_problems, recorded_bytes
from tiepolicy.errors import TiePolicyError

OK = 0
FOUND = 1
USAGE = 2
INTERRUPTED = 130

_Command = Callable[[argparse.Namespace], int]

_PATH_HELP = "a safetensors file, a Hugging Face folder, or a folder of torch.distributed.checkpoint"
_EPILOG = "exit codes: 0 fine, 1 differences or damage, 2 wrong usage, 130 interrupted"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What stands after `tiepolicy` on the command line; taken from the process if not given.

    Returns:
        0 if all is fine, 1 if there are differences or damage, 130 if a person interrupted it. Wrong
        usage leaves with 2 through `SystemExit`.
    """
    try:
        try:
            return _obey(sys.argv[1:] if arguments is None else arguments)
        finally:
            _write_out("")  # what argparse has printed is written here, where an error is met
    except KeyboardInterrupt:
        sys.stderr.write("tiepolicy: interrupted\n")
        return INTERRUPTED


def _obey(arguments: Sequence[str]) -> int:
    options, unknown = command_parser().parse_known_args(arguments)
    if unknown:
        close = difflib.get_close_matches(unknown[0], re.findall(r"--[a-z-]+", options.parser.format_help()), n=1)
        options.parser.error(f"{unknown[0]} is unknown" + "".join(f", did you mean {name}?" for name in close))
    for name in ("path", "a", "b"):
        path = getattr(options, name, None)
        if path is not None and not _exists(path):
            options.parser.error(f"there is no file or folder {_inspect.printable(str(path))}")
    command: _Command = options.command
    try:
        return command(options)
    except TiePolicyError as error:
        if options.json:
            _print(_inspect.to_json(_inspect.error_values(error)))
        else:
            sys.stderr.write(f"tiepolicy: {_inspect.sentence(str(error))}\n")
        return FOUND


def _inspect_command(options: argparse.Namespace) -> int:
    contents = read_contents(options.path)
    if options.svg is not None:
        _write(options.svg, _inspect.draw_contents(contents))
    if options.json:
        _print(_inspect.to_json(_inspect.contents_values(contents)))
    else:
        _print(_inspect.show_contents(contents))
    return OK


def _diff_command(options: argparse.Namespace) -> int:
    a, b = read_contents(options.a), read_contents(options.b)
    if options.values:
        with Meter("compared", total=a.nbytes) as meter:
            comparison = diff_values(a, b, meter)
    else:
        comparison = diff(a, b)
    if options.json:
        _print(_inspect.to_json(_inspect.difference_values(options.a, options.b, comparison)))
    else:
        _print(_inspect.show_differences(options.a, options.b, comparison))
    return FOUND if comparison.differences else OK


def _verify_command(options: argparse.Namespace) -> int:
    # How much is read of the models of others is known when their names are held against them.
    total = None if options.owner else recorded_bytes(options.path)
    with Meter("read", total=total) as meter:
        problems = find_problems(options.path, owners=dict(options.owner), seen=meter)
    if options.json:
        _print(_inspect.to_json(_inspect.problem_values(options.path, problems)))
    else:
        _print(_inspect.show_problems(options.path, problems))
    return FOUND if problems else OK


def _plugins_command(options: argparse.Namespace) -> int:
    plugins = default_policy().plugins()
    _print(_inspect.to_json(_inspect.plugin_values(plugins)) if options.json else _inspect.show_plugins(plugins))
    return OK


def _owner(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not (name and path and _exists(Path(path))):
        raise argparse.ArgumentTypeError(f"{_inspect.printable(text)} is no NAME=PATH of a file or folder")
    return name, Path(path)


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - Path.exists raises where a name is too long


def _write(path: Path, text: str) -> None:
    """Put a whole file in its place, or nothing."""
    partial = Path(f"{path}.{os.getpid()}")
    try:
        if _exists(path) and not path.is_file():  # a device or a pipe is written to, and never replaced
            path.write_text(text, encoding="ascii")
            return
        try:
            partial.write_text(text, encoding="ascii")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise TiePolicyError(
            f"the picture {path} cannot be written: {error.strerror}. Give --svg a file in a folder you may write to"
        ) from error


def _print(text: str) -> None:
    _write_out(f"{text}\n")


def _write_out(text: str) -> None:
    """Write to standard output at once; a reader that has seen enough, such as `head`, is no error."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # Or the interpreter tries it again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            sys.exit(f"tiepolicy: standard output cannot be written: {error.strerror}")


def _add_completion(parser: argparse.ArgumentParser) -> None:
    option, text = "--print-completion", "print a completion script for this shell"
    try:
        # Brought by the extra `completion`; the core does without.
        add = vars(importlib.import_module("shtab"))["add_argument_to"]
    except ImportError:
        parser.add_argument(option, action=_NoCompletion, metavar="SHELL", help=text)
    else:
        add(parser, [option], help=text)


class _Parser(argparse.ArgumentParser):
    """Says in one sentence what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Ends the program."""
        self.exit(USAGE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class _NoCompletion(argparse.Action):
    """Says what a completion script needs."""

    def __call__(self, parser: argparse.ArgumentParser, *_values: object) -> None:
        parser.error(f"{self.option_strings[0]} needs shtab: pip install 'tiepolicy[completion]'")


_AddParser = Callable[..., _Parser]


def command_parser() -> argparse.ArgumentParser:
    """What knows all commands with their options, and prints their help."""
    parser = _Parser(
        prog="tiepolicy",
        description="Look at checkpoints and at which of their names are one tensor. Runs nothing that a checkpoint "
        "holds.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {version('tiepolicy')}", help="show the version"
    )
    _add_completion(parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_inspect(commands.add_parser)
    _add_diff(commands.add_parser)
    _add_verify(commands.add_parser)
    summary = "list the plugins that the default policy has loaded, and where they come from"
    _add(commands.add_parser, "plugins", _plugins_command, summary, example="--json")
    return parser


def _add_inspect(add_parser: _AddParser) -> None:
    summary = "show names, shapes, dtypes, sizes, tied groups and refused claims"
    added = _add(add_parser, "inspect", _inspect_command, summary, example="model.safetensors --svg ties.svg")
    added.add_argument("path", type=Path, metavar="PATH", help=_PATH_HELP)
    added.add_argument(
        "--svg", type=Path, metavar="FILE", help="also draw what is one tensor and what is not, as an SVG picture"
    )


def _add_diff(add_parser: _AddParser) -> None:
    summary = "compare names, shapes, dtypes, ties and recorded digests of two checkpoints"
    added = _add(add_parser, "diff", _diff_command, summary, example="before.safetensors after.safetensors --values")
    added.add_argument("a", type=Path, metavar="A", help=_PATH_HELP)
    added.add_argument("b", type=Path, metavar="B", help="what to compare it with, of any of these kinds")
    added.add_argument(
        "--values", action="store_true", help="read the tensors of safetensors files and compare them byte by byte"
    )


def _add_verify(add_parser: _AddParser) -> None:
    summary = "hold headers, index, manifest and files of a checkpoint against each other"
    added = _add(add_parser, "verify", _verify_command, summary, example="draft --owner target=model.safetensors")
    added.add_argument("path", type=Path, metavar="PATH", help=_PATH_HELP)
    added.add_argument(
        "--owner",
        type=_owner,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a safetensors file or Hugging Face folder of a model that owns tensors of this one; may be repeated",
    )


def _add(add_parser: _AddParser, name: str, command: _Command, summary: str, *, example: str) -> _Parser:
    added = add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=_EPILOG)
    added.add_argument("--json", action="store_true", help="print JSON, for programs")
    added.add_argument_group("example", f"{added.prog} {example}")  # a paragraph of its own keeps its line
    added.set_defaults(command=command, parser=added)
    return added
