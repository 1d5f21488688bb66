"""Step 27: what a run measures: sums that become means once, at the end; where they are written, and shown."""

import importlib
import io
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor

from eagle3.config import RunConfig
from eagle3.errors import ConfigError
from eagle3.files import append, write_in_run
from eagle3.loss import StepCounts
from eagle3.parallel import Ranks

logger = logging.getLogger("eagle3")

#: One JSON object per logged step, in the folder of the run.
METRICS = "metrics.jsonl"
#: One JSON object per look at the validation data.
VALIDATION = "validation.jsonl"
TENSORBOARD = "tensorboard"

# Their classes are made when they are imported, which no type checker sees.
_EVENTS: Any = event_pb2
_SUMMARIES: Any = summary_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """The means over a number of batches of all processes.

    Attributes:
        loss: The sum of weighted losses over the sum of weights; 0 where nothing carries loss.
        accuracy: For each step of the unroll, the share of supervised pairs in which draft and target agree.
        accepted: For each depth, the share of rows supervised up to it in which they agree at it and before.
        accept_length: How many tokens of a greedy chain the target would accept, simulated: the sum of `accepted`.
    """

    loss: float
    accuracy: list[float]
    accepted: list[float]
    accept_length: float


class Sums:
    """Sums over batches, on the device; nothing is divided, and nothing waits for the device, until it is read.

    Args:
        num_steps: Of the unroll.
        ranks: The processes whose sums belong together.
    """

    def __init__(self, num_steps: int, ranks: Ranks) -> None:
        self.ranks = ranks
        self.loss_and_weight = torch.zeros(2, dtype=torch.float64, device=ranks.device)
        self.counts = torch.zeros(4, num_steps, dtype=torch.int64, device=ranks.device)
        self.num_tokens = 0
        self.started = time.perf_counter()

    def add(self, loss_and_weight: Tensor, counts: StepCounts, num_tokens: int) -> None:
        """Adds what a batch gave: its sums of loss and weight, its counts, and how many tokens it has."""
        self.loss_and_weight += loss_and_weight
        self.counts += counts.as_tensor()
        self.num_tokens += num_tokens

    def measure(self, *, loss_is_global: bool) -> Measurement:
        """Adds up all processes and divides. Called by all of them.

        Args:
            loss_is_global: Whether each process added the sums of loss and weight of all processes already.
        """
        if not loss_is_global:
            self.ranks.sum_(self.loss_and_weight)
        self.ranks.sum_(self.counts)
        loss, weight = self.loss_and_weight.tolist()
        counts = StepCounts.from_tensor(self.counts)
        return Measurement(
            loss=loss / weight if weight else 0.0,
            accuracy=counts.accuracy(),
            accepted=counts.accepted(),
            accept_length=counts.accept_length(),
        )

    def tokens_per_second(self) -> float:
        """How fast all processes together took in tokens since these sums were made."""
        return self.num_tokens * self.ranks.world_size / max(1e-9, time.perf_counter() - self.started)


class _EventFile:
    """Numbers for TensorBoard, each event whole or not there at all.

    Its own writer is a thread that a full disk ends for good, with a traceback.

    Args:
        folder: Of the run.
        purge_step: The first step whose numbers in older files of the folder count no more.
    """

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        self.path = folder / TENSORBOARD / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        started = _EVENTS.SessionLog(status=_EVENTS.SessionLog.START)
        self._add(_EVENTS.Event(file_version="brain.Event:2"), _EVENTS.Event(step=purge_step, session_log=started))

    def write(self, values: dict[str, float], step: int) -> None:
        """Adds what was measured at a step, by name."""
        entries = [_SUMMARIES.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(_EVENTS.Event(step=step, summary=_SUMMARIES.Summary(value=entries)))

    def _add(self, *events: Any) -> None:
        records = io.BytesIO()
        for event in events:
            event.wall_time = time.time()
            RecordWriter(records).write(event.SerializeToString())
        append(self.path, records.getvalue())


class MetricsLog:
    """Writes measurements of the first process to its files, and to the trackers that the config names.

    What cannot be written, as on a full disk, is a warning: no run ends for a line of numbers.

    Args:
        config: Of the run.
        ranks: Only the first writes.

    Raises:
        ConfigError: If a tracker is asked for that is not installed.
    """

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config = config
        self.out = Path(config.out)
        self.is_writer = ranks.is_first
        self._wandb = _import_wandb() if config.log.wandb is not None and self.is_writer else None
        self._wandb_run: Any = None
        self._tensorboard: _EventFile | None = None

    def open(self, *, step: int) -> None:
        """Begins after so many steps: what was written of later ones, which are taken again, is dropped."""
        if not self.is_writer:
            return
        for name in (METRICS, VALIDATION):
            _forget_after(self.out / name, step)
        if self.config.log.tensorboard:
            with self._surviving("TensorBoard's numbers"):
                self._tensorboard = _EventFile(self.out, purge_step=step + 1)
        if self._wandb is not None:
            # One run of wandb for one folder, also when it is resumed.
            identity = self.out.absolute().as_posix().strip("/").replace("/", "-")[-64:]
            self._wandb_run = self._wandb.init(
                project=self.config.log.wandb,
                id=identity,
                resume="allow",
                dir=str(self.out),
                config=asdict(self.config),
            )

    def log_training(self, measurement: Measurement, *, step: int, epoch: int, **numbers: float) -> None:
        """Writes one line of training, with further numbers such as the learning rate."""
        self._write(METRICS, "train", measurement, step=step, epoch=epoch, numbers=numbers)

    def log_validation(self, measurement: Measurement, *, step: int, epoch: int) -> None:
        """Writes one look at the validation data."""
        self._write(VALIDATION, "validation", measurement, step=step, epoch=epoch, numbers={})

    def close(self) -> None:
        """Ends what `open` began."""
        if self._wandb_run is not None:
            self._wandb_run.finish()

    def _write(
        self, file_name: str, part: str, measurement: Measurement, *, step: int, epoch: int, numbers: dict[str, float]
    ) -> None:
        if not self.is_writer:
            return
        entry = {"step": step, "epoch": epoch, **asdict(measurement), **numbers}
        flat = _flatten(part, asdict(measurement) | numbers)
        with self._surviving(f"The numbers of step {step}"):
            append(self.out / file_name, f"{json.dumps(entry)}\n".encode())
            if self._tensorboard is not None:
                self._tensorboard.write(flat, step)
        if self._wandb_run is not None:
            self._wandb_run.log(flat, step=step)

    @contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logger.warning("%s cannot be written to %s: %s", what, self.out, error.strerror or error)


def _flatten(part: str, values: dict[str, Any]) -> dict[str, float]:
    """One name per number: lists get one per depth."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list):
            flat |= {f"{part}/{name}/{depth}": number for depth, number in enumerate(value, start=1)}
        else:
            flat[f"{part}/{name}"] = value
    return flat


def _forget_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    if kept != lines:
        write_in_run(path, "".join(f"{line}\n" for line in kept))


def _import_wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            "log.wandb is set, but the package wandb is not installed. Install it with `pip install wandb`, or leave "
            "out log.wandb; metrics.jsonl and TensorBoard need nothing."
        ) from error


logger = logging.getLogger("eagle3")


class Display:
    """Shows how training goes: on a terminal as a bar under the log, elsewhere as log lines that a person can grep.

    Args:
        ranks: Only the first shows anything.
        depth: Steps of the unroll.
        console: Where to; standard error if not given.
    """

    def __init__(self, ranks: Ranks, *, depth: int, console: Console | None = None) -> None:
        self.depth = depth
        console = console or Console(file=sys.stderr)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        visible = ranks.is_first and console.is_terminal
        self._bar = Progress(*columns, console=console, transient=True) if visible else None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("training", total=None, numbers="")
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, *, step: int, num_steps: int) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, total=num_steps)

    def show_training(
        self, measurement: Measurement, *, epoch: int, step: int, num_steps: int, lr: float, speed: float
    ) -> None:
        """Shows the means since the last line.

        Args:
            measurement: The means.
            epoch: From 1.
            step: Of the whole run, from 1.
            num_steps: Of the whole run.
            lr: Learning rate of the last step.
            speed: Tokens per second of all processes.
        """
        if self._bar is not None:
            numbers = (
                f"loss {measurement.loss:.4f}  accept length {measurement.accept_length:.2f} of {self.depth}  "
                f"{speed:,.0f} tokens/s"
            )
            self._bar.update(self._task, description=f"epoch {epoch}", numbers=numbers)
            return
        logger.info(
            "epoch %d step %d/%d: loss %.4f, accuracy %s, accept length %.2f of %d, learning rate %.3g, %.0f tokens/s",
            *(epoch, step, num_steps, measurement.loss, _shares(measurement.accuracy), measurement.accept_length),
            *(self.depth, lr, speed),
        )

    def show_validation(self, measurement: Measurement, *, step: int) -> None:
        """Shows a look at the validation data."""
        logger.info(
            "validation at step %d: loss %.4f, accuracy %s, accept length %.2f of %d",
            *(step, measurement.loss, _shares(measurement.accuracy), measurement.accept_length, self.depth),
        )


def _shares(values: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)
