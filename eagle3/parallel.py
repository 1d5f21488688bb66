"""Step 13: the processes that train together, and how a run ends before its end."""

import inspect
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from eagle3.config import ParallelConfig
from eagle3.errors import ConfigError, Eagle3Error, LostProcessError
from tiepolicy_fsdp2 import ShardOptions, fully_shard

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
                try:
                    # Not through logging: another thread may hold its lock. Its reader may be gone, too.
                    sys.stderr.write("eagle3: the process that started this one is gone; stopping without a save\n")
                    sys.stderr.flush()
                finally:
                    os._exit(1)

    thread = threading.Thread(target=watch, name="parent watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


T = TypeVar("T")

#: Under which the first process leaves its last sentence for the others.
_LAST_WORDS = "last words of the first process"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among those that train together, and the device it trains on.

    Attributes:
        rank: From 0.
        world_size: Processes in all.
        device: That of this process.
        local_world_size: Processes on this machine.
        store: Keys and values that all processes see; None for a process alone.
    """

    rank: int
    world_size: int
    device: torch.device
    local_world_size: int = 1
    store: Store | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes and logs for all."""
        return self.rank == 0

    def sum_(self, values: Tensor) -> None:
        """Replace a tensor, `values`, by its sum over all processes."""
        if self.world_size > 1:
            dist.all_reduce(values)

    def gather(self, value: T) -> Sequence[T]:
        """The `value` of every process, by rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def on_first(self, step: Callable[[], object]) -> None:
        """Run a `step` in the first process; what it finds wrong with the input is raised in all of them."""
        failure: Eagle3Error | None = None
        if self.is_first:
            try:
                step()
            except Eagle3Error as error:
                failure = error
        failure = self.gather(failure)[0]
        if failure is not None:
            raise failure

    def report(self, sentence: str, *, patience: timedelta = timedelta(seconds=20)) -> None:
        """Print to standard error why this process ends, and leave it for torchrun's own report.

        What is wrong with the input is wrong in every process, and reads best once: the first always speaks, and the
        others only where the first says something else, or nothing while they wait.

        Args:
            sentence: Why.
            patience: How long the others wait for the first.
        """
        self._tell_launcher(sentence)
        if self.store is None or self.is_first:
            sys.stderr.write(f"eagle3: error: {sentence}\n")
            sys.stderr.flush()
        elif not self._first_says(sentence, patience):
            sys.stderr.write(f"eagle3: error: process {self.rank}: {sentence}\n")
        if self.store is not None and self.is_first:
            # Only now: torchrun ends all processes as soon as it sees one that failed.
            self.store.set(_LAST_WORDS, sentence)

    def _first_says(self, sentence: str, patience: timedelta) -> bool:
        assert self.store is not None
        try:
            self.store.wait([_LAST_WORDS], patience)
        except RuntimeError:  # the base of what torch raises for a time-out and for a store that is gone
            return False
        return bool(self.store.get(_LAST_WORDS).decode() == sentence)

    def _tell_launcher(self, sentence: str) -> None:
        # torchrun prints what its processes leave there, instead of advice on how to get a traceback.
        path = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if self.store is not None and path is not None:
            details = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
            message = {"message": {"message": sentence, "extraInfo": details}}
            Path(path).write_text(json.dumps(message), encoding="utf-8")

    def distribute(
        self, module: nn.Module, config: ParallelConfig, *, precision: torch.dtype, head: nn.Module
    ) -> nn.Module:
        """Spread a module over all processes, so that each parameter's gradient becomes the mean over them.

        Args:
            module: On this process's device; sharded in place where `config` says so. Frozen parameters stay whole.
            config: How.
            precision: Of the matrix products. Shards travel in it where it is shorter than they are.
            head: The part of it that runs last, by its method `loss`. Its shards and gradients travel while the others
                compute.

        Returns:
            What to call instead of the module; alone, the module itself.

        Raises:
            ConfigError: If the processes do not make whole groups of `parallel.shard_size`.
            ShardingError: If tied weights would not survive.
        """
        if self.world_size == 1:
            return module
        if config.kind == "data":
            return self._replicate(module)
        # Their gathering would cost as much as the target's own embedding, and no optimizer state hangs on them.
        frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
        options: ShardOptions = {"ignored_params": frozen, "reshard_after_forward": False}
        if precision.itemsize < 4:
            # Autocast would round the weights anyway. Gradients are summed as the masters are.
            options["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        sharded: Any = fully_shard(module, blocks=[head], mesh=self._mesh(config), **options)
        register_fsdp_forward_method(head, "loss")
        sharded.set_modules_to_forward_prefetch([head])
        return module

    def _replicate(self, module: nn.Module) -> nn.Module:
        devices: Any = [self.device] if self.device.type == "cuda" else None
        # The buffers are the draft vocabulary, which never changes. torch 2.13 renamed the argument.
        known = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {sync: False}
        return DistributedDataParallel(module, device_ids=devices, **options)

    def _mesh(self, config: ParallelConfig) -> DeviceMesh:
        if config.kind == "shard":
            return init_device_mesh(self.device.type, (self.world_size,), mesh_dim_names=("shard",))
        size = config.shard_size or self.local_world_size
        if self.world_size % size:
            raise ConfigError(
                f"{self.world_size} processes do not make whole groups of {size}, which is parallel.shard_size or, if "
                "that is null, the processes of one machine. Start a multiple of it, or change parallel.shard_size."
            )
        shape = (self.world_size // size, size)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))


@contextmanager
def gradients_stay_local(module: nn.Module) -> Iterator[None]:
    """Within the block, backward passes add to gradients without exchanging them; the next one outside exchanges all.

    Args:
        module: What `Ranks.distribute` returned.
    """
    if isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
        return
    # fully_shard gives its module this method.
    switch = getattr(module, "set_requires_gradient_sync", lambda _: None)
    switch(False)
    try:
        yield
    finally:
        switch(True)


@contextmanager
def all_present() -> Iterator[None]:
    """Within the block, a process that finds another one gone says so in one sentence.

    Raises:
        LostProcessError: If the connection to another process ends, or it does not answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        # NCCL has a class for it; gloo's errors are known by the file of its source that they name.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        cause = str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0]
        raise LostProcessError(
            f"Another process of this run is gone or cannot be reached ({cause}). Every checkpoint that has a name is "
            "whole: go on with --checkpoint.restore_from LATEST."
        ) from error


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that torchrun started, if it did; leave them at the end of the block.

    Uses one GPU per process and NCCL where there are GPUs, else the CPU and gloo.

    Returns:
        A block with this process among them.

    Raises:
        ConfigError: If there are more processes than GPUs.
    """
    has_gpu = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if has_gpu and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"Process {local_rank} of this machine has no GPU of its own: there are {torch.cuda.device_count()}. Start "
            'one process per GPU, or train on the CPU with CUDA_VISIBLE_DEVICES="".'
        )
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        yield Ranks(rank=0, world_size=1, device=device)
        return
    store, rank, world_size = next(iter(rendezvous("env://")))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if has_gpu else "gloo",
        store=PrefixStore("processes", store),
        rank=rank,
        world_size=world_size,
    )
    try:
        with ends_with_parent():
            yield Ranks(
                rank=rank,
                world_size=world_size,
                device=device,
                local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
                store=PrefixStore("run", store),
            )
    finally:
        dist.destroy_process_group()
