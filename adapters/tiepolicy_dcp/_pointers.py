"""Step 16, a root: which checkpoint is the latest and which the best, and one process that writes.

`LATEST` and `BEST` are links to files of one name in `.pointers`, itself a link to a folder. Renaming another link over
`.pointers` moves both.
"""

import os
import secrets
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from tiepolicy_dcp._folder import flush_folder, temporary, write_text
from tiepolicy_dcp.errors import CheckpointError

#: Name that always means the newest whole checkpoint; a file in the root that holds the checkpoint's name.
LATEST: Final = "LATEST"
#: Name that always means the checkpoint with the best metric; a file like `LATEST`.
BEST: Final = "BEST"
POINTERS: Final = (LATEST, BEST)

Pointer = Literal["LATEST", "BEST"]

_FOLDER = ".pointers"
#: How often a reader may lose a race against a writer; a pointer that is not there is looked for as often.
_NUM_TRIES = 10


def read_pointer(root: Path, pointer: Pointer) -> str | None:
    """The name that a pointer holds; None if there is no such pointer.

    Raises:
        CheckpointError: If it is damaged.
    """
    for _ in range(_NUM_TRIES):  # a writer may remove the old target between the steps of following the links
        path = root / pointer
        try:
            if path.exists() and not path.is_file():
                raise CheckpointError(f"{path} is no file, and nothing was read of it. Name the checkpoint instead")
            return path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            continue
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is damaged: {error}. Name the checkpoint instead") from error
    return None


def move_pointers(root: Path, names: Mapping[Pointer, str]) -> None:
    """Make the pointers hold these names; one without a name is gone."""
    target = root / f"{_FOLDER}.{secrets.token_hex(4)}.target"
    target.mkdir()
    for pointer, name in names.items():
        write_text(target / pointer, name + "\n")
    flush_folder(target)
    for pointer in POINTERS:
        if not (root / pointer).exists():  # it leads nowhere yet
            _link(root / pointer, f"{_FOLDER}/{pointer}")
    if (root / _FOLDER).is_dir() and not (root / _FOLDER).is_symlink():  # a copy of the root that followed links
        (root / _FOLDER).rename(temporary(root / _FOLDER, "doomed"))
    _link(root / _FOLDER, target.name)
    for pointer in POINTERS:
        if not (root / pointer).is_symlink():  # a file, for the same reason
            _link(root / pointer, f"{_FOLDER}/{pointer}")
    flush_folder(root)
    for path in root.glob(f"{_FOLDER}.*.target"):
        if path != target:
            shutil.rmtree(path, ignore_errors=True)


def _link(path: Path, target: str) -> None:
    fresh = temporary(path, "unfinished")
    fresh.symlink_to(target)
    os.replace(fresh, path)  # noqa: PTH105 - atomic over an existing file on every system


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
