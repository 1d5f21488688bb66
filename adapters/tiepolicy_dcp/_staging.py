"""Step 20, staging: copies of live tensors in memory that is kept between saves, so that training may go on.

What lies on a GPU is copied within it if it has room, which takes milliseconds, and fetched while it is written.
"""

import math
import mmap
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from tiepolicy_dcp._devices import Streams, fetch_
from tiepolicy_dcp.errors import CheckpointError

#: Where a copy may begin: what vector instructions and DMA like.
_ALIGNMENT = 64
#: What a copy leaves free of a GPU.
_SPARE_BYTES = 1 << 30


class Place(NamedTuple):
    """Where a copy lies in the memory, in bytes, and what it is."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Staging:
    """Memory of one process for one copy of what it saves."""

    def __init__(self) -> None:
        #: For what is read of the copies.
        self.streams = Streams()
        self._memory = memoryview(bytearray())
        self._on_devices: dict[torch.device, torch.Tensor] = {}

    def copy(self, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Copy tensors. The copies hold what the tensors held at the call, whatever is done to these afterwards.

        Returns:
            Contiguous tensors, valid until the next call; on the GPU of the tensor if that has room, else on the CPU,
            each with a storage of its own.
        """
        live = [tensor.detach() for tensor in tensors]
        places, num_bytes = layout(live)
        copies = views(self._reserve(num_bytes), places)  # what is not used of it takes no memory
        for device in {tensor.device for tensor in live if tensor.is_cuda}:
            indices = [index for index, tensor in enumerate(live) if tensor.device == device]
            places, num_bytes = layout([live[index] for index in indices])
            if self._has_room(device, num_bytes):
                for index, copy in zip(indices, views(self._on_devices[device], places), strict=True):
                    copies[index] = copy
        fetched = []
        for copy, tensor in zip(copies, live, strict=True):
            if tensor.is_cuda and not copy.is_cuda:
                fetched.append((copy, tensor))
            else:
                copy.copy_(tensor)  # on a GPU: before whatever its stream does next
        self.streams.follow([*copies, *(tensor for _, tensor in fetched)])
        fetch_(fetched, self.streams)
        return copies

    def close(self) -> None:
        """Give the memory back, once no copy is in use."""
        self._memory = memoryview(bytearray())
        self._on_devices.clear()

    def _has_room(self, device: torch.device, num_bytes: int) -> bool:
        """Whether a GPU has memory for copies that no training step has asked for; it is kept."""
        kept = self._on_devices.pop(device, None)
        if kept is None or len(kept) < num_bytes:
            del kept
            if torch.cuda.mem_get_info(device)[0] < num_bytes + _SPARE_BYTES:
                return False
            try:
                kept = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            except torch.OutOfMemoryError:
                return False
        self._on_devices[device] = kept
        return True

    def _reserve(self, num_bytes: int) -> memoryview:
        if len(self._memory) < num_bytes:
            self._memory = memoryview(bytearray())  # the old memory goes before the new one comes
            self._memory = _anonymous(num_bytes)
        return self._memory


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
        super().close()
        os.close(self.descriptor)

    def fetch(self, copies: Sequence[torch.Tensor]) -> list[Place]:
        """Where copies lie in the memory; those on GPUs are fetched first, which takes a while."""
        places, num_bytes = layout(copies)
        there = views(self._reserve(num_bytes), places)
        fetch_([(copy, live) for copy, live in zip(there, copies, strict=True) if live.is_cuda], self.streams)
        return places

    def _reserve(self, num_bytes: int) -> memoryview:
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


def views(memory: memoryview | torch.Tensor, places: Iterable[Place]) -> list[torch.Tensor]:
    """Tensors over places in memory: bytes of the CPU, of which each seems to be a storage, or a tensor of uint8."""
    found = []
    for start, shape, dtype in places:
        num_bytes = math.prod(shape) * dtype.itemsize
        if not num_bytes:
            found.append(torch.empty(shape, dtype=dtype))
        elif isinstance(memory, torch.Tensor):
            found.append(memory[start : start + num_bytes].view(dtype).view(shape))
        else:
            found.append(torch.frombuffer(memory[start : start + num_bytes], dtype=dtype).view(shape))
    return found
