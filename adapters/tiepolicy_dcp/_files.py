"""Step 5, data files: tensors one after the other as `torch.save` writes them, piece by piece.

While one piece goes to the disk, the next is hashed and the one after it is filled.
Whole pieces go past the page cache where the file system can do that: a checkpoint then neither waits for a second
copy of itself nor drives the training data out of memory.
"""

import errno
import io
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, Self

import torch

from tiepolicy import TensorSpec
from tiepolicy.files import FileRecord, header_of, new_digest
from tiepolicy_dcp._devices import PIECE_BYTES, Streams, as_bytes, pieces, write_at
from tiepolicy_dcp._folder import naming
from tiepolicy_dcp._frames import frame

#: Enough to keep a disk busy.
_NUM_WRITERS = 2
#: How many pieces a GPU may be ahead of the hash.
_AHEAD = 2


class _Filled(NamedTuple):
    """A piece that is full, or the last, once the marks have happened."""

    piece: torch.Tensor
    num_bytes: int
    start: int
    marks: list[torch.cuda.Event]


class _Writers:
    """Threads that write pieces.

    An executor takes no more work once the process ends, when a save in the background has still to be finished.
    """

    def __init__(self, write: Callable[[_Filled], torch.Tensor]) -> None:
        self._write = write
        self._queue: SimpleQueue[tuple[_Filled, Future[torch.Tensor]] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        for _ in range(_NUM_WRITERS):
            thread = threading.Thread(target=self._run)
            try:
                thread.start()
            except RuntimeError:  # since Python 3.12 no thread starts once the process ends: pieces are written here
                break
            self._threads.append(thread)

    def submit(self, filled: _Filled) -> Future[torch.Tensor]:
        """Have a piece written; the future has it when it is free again."""
        future: Future[torch.Tensor] = Future()
        if self._threads:
            self._queue.put((filled, future))
        else:
            future.set_result(self._write(filled))
        return future

    def close(self) -> None:
        """Wait for what was submitted."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (task := self._queue.get()) is not None:
            filled, future = task
            try:
                future.set_result(self._write(filled))
            except Exception as error:  # handed on whole, to who submitted it
                future.set_exception(error)


class PieceFile:
    """A file that does not exist yet; on disk as a whole when the `with` block ends.

    Args:
        path: Where to write it.
        streams: For tensors of GPUs; they follow what made them.
        pinned: Whether any will be.
        digest: Whether to hash what is written.
    """

    def __init__(self, path: Path, streams: Streams, *, pinned: bool, digest: bool) -> None:
        self.num_bytes = 0
        self._streams = streams
        self._digest = new_digest() if digest else None
        self._free = pieces(pinned=pinned)
        self._file = path.open("xb", buffering=0)
        self._direct = _open_past_cache(path)
        self._writers = _Writers(self._write)
        self._piece = self._free.pop()
        self._num_filled = 0
        self._copied: deque[_Filled] = deque()
        self._writing: deque[Future[torch.Tensor]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._streams.wait()  # nobody writes into memory that is given back
            self._writers.close()
            if self._direct is not None:
                os.close(self._direct)
            self._file.close()

    def write(self, data: bytes | memoryview) -> int:
        """Append some bytes."""
        if len(data):
            self.append(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return len(data)

    def append(self, elements: torch.Tensor) -> None:
        """Append `(bytes,)` of uint8 on any device."""
        place = 0
        while place < len(elements):
            num_bytes = min(len(elements) - place, PIECE_BYTES - self._num_filled)
            room = self._piece[self._num_filled : self._num_filled + num_bytes]
            self._streams.copy_(room, elements[place : place + num_bytes])
            place += num_bytes
            self._num_filled += num_bytes
            self.num_bytes += num_bytes
            if self._num_filled == PIECE_BYTES:
                self._send()

    def flush(self) -> None:
        """Do nothing: `torch.save` asks after each tensor."""

    def record(self) -> FileRecord:
        """What was written in all, once the block has ended."""
        return FileRecord(self.num_bytes, "" if self._digest is None else self._digest.hexdigest())

    def _finish(self) -> None:
        if self._num_filled:
            self._send()
        while self._copied:
            self._settle()
        while self._writing:
            self._writing.popleft().result()
        os.fsync(self._file.fileno())

    def _send(self) -> None:
        """Hand a filled piece on, and have an empty one."""
        start, marks = self.num_bytes - self._num_filled, self._streams.marks()
        self._copied.append(_Filled(self._piece, self._num_filled, start, marks))
        while len(self._copied) > (_AHEAD if marks else 0):
            self._settle()
        while self._writing and (self._writing[0].done() or not self._free):
            self._free.append(self._writing.popleft().result())
        self._piece, self._num_filled = self._free.pop(), 0

    def _settle(self) -> None:
        filled = self._copied.popleft()
        for mark in filled.marks:
            mark.synchronize()
        if self._digest is not None:
            self._digest.update(filled.piece[: filled.num_bytes].numpy().data)
        self._writing.append(self._writers.submit(filled))

    def _write(self, filled: _Filled) -> torch.Tensor:
        left, place = filled.piece[: filled.num_bytes], filled.start
        if self._direct is not None and filled.num_bytes == PIECE_BYTES:
            try:
                count = os.pwrite(self._direct, left.numpy().data, place)
                left, place = left[count:], place + count
            except OSError as error:
                if error.errno != errno.EINVAL:  # a file system may refuse as late as this
                    raise
        write_at(self._file.fileno(), place, left)
        if len(left) and filled.num_bytes == PIECE_BYTES:  # or all would wait for the end
            os.fsync(self._file.fileno())
        return filled.piece


def _open_past_cache(path: Path) -> int | None:
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:
        return None


class Written(NamedTuple):
    """Where each tensor lies in a file, as offset and length in bytes, and what the file holds in all."""

    places: list[tuple[int, int]]
    record: FileRecord


def write_tensors(
    path: Path, tensors: Iterable[torch.Tensor], *, digest: bool = True, streams: Streams | None = None
) -> Written:
    """Write tensors as DCP does, and wait until they are on disk.

    Args:
        path: A file that does not exist.
        tensors: Of any device; copied piece by piece. What is not contiguous is copied as a whole first.
        digest: Whether the record of the file has one.
        streams: They follow what made the tensors, which nobody changes; those of this thread, if not given.
    """
    live = [tensor.detach() if tensor.device.type in ("cpu", "cuda") else tensor.detach().cpu() for tensor in tensors]
    places = []
    own = Streams()
    pinned = any(tensor.is_cuda for tensor in live)
    with naming(path), PieceFile(path, streams or own, pinned=pinned, digest=digest) as file:
        for tensor in live:
            start = file.num_bytes
            _append(tensor, file, None if streams else own)
            places.append((start, file.num_bytes - start))
    return Written(places, file.record())


def write_safetensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    read: Callable[[Sequence[str]], Iterable[torch.Tensor]],
    *,
    digest: bool = True,
) -> FileRecord:
    """Write a safetensors file as other tools read it, and wait until it is on disk.

    Args:
        path: A file that does not exist.
        specs: Of the tensors, by name.
        read: Gives those of some names, on the CPU, one after another.
        digest: Whether the record of the file has one.

    Raises:
        CheckpointError: If safetensors files cannot hold a dtype.
    """
    header, order = header_of(specs)
    with naming(path), PieceFile(path, Streams(), pinned=False, digest=digest) as file:
        file.write(header)
        for tensor in read(order):
            file.append(as_bytes(tensor))
    return file.record()


def _append(tensor: torch.Tensor, file: PieceFile, streams: Streams | None) -> None:
    around = frame(tensor.shape, tensor.dtype)
    if around is None:
        whole = io.BytesIO()
        torch.save(tensor.cpu().clone(), whole)  # of a part of a storage, `torch.save` would write all
        file.write(whole.getbuffer())
        return
    elements = as_bytes(tensor)
    if streams is not None:
        streams.follow([elements])
    file.write(around.head)
    file.append(elements)
    file.write(around.tail)
