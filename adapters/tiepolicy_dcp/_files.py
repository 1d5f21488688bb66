"""Step 6, data files: tensors one after the other, each as `torch.save` writes it."""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tiepolicy.files import FileRecord
from tiepolicy_dcp._devices import Streams, as_bytes
from tiepolicy_dcp._folder import flush_file, naming
from tiepolicy_dcp._frames import frame
from tiepolicy_dcp._pieces import PieceFile
from tiepolicy_dcp.errors import CheckpointError


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


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file as other tools read it, and wait until it is on disk.

    Raises:
        CheckpointError: If it cannot be written.
    """
    with naming(path):
        path.touch(exist_ok=False)
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:  # which is none of the system's errors, whatever its cause
        raise CheckpointError(f"{path} could not be written: {error}. Nothing was kept") from error
    path.chmod(mode)  # safetensors 0.8 lets nobody but its writer read what it wrote, whatever the umask
    flush_file(path)


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
