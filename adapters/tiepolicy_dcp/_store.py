"""Step 18, a store: the checkpoints of one run in one folder, and which of them is the latest."""

import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

from torch import nn
from torch.optim import Optimizer

from tiepolicy import Owners, TiePlan
from tiepolicy.errors import CheckpointError, LostRankError, TiePolicyError
from tiepolicy.files import Verify
from tiepolicy_dcp._async import AsyncSaver, PendingSave, Worker
from tiepolicy_dcp._folder import remove_leftovers, withdraw
from tiepolicy_dcp._load import Restored, load
from tiepolicy_dcp._ranks import on_first_rank
from tiepolicy_dcp._root import (
    BEST,
    LATEST,
    POINTERS,
    Mode,
    Pointer,
    Record,
    Retention,
    WriterLock,
    checked_metrics,
    is_checkpoint,
    move_pointers,
    read_pointer,
    read_records,
)
from tiepolicy_dcp._save import Contents, Given, begin, collect, complete

logger = logging.getLogger("tiepolicy_dcp")

#: How often a reader begins again because a writer published and deleted within the time of one load.
_NUM_TRIES = 100


class CheckpointStore:
    """Checkpoints by name under one root, for one writer and any number of readers.

    The first save takes the root for this process until `close`, the end of the `with` block, or the end of the
    process; another process that saves there is refused. Reading takes nothing. All ranks call the methods together.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> with CheckpointStore("run", keep_last=1, keep_best=1) as store:
        ...     for step, length in [(1, 2.5), (2, 2.1), (3, 2.3)]:
        ...         _ = store.save(f"step_{step}", model=model, metrics={"accept_length": length})
        ...     store.names()
        ['step_1', 'step_3']

    Args:
        root: Folder of the run's checkpoints; made by the first save.
        keep_last: How many of the newest checkpoints to keep.
        keep_best: How many of the best checkpoints to keep. What neither keeps is deleted once the new one is
            published; with neither, nothing is deleted. What `LATEST` or `BEST` names is never deleted, nor is what no
            store wrote.
        metric: The metric by which a checkpoint is best.
        mode: Whether its largest ("max") or its smallest ("min") value is best. Of equal ones, the oldest is.

    Raises:
        CheckpointError: If an option makes no sense.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        keep_last: int | None = None,
        keep_best: int | None = None,
        metric: str = "accept_length",
        mode: Mode = "max",
    ) -> None:
        self.root = Path(root).absolute()
        self.retention = Retention(keep_last=keep_last, keep_best=keep_best, metric=metric, mode=mode)
        self._lock = WriterLock(self.root)
        self._savers: dict[Worker, AsyncSaver] = {}
        #: What was read of the checkpoints under the root since it was taken, on rank 0.
        self._records: dict[str, Record] = {}
        #: Where the bytes lie of what is not kept, by its name, until they are removed.
        self._doomed: dict[str, Path] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the save under way, then give the root free for another writer. A later save takes it again.

        Raises:
            CheckpointError: As `wait` says; the root is free nevertheless.
        """
        try:
            self.wait()
        finally:
            while self._savers:
                self._savers.popitem()[1].release()
            self._lock.release()

    def save(
        self,
        name: str,
        *,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        extra: Mapping[str, Any] | None = None,
        plan: TiePlan | None = None,
        external: Owners | None = None,
        consolidated: bool = False,
        digests: bool = True,
        metrics: Mapping[str, float] | None = None,
    ) -> Path:
        """Write a checkpoint as `tiepolicy_dcp.save` does, then point to it, then delete what is not kept.

        `LATEST` and, if no older checkpoint is better, `BEST` move to it in one step, when every rank has written and
        flushed its part. A save that was killed before that step never happened: its name may be used again.

        Args:
            name: A plain file name that no checkpoint of this store has.
            model: As in `tiepolicy_dcp.save`, like the arguments that are not named here.
            optimizer: Its optimizer.
            extra: Nested JSON values and tensors.
            plan: The model's plan.
            external: Other models, whose tensors are left out.
            consolidated: Also write `model.safetensors`.
            digests: Whether to hash what is written.
            metrics: What is known of the checkpoint, by name. One without metrics never becomes `BEST`.

        Returns:
            The folder of the checkpoint.

        Raises:
            CheckpointError: If the name is no plain file name, a metric no finite number, or the store's metric not
                among them; if another process writes under the root; or as `tiepolicy_dcp.save` says.
        """
        record, contents = self._collect(
            name, metrics, Given(model, optimizer, extra, plan, external, consolidated, digests)
        )
        folder = complete(begin(self.root / name, contents, record=record))
        on_first_rank(lambda: self._commit(name))
        self._remove_doomed()
        return folder

    def async_save(
        self,
        name: str,
        *,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        extra: Mapping[str, Any] | None = None,
        plan: TiePlan | None = None,
        external: Owners | None = None,
        consolidated: bool = False,
        digests: bool = True,
        metrics: Mapping[str, float] | None = None,
        worker: Worker = "thread",
    ) -> PendingSave:
        """Do what `save` does, but return when everything is copied; it is written, pointed to and so on meanwhile.

        One save is under way at a time: the next one, and `close`, wait for it and raise its error if `result` has not.
        The memory for the copies is kept for the next save. Close the store before the process group is destroyed.

        Args:
            name: As in `save`, like the arguments that are not named here.
            model: What to save; it may be changed as soon as this returns.
            optimizer: Its optimizer.
            extra: Nested JSON values and tensors.
            plan: The model's plan.
            external: Other models, whose tensors are left out.
            consolidated: Also write `model.safetensors`.
            digests: Whether to hash what is written.
            metrics: What is known of the checkpoint.
            worker: Who writes meanwhile: a "thread", or another "process", which does not compete for the interpreter.

        Returns:
            What tells when the checkpoint is published; what is not kept has lost its name then, and its bytes soon. A
            process that ends before waits for it; one that is killed leaves the checkpoint before it.

        Raises:
            CheckpointError: If the save under way failed, or as `save` says for all that can be known before the files
                are written.
        """
        record, contents = self._collect(
            name, metrics, Given(model, optimizer, extra, plan, external, consolidated, digests)
        )
        if worker not in self._savers:
            self._savers[worker] = AsyncSaver(worker)
        then = partial(self._commit, name)
        pending = self._savers[worker].start(self.root / name, contents, record=record, then=then)
        pending.when_done(self._remove_doomed)
        return pending

    def wait(self) -> None:
        """Wait for the save that `async_save` began.

        Raises:
            CheckpointError: On every rank, if it failed and `PendingSave.result` has not said so yet.
        """
        for saver in self._savers.values():
            saver.wait()

    def load(
        self,
        reference: str | Path,
        *,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        plan: TiePlan | None = None,
        external: Owners | None = None,
        verify: Verify = "full",
    ) -> Restored:
        """Read what `resolve` finds on rank 0, as `tiepolicy_dcp.load` does.

        Reading takes no lock, so a writer may delete what is being read. What `LATEST` and `BEST` name is deleted only
        once they name another checkpoint: reading then begins again with that one.

        Args:
            reference: As for `resolve`.
            model: As in `tiepolicy_dcp.load`, like the other arguments.
            optimizer: Its optimizer.
            plan: The model's plan.
            external: The models that own what was left out.
            verify: What to check of the files.

        Returns:
            What `tiepolicy_dcp.load` returns.

        Raises:
            CheckpointError: If a checkpoint of another name was deleted meanwhile, or as `tiepolicy_dcp.load` says.
        """
        tries = _NUM_TRIES if str(reference) in POINTERS else 1
        while True:
            folder = on_first_rank(lambda: self.resolve(reference))
            tries -= 1
            try:
                return load(folder, model=model, optimizer=optimizer, plan=plan, external=external, verify=verify)
            except (TiePolicyError, OSError) as error:
                if isinstance(error, LostRankError) or on_first_rank(folder.is_dir):
                    raise
                if not tries:
                    raise CheckpointError(
                        f"{folder} was deleted while it was read, as its writer keeps fewer checkpoints; the model may "
                        f"be filled in part. Load {LATEST}, or have the writer keep more"
                    ) from error

    def names(self) -> list[str]:
        """The whole checkpoints under the root, sorted by name."""
        if not self.root.is_dir():
            return []
        return sorted(path.name for path in self.root.iterdir() if is_checkpoint(path))

    def resolve(self, reference: str | Path) -> Path:
        """The folder of a checkpoint; `reference` is `LATEST`, `BEST`, a name in this store, or a path.

        Raises:
            CheckpointError: If there is none; the message lists what there is.
        """
        for pointer in POINTERS:
            if str(reference) == pointer:
                return self._pointed(pointer)
        for folder in (self.root / reference, Path(reference).absolute()):
            if folder.is_dir():
                return folder
        raise CheckpointError(f"there is no checkpoint {str(reference)!r}: {self._inventory()}")

    def _pointed(self, pointer: Pointer) -> Path:
        name, before = read_pointer(self.root, pointer), None
        while name is not None and name != before:
            folder = self.root / name
            if folder.parent == self.root and is_checkpoint(folder):
                return folder
            name, before = read_pointer(self.root, pointer), name  # a writer may have moved it, and deleted the old one
        if name is None:
            raise CheckpointError(f"there is no checkpoint to restore {pointer} from: {self._inventory()}")
        raise CheckpointError(f"{self.root / pointer} names {name!r}, which is not there: {self._inventory()}")

    def _collect(
        self, name: str, metrics: Mapping[str, float] | None, given: Given
    ) -> tuple[Mapping[str, Any], Contents]:
        """The record and the contents of the next checkpoint, once the one before it is done."""
        self.wait()
        record = on_first_rank(lambda: self._begin(name, metrics).to_json())
        return record, collect(given)

    def _begin(self, name: str, metrics: Mapping[str, float] | None) -> Record:
        """Rank 0: check the arguments, take the root, remove what killed saves left, and number the checkpoint."""
        if not name or Path(name).name != name or name.startswith(".") or name in POINTERS:
            raise CheckpointError(
                f"{name!r} cannot name a checkpoint: it must be a plain file name other than {' and '.join(POINTERS)}"
            )
        checked = checked_metrics(metrics)
        self._check_metric(name, None if metrics is None else checked)
        try:
            return Record(name=name, number=self._next_number(name), metrics=checked)
        except OSError as error:
            raise CheckpointError(
                f"{self.root} cannot take a checkpoint: {error.strerror or error}. Nothing was written. Give a folder "
                "that you may write to"
            ) from error

    def _next_number(self, name: str) -> int:
        if not self._lock.held:
            self._lock.acquire()
            self._records = {}
        remove_leftovers(self.root)
        self._records.pop(name, None)
        self._records = read_records(self.root, known=self._records)
        numbers = {record.name: record.number for record in self._records.values()}
        latest = read_pointer(self.root, LATEST)
        published = 0 if latest is None else numbers.get(latest, math.inf)
        if numbers.get(name, 0) > published:  # its save was killed before LATEST could name it
            shutil.rmtree(withdraw(self.root / name))
            del numbers[name], self._records[name]
        return 1 + max(numbers.values(), default=0)

    def _check_metric(self, name: str, metrics: Mapping[str, float] | None) -> None:
        metric, keep_best = self.retention.metric, self.retention.keep_best
        if metrics is not None and metric not in metrics:
            raise CheckpointError(
                f"the metrics of {name} lack {metric}, by which this store finds the best checkpoint; they have "
                f"{', '.join(metrics) or 'none'}. Nothing was written"
            )
        if metrics is None and keep_best is not None:
            logger.warning("%s is saved without %s: it cannot become %s", name, metric, BEST)

    def _commit(self, name: str) -> None:
        """Rank 0: point to a published checkpoint, and delete what is not kept."""
        names: dict[Pointer, str] = {LATEST: name}
        try:
            self._records = read_records(self.root, known=self._records)
            ranked = self.retention.ranked(self._records.values())
            if ranked:
                names[BEST] = ranked[0].name
            move_pointers(self.root, names)
        except OSError as error:
            raise CheckpointError(
                f"{self.root / name} is whole, but {LATEST} may still name the checkpoint before it: {error}. Save "
                "again, under the same name or another, once the disk can be written"
            ) from error
        for record in self.retention.doomed(self._records.values(), pointed=names.values()):
            with self._deleting(record.name):
                self._doomed[record.name] = withdraw(self.root / record.name)

    def _remove_doomed(self) -> None:
        """Rank 0: free the room of what lost its name."""
        while self._doomed:
            name, folder = self._doomed.popitem()
            with self._deleting(name):
                shutil.rmtree(folder)

    @contextmanager
    def _deleting(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # the new checkpoint is safe, so training need not end
            logger.warning("%s is not kept, but could not be deleted: %s", self.root / name, error)

    def _inventory(self) -> str:
        names = self.names()
        return f"{self.root} holds {', '.join(names)}" if names else f"{self.root} holds no checkpoint"
