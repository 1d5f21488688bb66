"""Step 14: how a run ends before its end: a signal asks for it, or whoever started the process is gone."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: What a person, a scheduler or torchrun sends to a run that is to end.
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether this process was asked to stop, and how."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def is_made(self) -> bool:
        """Whether it was."""
        return self.signal is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within the block, the first SIGTERM or SIGINT is noted instead of ending the process; a second one ends it.

    In a thread other than the main one no signal arrives, and nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def note(number: int, _frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in _SIGNALS:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()


@contextmanager
def ends_with_parent(*, seconds: float = 1.0) -> Iterator[None]:
    """Within the block, the process ends soon after the one that started it has.

    A killed torchrun leaves its processes behind, which would wait for each other, or go on and write where the next
    run does. They end at once, also in the middle of a save: a checkpoint appears whole or not at all.

    Args:
        seconds: Between two looks.
    """
    parent, over = os.getppid(), threading.Event()

    def watch() -> None:
        while not over.wait(seconds):
            if os.getppid() != parent:
                # Not through logging: another thread may hold its lock.
                sys.stderr.write("eagle3: the process that started this one is gone; stopping without a save\n")
                sys.stderr.flush()
                os._exit(1)

    thread = threading.Thread(target=watch, name="parent watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
