"""Step 11, retention: how many checkpoints there were before one, how good it is, and which of them are kept."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tiepolicy_dcp._folder import METADATA, read_json
from tiepolicy_dcp.errors import CheckpointError

#: File of a checkpoint that a store wrote: its number, counted from 1, and its metrics.
RECORD = "checkpoint.json"

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
