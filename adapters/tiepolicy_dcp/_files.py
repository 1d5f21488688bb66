"""Step 4, data files: tensors one after the other, hashed while they are written and flushed while they are hashed."""

import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple, Self, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tiepolicy_dcp._digests import Digest, FileRecord
from tiepolicy_dcp._folder import flush_file, naming
from tiepolicy_dcp.errors import CheckpointError

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
    with naming(path), path.open("xb") as file, _Sink(file) as sink:
        for tensor in tensors:
            start = sink.num_bytes
            _save(_alone(tensor.detach().cpu()), sink)
            places.append((start, sink.num_bytes - start))
    return Written(places, sink.record())


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file as other tools read it, and wait until it is on disk.

    Raises:
        CheckpointError: If it cannot be written.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:  # which is none of the system's errors, whatever its cause
        raise CheckpointError(f"{path} could not be written: {error}. Nothing was kept") from error
    flush_file(path)


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
            self._wait_for_disk()
            if self.error is not None:
                raise self.error

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
            self._flush = threading.Thread(target=self._wait_for_disk, daemon=True)
            self._flush.start()
        return num_bytes

    def _wait_for_disk(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:  # Linux says it once: the next flush of this file would succeed
            self.error = error

    def flush(self) -> None:
        """Do nothing: `torch.save` asks after each tensor."""

    def record(self) -> FileRecord:
        """What was written in all."""
        return FileRecord(self.num_bytes, self._digest.hexdigest())
