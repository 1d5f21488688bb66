"""Step 15: the command line."""

import logging
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace
from transformers.utils import logging as transformers_logging

from eagle3.config import RunConfig
from eagle3.demo import DemoConfig, run_demo
from eagle3.errors import Eagle3Error
from eagle3.parallel import Ranks, joined
from eagle3.trainer import train
from tiepolicy.errors import TiePolicyError

logger = logging.getLogger("eagle3")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; `eagle3 --help` lists them.

    Returns:
        0 if all went well, 2 if something in the input is wrong, which is then printed as one sentence.
    """
    parser, commands = _make_parser()
    parsed = parser.parse_args(arguments)
    command = parsed.subcommand
    # Bars that end within a second, once per process, only hide the lines that matter.
    transformers_logging.disable_progress_bar()
    try:
        settings: Namespace = commands[command].instantiate(parsed[command])
        values = {key: value for key, value in vars(settings).items() if key != "config"}
        if command == "demo":
            run_demo(DemoConfig(**values))
        else:
            with joined() as ranks:
                return _train(RunConfig(**values), ranks)
    except (Eagle3Error, TiePolicyError) as error:
        print(f"eagle3: error: {error}", file=sys.stderr)  # noqa: T201 - what a command line is for
        return 2
    return 0


def _train(config: RunConfig, ranks: Ranks) -> int:
    _log_to_stderr(ranks)
    try:
        train(config, ranks)
    except (Eagle3Error, TiePolicyError) as error:
        # Nearly always all processes meet the same error; the first says it once, the others say who they are.
        prefix = "" if ranks.is_first else f"process {ranks.rank}: "
        print(f"eagle3: error: {prefix}{error}", file=sys.stderr)  # noqa: T201 - what a command line is for
        return 2
    return 0


def _make_parser() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    parser = ArgumentParser(
        prog="eagle3", allow_abbrev=False, description="Trains EAGLE-3 drafts of transformers models."
    )
    commands = parser.add_subcommands(dest="subcommand")
    train_parser = ArgumentParser(
        allow_abbrev=False, description="Train a draft, or go on with a run. Works under torchrun."
    )
    train_parser.add_argument("--config", action="config", help="YAML file with any of the settings below.")
    train_parser.add_class_arguments(RunConfig, as_group=False)
    demo_parser = ArgumentParser(
        allow_abbrev=False, description="Make a small target, train a draft on it, stop, resume; offline."
    )
    demo_parser.add_class_arguments(DemoConfig, as_group=False)
    parsers = {"train": train_parser, "demo": demo_parser}
    commands.add_subcommand("train", train_parser, help="train a draft")
    commands.add_subcommand("demo", demo_parser, help="all of it in a few minutes on a CPU")
    return parser, parsers


def _log_to_stderr(ranks: Ranks) -> None:
    """Show the log lines of the first process."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if ranks.is_first else logging.ERROR)
    logger.propagate = False
