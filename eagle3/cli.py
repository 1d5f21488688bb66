"""Step 50: the command line."""

import difflib
import itertools
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_origin, get_type_hints

import torch
from transformers.utils import logging as transformers_logging

from eagle3.config import RunConfig
from eagle3.demo import DemoConfig, run_demo
from eagle3.errors import ConfigError, Eagle3Error
from eagle3.estimate import EstimateConfig, print_estimate
from eagle3.evaluate import EvaluateConfig, run_evaluate
from eagle3.export import ExportConfig, run_export
from eagle3.inputs import write_cache, write_vocab
from eagle3.manual import help_parser
from eagle3.options import read_settings
from eagle3.parallel import Ranks, joined
from eagle3.progress import StderrHandler
from eagle3.report import ReportConfig, run_report
from eagle3.trainer import train
from tiepolicy.errors import TiePolicyError

logger = logging.getLogger("eagle3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command: what it is for, the settings it takes, and what it runs, which returns the exit code."""

    help: str
    settings: type
    run: Callable[[Any], int]
    #: The setting that is given without its name, in front of the options; a list takes all that stands there.
    unnamed: str | None = None


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
        return command.run(read_settings(command.settings, _named(command, arguments[1:])))
    except (Eagle3Error, TiePolicyError) as error:
        # Under torchrun, every process meets it.
        with joined() as ranks:
            ranks.report(str(error))
        return 2


def _train(config: RunConfig) -> int:
    return _together(lambda ranks: train(config, ranks))


def _cache(config: RunConfig) -> int:
    return _together(lambda ranks: write_cache(config, ranks))


def _together(work: Callable[[Ranks], None]) -> int:
    """Run something in all processes that torchrun started, and say once what is wrong."""
    with joined() as ranks:
        _log_to_stderr(ranks)
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


def _vocab(config: RunConfig) -> int:
    _log_to_stderr(Ranks(rank=0, world_size=1, device=torch.device("cpu")))
    write_vocab(config)
    return 0


def _estimate(config: EstimateConfig) -> int:
    print_estimate(config)
    return 0


def _demo(config: DemoConfig) -> int:
    run_demo(config)
    return 0


def _evaluate(config: EvaluateConfig) -> int:
    run_evaluate(config)
    return 0


def _export(config: ExportConfig) -> int:
    run_export(config)
    return 0


def _draw(config: ReportConfig) -> int:
    run_report(config)
    return 0


#: In the order in which a run needs them.
COMMANDS = {
    "demo": Command(help="All of it in a few minutes on a CPU.", settings=DemoConfig, run=_demo),
    "estimate": Command(
        help="What a run will take: parameters, memory, steps, disk. Loads nothing.",
        settings=EstimateConfig,
        run=_estimate,
    ),
    "vocab": Command(help="Choose the draft vocabulary and keep it.", settings=RunConfig, run=_vocab),
    "cache": Command(
        help="Write the target's states to disk, to train from. Works under torchrun.", settings=RunConfig, run=_cache
    ),
    "train": Command(help="Train a draft, or go on with a run. Works under torchrun.", settings=RunConfig, run=_train),
    "evaluate": Command(
        help="Decode with the draft of a run and measure what it brings.",
        settings=EvaluateConfig,
        run=_evaluate,
        unnamed="run",
    ),
    "export": Command(
        help="Write the draft of a run for serving engines.",
        settings=ExportConfig,
        run=_export,
        unnamed="run",
    ),
    "report": Command(help="Draw what one or several runs measured.", settings=ReportConfig, run=_draw, unnamed="runs"),
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


def _log_to_stderr(ranks: Ranks) -> None:
    """Show the log lines of the first process."""
    handler = StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if ranks.is_first else logging.ERROR)
    logger.propagate = False
