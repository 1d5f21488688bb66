"""The help of every command, from the parsers that print it."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager

import tiepolicy._cli
from eagle3.cli import COMMANDS, help_parser

COLUMNS = "80"


def commands(program: str) -> str:
    """The help of a program and of each of its commands.

    Args:
        program: `tiepolicy` or `eagle3`.
    """
    parser = {"tiepolicy": tiepolicy._cli.command_parser, "eagle3": lambda: help_parser(COMMANDS)}[program]()  # noqa: SLF001
    with _columns():
        parts = [_block(parser.format_help())]
        for name, own in subparsers(parser).items():
            parts.append(f"## {program} {name}\n\n{_block(own.format_help())}")
    return "\n".join(parts)


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a parser's commands, by name."""
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))  # noqa: SLF001
    return dict(action.choices)


def _block(text: str) -> str:
    return f"```text\n{text}```\n"


@contextmanager
def _columns() -> Iterator[None]:
    """Help as wide as a terminal of old, whatever this one is."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = COLUMNS
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before
