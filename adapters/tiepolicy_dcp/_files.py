"""Step 4, data files: tensors one after the other, hashed while they are written and flushed while they are hashed."""

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple, Self, cast

import torch

from tiepolicy_dcp._digests import Digest, FileRecord

#: How much may wait for the disk before a flush begins beside the writing.
_FLUSH_BYTES = 1 << 25


class Written(NamedTuple):
    """Where each tensor lies in a file, as offset and length in bytes, and what the file holds in all."""

    places: list[tuple[int, int]]
    record: FileRecord


def write_tensors(path: Path, tensors: Iterable[torch.Tensor]) -> Written:
    """Write tensors as DCP does, each as `torch.save` writes it, and wait until they are on disk.

    Args:
        path: A file that does not exist.
        tensors: Of any device. One that is a part of a larger storage, or not on the CPU, is copied while it is
            written.
    """
    places = []
    with path.open("xb") as file, _Sink(file) as sink:
        for tensor in tensors:
            start = sink.num_bytes
            _save(_alone(tensor.detach().cpu()), sink)
            places.append((start, sink.num_bytes - start))
    return Written(places, sink.record())


def _save(tensor: torch.Tensor, sink: "_Sink") -> None:
    try:
        torch.save(tensor, cast("IO[bytes]", sink))
    except RuntimeError as error:
        # torch speaks of its own surprise when a write fails, and not of the disk.
        raise sink.error or error from error


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy if `torch.save` would write more than it: the storage that it is a part of."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


class _Sink:
    """What `torch.save` writes to: a file that is hashed and flushed meanwhile."""

    def __init__(self, file: BinaryIO) -> None:
        self.num_bytes = 0
        self.error: OSError | None = None
        self._file = file
        self._digest = Digest()
        self._num_flushed = 0
        self._flush: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._flush is not None:
            self._flush.join()
        if error is None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def write(self, data: bytes | memoryview) -> int:
        """Take some bytes."""
        self._digest.update(data)
        try:
            num_bytes = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.num_bytes += num_bytes
        if self.num_bytes - self._num_flushed >= _FLUSH_BYTES and not (self._flush and self._flush.is_alive()):
            self._num_flushed = self.num_bytes
            # An error of the disk is found again by the last flush.
            self._flush = threading.Thread(target=os.fsync, args=(self._file.fileno(),), daemon=True)
            self._flush.start()
        return num_bytes

    def flush(self) -> None:
        """Do nothing: `torch.save` asks after each tensor."""

    def record(self) -> FileRecord:
        """What was written in all."""
        return FileRecord(self.num_bytes, self._digest.hexdigest())
