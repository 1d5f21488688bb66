"""Step 21: the command line."""

import difflib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from transformers.utils import logging as transformers_logging

from eagle3.config import RunConfig
from eagle3.demo import DemoConfig, run_demo
from eagle3.errors import ConfigError, Eagle3Error
from eagle3.options import add_settings, read_settings
from eagle3.parallel import Ranks, joined
from eagle3.progress import StderrHandler
from eagle3.trainer import train
from tiepolicy.errors import TiePolicyError

logger = logging.getLogger("eagle3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command: what it is for, the settings it takes, and what it runs, which returns the exit code."""

    help: str
    settings: type
    run: Callable[[Any], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; `eagle3 --help` lists them.

    Returns:
        0 if all went well, 2 if something in the input is wrong, which is then printed as one sentence.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Bars that end within a second, once per process, only hide the lines that matter.
    transformers_logging.disable_progress_bar()
    try:
        command = _choose(arguments)
        return command.run(read_settings(command.settings, arguments[1:]))
    except (Eagle3Error, TiePolicyError) as error:
        return _report(error)


def _train(config: RunConfig) -> int:
    with joined() as ranks:
        _log_to_stderr(ranks)
        try:
            train(config, ranks)
        except (Eagle3Error, TiePolicyError) as error:
            if ranks.speaks(str(error)):
                _report(error, prefix="" if ranks.is_first else f"process {ranks.rank}: ")
            # For torchrun's own report, which otherwise says only that a process failed.
            get_error_handler().record_exception(error)
            return 2
    return 0


def _demo(config: DemoConfig) -> int:
    run_demo(config)
    return 0


#: In the order in which a run needs them.
COMMANDS = {
    "demo": Command(help="All of it in a few minutes on a CPU.", settings=DemoConfig, run=_demo),
    "train": Command(help="Train a draft, or go on with a run. Works under torchrun.", settings=RunConfig, run=_train),
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
        _help_parser().parse_args(arguments)
    return COMMANDS[name]


def _help_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="eagle3", allow_abbrev=False, description="Trains EAGLE-3 drafts of transformers models."
    )
    subcommands = parser.add_subcommands(dest="command")
    for name, command in COMMANDS.items():
        own = ArgumentParser(allow_abbrev=False, description=command.help)
        add_settings(own, command.settings)
        subcommands.add_subcommand(name, own, help=command.help)
    return parser


def _report(error: Exception, *, prefix: str = "") -> int:
    print(f"eagle3: error: {prefix}{error}", file=sys.stderr)  # noqa: T201 - what a command line is for
    return 2


def _log_to_stderr(ranks: Ranks) -> None:
    """Show the log lines of the first process."""
    handler = StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if ranks.is_first else logging.ERROR)
    logger.propagate = False
