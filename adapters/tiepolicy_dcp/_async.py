"""Step 17, saving while training goes on: copy, return, and write what was copied in the background."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from tiepolicy import Owners, TiePlan
from tiepolicy.errors import CheckpointError
from tiepolicy_dcp._files import Written, write_tensors
from tiepolicy_dcp._folder import discard
from tiepolicy_dcp._ranks import all_present, is_distributed, is_first_rank, on_all_ranks, on_first_rank
from tiepolicy_dcp._save import Contents, Given, Job, begin, collect, complete
from tiepolicy_dcp._staging import Staging, WorkerProcess

logger = logging.getLogger("tiepolicy_dcp")

#: Who writes the files meanwhile: a thread of this process, or another process, which takes no turn of this one's
#: interpreter.
Worker = Literal["thread", "process"]


class PendingSave:
    """A checkpoint that is being written; returned by `async_save`."""

    def __init__(self) -> None:
        self._future: Future[Path] = Future()
        self._told = False

    def done(self) -> bool:
        """Whether it is published, or has failed."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> Path:
        """Wait for the checkpoint. Called by any rank.

        Args:
            timeout: Seconds to wait; without end if not given.

        Returns:
            Its folder.

        Raises:
            CheckpointError: If it could not be written; nothing was kept of it.
            TimeoutError: If it is still being written.
        """
        error = self._future.exception(timeout)
        self._told = error is not None
        return self._future.result()

    def settle(self) -> None:
        """Wait, and raise the error that nobody has been told of yet."""
        if self._future.exception() is not None and not self._told:
            self.result()

    def finish(self, outcome: Path | Exception) -> None:
        """Say how it ended: an `outcome` is its folder, or what went wrong."""
        if isinstance(outcome, Exception):
            self._future.set_exception(outcome)
        else:
            self._future.set_result(outcome)

    def when_done(self, step: Callable[[], None]) -> None:
        """Call `step` when it has ended; `AsyncSaver.wait` waits for that, too."""
        self._future.add_done_callback(lambda _: step())


class AsyncSaver:
    """Saves one checkpoint at a time in the background. All ranks call the methods together.

    Its memory, a copy of what this process saves, and its helpers live until `close`.

    Args:
        worker: Who writes.
    """

    def __init__(self, worker: Worker = "thread") -> None:
        if worker not in ("thread", "process"):
            raise CheckpointError(f"worker is {worker!r}, but must be 'thread' or 'process'")
        self._staging = Staging()
        self._process = WorkerProcess(self._staging.descriptor) if worker == "process" else None
        # The trainer's collectives and ours must not meet in one group, nor ours wait for a GPU.
        with all_present():
            group: Any = dist.new_group(backend="gloo") if is_distributed() else None
        self._group: dist.ProcessGroup | None = group
        self._pending: PendingSave | None = None

    def start(
        self,
        folder: Path,
        contents: Contents,
        *,
        record: Mapping[str, Any] | None = None,
        then: Callable[[], None] = lambda: None,
    ) -> PendingSave:
        """Copy what this rank writes, and return; the rest happens in the background.

        Args:
            folder: The checkpoint's absolute path.
            contents: What `collect` returned on this rank.
            record: What a store wants to know of it later.
            then: What rank 0 does once the checkpoint is published.

        Raises:
            CheckpointError: If the save before this one failed; nothing is begun.
        """
        self.wait()
        job = begin(folder, contents, record=record)
        live = list(job.share.tensors())
        copies: list[torch.Tensor] = []

        def copy() -> None:
            copies.extend(self._staging.copy(live))
            if self._process is not None:
                self._process.start()  # what it loads first would compete with the copy

        try:
            on_all_ranks(copy)
        except (MemoryError, OSError, RuntimeError) as error:
            if is_first_rank():
                discard(job.unfinished)
            raise CheckpointError(
                f"{folder} could not be written: there is no memory for a copy of it: {error}. Nothing was kept"
            ) from error
        self._pending = PendingSave()
        arguments = (self._pending, job, self._write(copies, digest=contents.digests), then)
        # No daemon: a process that ends while it saves waits until that is done.
        self._thread = threading.Thread(target=self._run, args=arguments, name=f"save {folder.name}")
        self._thread.start()
        return self._pending

    def wait(self) -> None:
        """Wait for the save under way, if there is one.

        Raises:
            CheckpointError: On every rank, if it failed and `PendingSave.result` has not said so yet.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            self._thread.join()
            on_all_ranks(pending.settle)

    def close(self) -> None:
        """Wait for the save under way, and give everything back.

        Raises:
            CheckpointError: As `wait` says.
        """
        try:
            self.wait()
        finally:
            self.release()

    def release(self) -> None:
        """Give memory, process and group back; nothing may be under way."""
        if self._process is not None:
            self._process.close()
        self._staging.close()
        if self._group is not None and is_distributed():
            dist.destroy_process_group(self._group)

    def _write(self, copies: Sequence[torch.Tensor], *, digest: bool) -> Callable[[Path], Written]:
        process, staging = self._process, self._staging
        if process is None:
            return lambda path: write_tensors(path, copies, digest=digest, streams=staging.streams)
        return lambda path: process.write(path, staging.fetch(copies), digest=digest)

    def _run(self, pending: PendingSave, job: Job, write: Callable[[Path], Written], then: Callable[[], None]) -> None:
        try:
            complete(job, write=write, group=self._group)
            on_first_rank(then, group=self._group)
        except Exception as error:  # handed on whole, to whoever asks next
            # A traceback only where the error is no sentence.
            trace = None if isinstance(error, CheckpointError) else error
            logger.error("the save of %s in the background failed: %s", job.folder, error, exc_info=trace)  # noqa: TRY400
            pending.finish(error)
        else:
            pending.finish(job.folder)


def async_save(
    folder: str | Path,
    *,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    extra: Mapping[str, Any] | None = None,
    plan: TiePlan | None = None,
    external: Owners | None = None,
    consolidated: bool = False,
    digests: bool = True,
    worker: Worker = "thread",
) -> PendingSave:
    """Write a checkpoint as `save` does, but return when everything is copied, before it is written.

    The model may be changed as soon as this returns. Several of these copy the model several times; `CheckpointStore`
    has one at a time and keeps its memory. Where ranks talk to each other, call `result` before the default process
    group is destroyed.

    Args:
        folder: A name that does not exist yet.
        model: What to save, like the arguments that are not named here; see `save`.
        optimizer: Its optimizer.
        extra: Nested JSON values and tensors.
        plan: The model's plan.
        external: Other models, whose tensors are left out.
        consolidated: Also write `model.safetensors`.
        digests: Whether to hash what is written.
        worker: Who writes meanwhile: a "thread", or another "process", which does not compete for the interpreter.

    Returns:
        What tells when the checkpoint is published. A process that ends before waits for it; one that is killed leaves
        nothing under the checkpoint's name.

    Raises:
        CheckpointError: As `save` does, for all that can be known before the files are written.
    """
    contents = collect(Given(model, optimizer, extra, plan, external, consolidated, digests))
    saver = AsyncSaver(worker)
    try:
        pending = saver.start(Path(folder).absolute(), contents)
    except CheckpointError:
        saver.release()
        raise
    pending.when_done(saver.release)
    return pending
