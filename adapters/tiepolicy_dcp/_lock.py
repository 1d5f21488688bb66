"""Step 20, a lock: one process writes under a root, and the kernel frees the root when that process is gone."""

import os
import socket
from pathlib import Path

from tiepolicy_dcp._folder import write_text
from tiepolicy_dcp.errors import CheckpointError

try:
    from filelock import FileLock, Timeout
except ImportError as error:
    raise ImportError("tiepolicy_dcp needs filelock: pip install 'tiepolicy[dcp]'") from error

_LOCK = ".lock"
_WRITER = ".writer"


class WriterLock:
    """The right to write under a root, held from `acquire` until `release` or the end of the process, however it ends.

    Stores of one process share it. An orphan of a killed run that goes on writing keeps it.

    Args:
        root: The folder; made by `acquire`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock: FileLock | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._lock is not None

    def acquire(self) -> None:
        """Take the lock, at once or not at all.

        Raises:
            CheckpointError: If another process holds it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / _LOCK, is_singleton=True, thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise CheckpointError(
                f"{self.root} is written by {self._writer()}, and two writers would destroy each other's checkpoints: "
                "end that one first, or choose another folder"
            ) from error
        self._lock = lock
        write_text(self.root / _WRITER, f"process {os.getpid()} on host {socket.gethostname()}\n")

    def release(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _writer(self) -> str:
        try:
            return (self.root / _WRITER).read_text(encoding="utf-8").strip() or "another process"
        except OSError:
            return "another process"
