"""Step 3, devices: bytes go to and from GPUs on streams of their own, through a little pinned memory.

Pinning as much memory as is copied would take longer than the copy. On the CPU the same code copies at once.
"""

import mmap
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple

import torch

from tiepolicy.files import READ_AHEAD_BYTES, read_soon, spare_processors

#: How much is copied, hashed and written at a time. A disk and a bus reach their rates with it.
PIECE_BYTES = 1 << 22
#: How many pieces may be on their way.
NUM_PIECES = 8
#: Threads that read at once, at most.
_NUM_READERS = 8
#: Pieces that a disk is asked for before they are read.
_NUM_ASKED = READ_AHEAD_BYTES // PIECE_BYTES


class Streams:
    """One stream for copies from and to each GPU, beside those that compute."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def follow(self, tensors: Iterable[torch.Tensor]) -> None:
        """Let later copies of tensors wait for what the current streams do to them now. The host waits for nothing."""
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            self._streams[device].wait_stream(torch.cuda.current_stream(device))

    def copy_(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy; where a GPU takes part, on the stream that follows it, and without waiting."""
        device = source.device if source.is_cuda else target.device
        stream = self._streams.get(device)
        with torch.cuda.stream(stream):  # nothing happens for None
            target.copy_(source, non_blocking=stream is not None)
        if stream is not None and source.is_cuda:
            source.record_stream(stream)  # it may be let go before the copy is made

    def marks(self) -> list[torch.cuda.Event]:
        """Events that happen when the copies up to now are made; waiting for one takes no processor."""
        marks = []
        for stream in self._streams.values():
            mark = torch.cuda.Event(blocking=True)
            mark.record(stream)
            marks.append(mark)
        return marks

    def wait(self) -> None:
        """Wait for all copies."""
        for mark in self.marks():
            mark.synchronize()


def pieces(*, pinned: bool) -> list[torch.Tensor]:
    """Memory for the bytes on their way, aligned to pages; it takes none of the CPU's before it is used."""
    num_bytes = PIECE_BYTES * NUM_PIECES
    if pinned:
        memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    else:
        memory = torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)
    return list(memory.split(PIECE_BYTES))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in order of their indices, as `(bytes,)` of uint8: a view if they lie so, else a copy."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8)


def fetch(descriptor: int, tensors: Mapping[int, torch.Tensor], streams: Streams) -> None:
    """Write the elements of tensors to a file, and wait until they are there.

    Args:
        descriptor: A file open for writing, whose pages are memory.
        tensors: By the place of their first byte, on any device.
        streams: They follow what made the tensors.
    """
    free = deque(pieces(pinned=True)) if any(tensor.is_cuda for tensor in tensors.values()) else deque()
    under_way: deque[tuple[int, int, torch.Tensor, list[torch.cuda.Event]]] = deque()

    def land() -> None:
        place, num_bytes, piece, marks = under_way.popleft()
        for mark in marks:
            mark.synchronize()
        write_at(descriptor, place, piece[:num_bytes])
        free.append(piece)

    for start, tensor in tensors.items():
        elements = as_bytes(tensor if tensor.is_cuda else tensor.cpu())
        if not elements.is_cuda:
            write_at(descriptor, start, elements)
            continue
        streams.follow([] if tensor.is_contiguous() else [elements])
        for index, part in enumerate(elements.split(PIECE_BYTES)):
            if not free:
                land()
            piece = free.popleft()
            streams.copy_(piece[: len(part)], part)
            under_way.append((start + index * PIECE_BYTES, len(part), piece, streams.marks()))
    while under_way:
        land()


def write_at(descriptor: int, place: int, elements: torch.Tensor) -> None:
    """Write `(bytes,)` of uint8 on the CPU to a place in a file."""
    left = memoryview(elements.numpy().data)
    while left:
        count = os.pwrite(descriptor, left, place)
        left, place = left[count:], place + count


class Section(NamedTuple):
    """Bytes of a file and where they belong."""

    #: Open for reading.
    descriptor: int
    start: int
    #: `(bytes,)` of uint8, contiguous.
    target: torch.Tensor


def read_(sections: Iterable[Section]) -> None:
    """Read parts of files into memory, into that of GPUs by several threads, and wait until they are there.

    Raises:
        EOFError: If a file ends before.
    """
    parts = [
        Section(descriptor, start + index * PIECE_BYTES, part)
        for descriptor, start, target in sections
        for index, part in enumerate(target.split(PIECE_BYTES))
    ]
    on_gpus = [part for part in parts if part.target.is_cuda]
    if on_gpus:
        _read_to_gpus_(on_gpus)
    on_cpu = [part for part in parts if not part.target.is_cuda]

    def read_part_(index: int) -> None:
        not_asked = index + _NUM_ASKED if index else 0
        for later in on_cpu[not_asked : index + _NUM_ASKED + 1]:
            read_soon(later.descriptor, later.start, len(later.target))
        fill_(*on_cpu[index])

    with ThreadPoolExecutor(min(spare_processors() + 1, _NUM_READERS)) as readers:
        for _ in readers.map(read_part_, range(len(on_cpu))):
            pass


def _read_to_gpus_(parts: Sequence[Section]) -> None:
    free: SimpleQueue[torch.Tensor] = SimpleQueue()
    for piece in pieces(pinned=True):
        free.put(piece)
    streams = Streams()
    streams.follow(part.target for part in parts)

    def read_part_(part: Section) -> None:
        piece = free.get()
        try:
            fill_(part.descriptor, part.start, piece[: len(part.target)])
            streams.copy_(part.target, piece[: len(part.target)])
            streams.wait()
        finally:
            free.put(piece)

    with ThreadPoolExecutor(min(_NUM_READERS, NUM_PIECES)) as readers:
        for _ in readers.map(read_part_, parts):
            pass


def fill_(descriptor: int, start: int, target: torch.Tensor) -> None:
    """Read a part of a file into `(bytes,)` of uint8 on the CPU.

    Raises:
        EOFError: If the file ends before.
    """
    left = memoryview(target.numpy().data)
    while left:
        count = os.preadv(descriptor, [left], start)
        if not count:
            raise EOFError(f"the file ends {len(left)} bytes before the tensor")
        left, start = left[count:], start + count
