"""Step 10: the processes that train together, and what they exchange."""

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from eagle3.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among those that train together, and the device it trains on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes and logs for all."""
        return self.rank == 0

    def sum_(self, values: Tensor) -> None:
        """Replace a tensor by its sum over all processes."""
        if self.world_size > 1:
            dist.all_reduce(values)

    def gather(self, value: T) -> Sequence[T]:
        """The value of every process, by rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def replicate(self, module: nn.Module) -> nn.Module:
        """Average the gradients of a module over all processes; alone, the module itself."""
        if self.world_size == 1:
            return module
        devices: Any = [self.device] if self.device.type == "cuda" else None
        # The buffers are the draft vocabulary, which never changes. torch 2.13 renamed the argument.
        known = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {sync: False}
        return DistributedDataParallel(module, device_ids=devices, **options)


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that torchrun started, if it did; leave them at the end of the block.

    Uses one GPU per process and NCCL where there are GPUs, else the CPU and gloo.

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
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo")
    try:
        yield Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)
    finally:
        dist.destroy_process_group()
