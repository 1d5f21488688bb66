"""Step 21, staging: copies of live tensors in memory that is kept between saves, so that training may go on.

What lies on a GPU is copied within it if it has room, which takes milliseconds, and fetched while it is written.
"""

import math
import mmap
import os
import tempfile
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from tiepolicy_dcp._devices import Streams, fetch

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
    """Memory of one process for one copy of what it saves: a file that lies in memory and has no name.

    So another process can map it, the kernel frees it when the last of both is gone, however that ends, and a first
    copy is no slower than any other: what is written to a file needs no page that is cleared before, or mapped.
    """

    def __init__(self) -> None:
        self.descriptor = _file_in_memory()
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
        self._reserve(num_bytes)
        on_devices: dict[int, torch.Tensor] = {}
        for device in {tensor.device for tensor in live if tensor.is_cuda}:
            on_devices |= self._copied_within(device, live)
        self.streams.follow([*live, *on_devices.values()])
        rest = {place.start: live[index] for index, place in enumerate(places) if index not in on_devices}
        fetch(self.descriptor, rest, self.streams)
        return [on_devices.get(index, copy) for index, copy in enumerate(views(self._memory, places))]

    def fetch(self, copies: Sequence[torch.Tensor]) -> list[Place]:
        """Where copies lie in the file; those on GPUs are fetched first, which takes a while."""
        places, _ = layout(copies)
        on_devices = {place.start: copy for place, copy in zip(places, copies, strict=True) if copy.is_cuda}
        fetch(self.descriptor, on_devices, self.streams)
        return places

    def close(self) -> None:
        """Give the memory back, once no copy is in use."""
        self._memory = memoryview(bytearray())
        self._on_devices.clear()
        os.close(self.descriptor)

    def _copied_within(self, device: torch.device, live: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        """Copies, by index, of the tensors that lie on a GPU, if it has room for them."""
        indices = [index for index, tensor in enumerate(live) if tensor.device == device]
        places, num_bytes = layout([live[index] for index in indices])
        if not self._has_room(device, num_bytes):
            return {}
        copies = dict(zip(indices, views(self._on_devices[device], places), strict=True))
        for index, copy in copies.items():
            copy.copy_(live[index])  # before whatever its stream does next
        return copies

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

    def _reserve(self, num_bytes: int) -> None:
        if len(self._memory) < num_bytes:
            os.ftruncate(self.descriptor, num_bytes)  # what is not used of it takes no memory
            self._memory = mapped(self.descriptor)


def _file_in_memory() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("tiepolicy staging")
    with tempfile.TemporaryFile() as file:  # which has no name either
        return os.dup(file.fileno())


def mapped(descriptor: int) -> memoryview:
    """The whole of a file, to read and write."""
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
