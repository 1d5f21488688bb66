"""Step 45: the command line.

What a command needs is imported when it runs: torch and transformers take seconds, for which nobody should wait who
asks for help, or has mistyped a setting.
"""

import difflib
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

try:
    from eagle3.commands import DemoConfig, EstimateConfig, EvaluateConfig, ExportConfig, ReportConfig
    from eagle3.config import RunConfig
    from eagle3.errors import ConfigError, Eagle3Error
    from eagle3.manual import Command, help_parser
    from eagle3.options import read_settings
    from eagle3.terminal import StderrHandler, say, waiting
except ModuleNotFoundError as error:
    sys.exit(f"eagle3: error: {error.name} is missing: pip install 'tiepolicy[eagle3]'")

if TYPE_CHECKING:
    from eagle3.parallel import Ranks

logger = logging.getLogger("eagle3")


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


def _log_to_stderr(level: int) -> None:
    handler = StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False
