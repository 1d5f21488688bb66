"""Step 8, reading without trust: DCP's files, with no code run and no file opened outside the checkpoint."""

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from tiepolicy import TensorSpec
from tiepolicy.files import ChunkedTensor, read_sharded_metadata
from tiepolicy_dcp._archives import ArchiveReader
from tiepolicy_dcp._ranks import all_present, is_distributed, num_ranks, rank
from tiepolicy_dcp.errors import CheckpointError, UntrustedCheckpointError


class StoredTensors:
    """What lies in a folder of DCP, by its metadata, which is read once. Made by all ranks: each looks at some files.

    Args:
        folder: The checkpoint.

    Raises:
        CheckpointError: If it has no metadata, or it is damaged.
        UntrustedCheckpointError: If it names anything but the parts of tensor metadata, or a file elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found = read_sharded_metadata(folder, files=slice(rank(), None, num_ranks()))
        self._tensors = found.tensors
        #: Names of entries that are pickled objects, which are never read.
        self.objects = found.objects
        #: Names of the files that hold tensors.
        self.files = {place.file for place in found.places}
        self._places: dict[str, list[tuple[tuple[int, ...] | None, int | None, _StorageInfo]]] = {}
        for place in found.places:
            info = _StorageInfo(place.file, place.start, place.length, place.transforms or None)
            self._places.setdefault(place.name, []).append((place.offsets, place.index, info))

    def specs(self, prefix: str) -> dict[str, TensorSpec]:
        """Shape and dtype of the stored tensors of one part of the state, without its prefix."""
        return {
            name.removeprefix(prefix): tensor.spec for name, tensor in self._tensors.items() if name.startswith(prefix)
        }

    def same_bytes(self, one: str, other: str) -> bool:
        """Whether two stored names are one tensor in the files."""
        return one in self._places and self._places[one] == self._places.get(other)

    def metadata(self, sources: Mapping[str, str]) -> Metadata:
        """DCP's metadata of some tensors.

        Args:
            sources: For each name to read under, the one it is stored under; two may have the same.
        """
        return Metadata(
            state_dict_metadata={name: _tensor_metadata(self._tensors[source]) for name, source in sources.items()},
            storage_data={
                MetadataIndex(name, offsets, index): info
                for name, source in sources.items()
                for offsets, index, info in self._places.get(source, ())
            },
        )


def read_tensors(stored: StoredTensors, targets: Mapping[str, tuple[str, torch.Tensor]]) -> None:
    """Read stored tensors into live ones, in place. Called by all ranks, each with what it wants.

    Args:
        stored: The checkpoint.
        targets: The stored name and the tensor to read it into, by a name for each; whole tensors only.

    Raises:
        CheckpointError: On every rank, if one rank could not read.
    """
    sources = {name: source for name, (source, _) in targets.items()}
    state: dict[str, Any] = {name: tensor for name, (_, tensor) in targets.items()}
    reader, planner = _SafeReader(stored, sources), _TensorLoadPlanner()
    try:
        with warnings.catch_warnings(), all_present():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp_load(state, storage_reader=reader, planner=planner, no_dist=not is_distributed())
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{stored.folder} could not be read: {type(cause).__name__}: {cause}") from error


class _SafeReader(ArchiveReader):
    """DCP's reader of a local folder, for checkpoints of unknown origin."""

    def __init__(self, stored: StoredTensors, sources: Mapping[str, str]) -> None:
        super().__init__(stored.folder)
        self._found = stored.metadata(sources)

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """What was read of `.metadata` already."""
        self._found.storage_meta = StorageMeta(load_id=self.load_id)
        return self._found


class _TensorLoadPlanner(DefaultLoadPlanner):
    """DCP's load planner without the entries that it would unpickle."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:  # noqa: ARG002 - the name is DCP's
        """Refuse.

        Raises:
            UntrustedCheckpointError: Always; every value in a checkpoint of this library is a tensor or JSON.
        """
        raise UntrustedCheckpointError(f"{read_item.dest_index.fqn} is a pickled object, and pickles are never run")


def _tensor_metadata(tensor: ChunkedTensor) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=tensor.spec.dtype),
        size=torch.Size(tensor.spec.shape),
        chunks=[
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
            for offsets, sizes in tensor.chunks
        ],
    )
