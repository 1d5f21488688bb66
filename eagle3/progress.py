"""Step 30: how a run shows itself: a bar where a person looks on, plain lines everywhere else."""

import logging
import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from eagle3.metrics import Measurement
from eagle3.parallel import Ranks

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
