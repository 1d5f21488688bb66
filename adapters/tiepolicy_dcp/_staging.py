"""Step 18, staging: copies of live tensors in memory that is kept between saves, so that training may go on."""

import mmap
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from tiepolicy_dcp.errors import CheckpointError

#: Where a copy may begin: what vector instructions and DMA like.
_ALIGNMENT = 64


class Place(NamedTuple):
    """Where a copy lies in the memory, in bytes, and what it is."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Staging:
    """Memory of one process for one copy of what it saves, pinned if that lies on a GPU."""

    def __init__(self) -> None:
        self._memory = memoryview(bytearray())
        self._pinned = False
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def copy(self, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Copy tensors, waiting until the copies hold what the tensors held at the call.

        Returns:
            Contiguous tensors on the CPU, each with a storage of its own, valid until the next call.
        """
        live = [tensor.detach() for tensor in tensors]
        places, num_bytes = layout(live)
        copies = views(self._reserve(num_bytes, pinned=any(tensor.is_cuda for tensor in live)), places)
        devices = {tensor.device for tensor in live if tensor.is_cuda}
        for device in devices:
            stream = self._streams.setdefault(device, torch.cuda.Stream(device))
            stream.wait_stream(torch.cuda.current_stream(device))
        for tensor, copy in zip(live, copies, strict=True):
            with torch.cuda.stream(self._streams.get(tensor.device)):  # nothing happens for None
                copy.copy_(tensor, non_blocking=True)
        for device in devices:
            self._streams[device].synchronize()
        return copies

    def _reserve(self, num_bytes: int, *, pinned: bool) -> memoryview:
        if len(self._memory) < num_bytes or (pinned and not self._pinned):
            self._memory = memoryview(bytearray())  # the old memory goes before the new one comes
            self._memory, self._pinned = _pinned(num_bytes) if pinned else _anonymous(num_bytes), pinned
        return self._memory


def _pinned(num_bytes: int) -> memoryview:
    memory: memoryview = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy().data
    return memory


def _anonymous(num_bytes: int) -> memoryview:
    memory = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # most of the time of a first copy goes into small pages
    return memoryview(memory)


class SharedStaging(Staging):
    """The same in memory that another process can map: a file that lies in memory and has no name.

    So the kernel frees it when the last of both processes is gone, however that ends.

    Raises:
        CheckpointError: If the system has no such memory.
    """

    def __init__(self) -> None:
        super().__init__()
        if not hasattr(os, "memfd_create"):
            raise CheckpointError('saving in another process needs Linux; use worker="thread"')
        self.descriptor = os.memfd_create("tiepolicy staging")

    def close(self) -> None:
        """Give the memory back, once no copy is in use."""
        os.close(self.descriptor)

    def _reserve(self, num_bytes: int, *, pinned: bool) -> memoryview:  # noqa: ARG002 - a mapped file is never pinned
        if os.fstat(self.descriptor).st_size < num_bytes:
            os.ftruncate(self.descriptor, num_bytes)
            self._memory = mapped(self.descriptor)  # a mapping that is kept has its pages already
        return self._memory


def mapped(descriptor: int) -> memoryview:
    """The whole of a file in memory, to read and write."""
    num_bytes = os.fstat(descriptor).st_size
    return memoryview(mmap.mmap(descriptor, num_bytes) if num_bytes else bytearray())


def layout(tensors: Sequence[torch.Tensor]) -> tuple[list[Place], int]:
    """Where each tensor's copy goes, and how many bytes all of them take."""
    places, end = [], 0
    for tensor in tensors:
        places.append(Place(end, tuple(tensor.shape), tensor.dtype))
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return places, end


def views(memory: memoryview, places: Iterable[Place]) -> list[torch.Tensor]:
    """Tensors over places in memory; each seems to have a storage of its own, which is what `torch.save` writes."""
    found = []
    for start, shape, dtype in places:
        empty = torch.empty(shape, dtype=dtype, device="meta")
        if empty.nbytes:
            part = torch.frombuffer(memory[start : start + empty.nbytes], dtype=dtype)
            found.append(part.view(shape))
        else:
            found.append(torch.empty(shape, dtype=dtype))
    return found
