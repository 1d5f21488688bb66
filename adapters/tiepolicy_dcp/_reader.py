"""Step 5, reading without trust: DCP's files, with no code run and no file opened outside the checkpoint."""

import io
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from tiepolicy import ChunkedTensor, read_sharded_metadata
from tiepolicy_dcp.errors import UntrustedCheckpointError


class SafeReader(FileSystemReader):
    """DCP's reader of a local folder, for checkpoints of unknown origin."""

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """Read `.metadata`.

        Raises:
            CheckpointError: If there is none, or it is damaged.
            UntrustedCheckpointError: If it names anything but the parts of tensor metadata, or a file elsewhere.
        """
        folder = Path(str(self.path))
        found = read_metadata(folder)
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class TensorLoadPlanner(DefaultLoadPlanner):
    """DCP's load planner without the entries that it would unpickle."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:  # noqa: ARG002 - the name is DCP's
        """Refuse.

        Raises:
            UntrustedCheckpointError: Always; every value in a checkpoint of this library is a tensor or JSON.
        """
        raise UntrustedCheckpointError(f"{read_item.dest_index.fqn} is a pickled object, and pickles are never run")


def read_metadata(folder: Path) -> Metadata:
    """DCP's metadata of a folder, see `SafeReader.read_metadata`.

    The pickle becomes plain records first, and only these become DCP's classes.
    """
    found = read_sharded_metadata(folder)
    entries: dict[str, Any] = {name: _tensor_metadata(tensor) for name, tensor in found.tensors.items()}
    entries |= {name: BytesStorageMetadata() for name in found.objects}
    storage = {
        MetadataIndex(place.name, place.offsets, place.index): _StorageInfo(
            place.file, place.start, place.length, place.transforms or None
        )
        for place in found.places
    }
    return Metadata(state_dict_metadata=entries, storage_data=storage)


def _tensor_metadata(tensor: ChunkedTensor) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=tensor.spec.dtype),
        size=torch.Size(tensor.spec.shape),
        chunks=[
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
            for offsets, sizes in tensor.chunks
        ],
    )
