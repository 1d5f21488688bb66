"""What a person sees: printed text, bars for what takes a while, log lines. It stands beside the order of the data."""

import logging
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeVar

from rich.console import Console
from rich.progress import track
from rich.table import Table

from eagle3.errors import Eagle3Error

Item = TypeVar("Item")


def say(text: str) -> None:
    """Print text on standard output, at once.

    Raises:
        Eagle3Error: It cannot be written. A reader that has seen enough, such as `head`, is no error.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # Or the interpreter tries it again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise Eagle3Error(f"Standard output cannot be written: {error.strerror}. Free some space.") from error


def show(table: Table) -> None:
    """Print a table as wide as the terminal, or 100 columns where there is none.

    Raises:
        Eagle3Error: As for `say`.
    """
    console = Console(width=shutil.get_terminal_size((100, 24)).columns)
    with console.capture() as printed:
        console.print(table)
    say(printed.get())


def watched(items: Iterable[Item], description: str, *, total: int) -> Iterator[Item]:
    """The items, with a bar on standard error as they are taken, if a person looks on."""
    yield from track(
        items,
        description,
        total=total,
        console=Console(stderr=True),
        transient=True,
        disable=not _is_seen(),
        refresh_per_second=2,
    )


@contextmanager
def waiting(description: str) -> Iterator[None]:
    """Within the block, a line on standard error says what takes so long, if a person looks on."""
    if not _is_seen():
        yield
        return
    with Console(stderr=True).status(f"{description} ..."):
        yield


def _is_seen() -> bool:
    """Of the processes that torchrun starts on one terminal, the first has it."""
    console = Console(stderr=True)
    return console.is_terminal and not console.is_dumb_terminal and os.environ.get("RANK", "0") == "0"


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes log lines to what is standard error at the time: above a bar, where there is one, and not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one line."""
        self.stream = sys.stderr  # not setStream, which flushes the old one, and that may be closed
        super().emit(record)
