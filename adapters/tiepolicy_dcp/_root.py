"""Step 15, a root: how many checkpoints it has, how good they are, which are kept and named, and the one writer.

`LATEST` and `BEST` are links to files of one name in `.pointers`, itself a link to a folder. Renaming another link over
`.pointers` moves both.
"""

import math
import os
import secrets
import shutil
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from tiepolicy.errors import CheckpointError
from tiepolicy_dcp._folder import METADATA, RECORD, flush_folder, read_json, temporary, write_text

try:
    from filelock import FileLock, Timeout
except ImportError as error:
    raise ImportError("tiepolicy_dcp needs filelock: pip install 'tiepolicy[dcp]'") from error

#: Whether a large or a small value of a metric is good.
Mode = Literal["max", "min"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a store knows of one of its checkpoints."""

    name: str
    #: 1 for the first one of a root, and one more for each later one.
    number: int
    metrics: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What `checkpoint.json` holds."""
        return {"number": self.number, "metrics": dict(self.metrics)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Which checkpoints are good, and which are kept.

    Attributes:
        keep_last: How many of the newest are kept.
        keep_best: How many of the best are kept. What neither keeps is deleted; with neither, nothing is.
        metric: What "best" is about.
        mode: Whether the largest or the smallest value is best. Of equal ones, the oldest.
    """

    keep_last: int | None
    keep_best: int | None
    metric: str
    mode: Mode

    def __post_init__(self) -> None:
        for option in ("keep_last", "keep_best"):
            value = getattr(self, option)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise CheckpointError(f"{option} is {value!r}, but must be a positive number, or None to keep all")
        if self.mode not in ("max", "min"):
            raise CheckpointError(f"mode is {self.mode!r}, but must be 'max' or 'min'")

    def ranked(self, records: Collection[Record]) -> list[Record]:
        """Those with the metric, the best first."""
        sign = -1 if self.mode == "max" else 1
        measured = [record for record in records if self.metric in record.metrics]
        return sorted(measured, key=lambda record: (sign * record.metrics[self.metric], record.number))

    def doomed(self, records: Collection[Record], *, pointed: Collection[str]) -> list[Record]:
        """Those to delete, the oldest first; never one that a pointer names."""
        if self.keep_last is None and self.keep_best is None:
            return []
        by_age = sorted(records, key=lambda record: record.number)
        newest = by_age[-self.keep_last :] if self.keep_last else []
        kept = {record.name for record in [*newest, *self.ranked(records)[: self.keep_best or 0]]}
        return [record for record in by_age if record.name not in kept and record.name not in pointed]


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a whole checkpoint, by its name and by what lies in it."""
    return not folder.name.startswith(".") and (folder / METADATA).is_file()


def read_records(root: Path, *, known: Mapping[str, Record]) -> dict[str, Record]:
    """The checkpoints under a root that a store wrote, by name.

    Args:
        root: The store's folder.
        known: Records that were read before. No record ever changes, and reading a thousand of them takes its time.

    Raises:
        CheckpointError: If one has a record that cannot be read.
    """
    records = {}
    for folder in root.iterdir() if root.is_dir() else ():
        record = known.get(folder.name) or (_record(folder) if is_checkpoint(folder) else None)
        if record is not None:
            records[folder.name] = record
    return records


def checked_metrics(metrics: Mapping[str, float] | None) -> dict[str, float]:
    """Metrics as plain numbers.

    Raises:
        CheckpointError: If one is no finite number.
    """
    checked = {}
    for name, value in (metrics or {}).items():
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the metric {name} is {value!r}, which is no number; nothing was written") from error
        if not math.isfinite(number):
            raise CheckpointError(f"the metric {name} is {number}, by which nothing can be ranked; nothing was written")
        checked[str(name)] = number
    return checked


def _record(folder: Path) -> Record | None:
    content = read_json(folder / RECORD)
    if content is None:
        return None
    try:
        return Record(name=folder.name, number=int(content["number"]), metrics=checked_metrics(content["metrics"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / RECORD} is damaged: {error!r}. Delete {folder.name} to go on") from error


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
