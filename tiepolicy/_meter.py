"""Step 31, waiting: how much was read so far, for a person who looks on, once it takes more than a second."""

import os
import sys
import time
from types import TracebackType
from typing import Self

from tiepolicy._table import format_bytes

_PATIENCE_SECONDS, _PAUSE_SECONDS = 1.0, 0.2


class Meter:
    """Counts bytes and shows them on standard error, if that is a terminal; takes its line away at the end.

    Args:
        label: What is being done.
        total: How many bytes there will be; None if nobody knows.
    """

    def __init__(self, label: str, *, total: int | None = None) -> None:
        self._label, self._total = label, total
        self._count = self._length = 0
        self._next = time.monotonic() + _PATIENCE_SECONDS
        self._shows = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if self._length:
            self._write("")

    def __call__(self, nbytes: int) -> None:
        """Count bytes that were read."""
        self._count += nbytes
        if self._shows and time.monotonic() >= self._next:
            total = "" if self._total is None else f" of {format_bytes(self._total)}"
            self._write(f"{self._label}: {format_bytes(self._count)}{total}")
            self._next = time.monotonic() + _PAUSE_SECONDS

    def _write(self, text: str) -> None:
        sys.stderr.write(f"\r{text.ljust(self._length)}" + ("" if text else "\r"))
        sys.stderr.flush()
        self._length = len(text)
