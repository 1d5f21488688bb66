"""Step 7, reading without trust: DCP's files, with no code run and no file opened outside the checkpoint."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tiepolicy import TensorSpec
from tiepolicy.errors import CheckpointError
from tiepolicy.files import ChunkedTensor, read_sharded_metadata
from tiepolicy_dcp._archives import ArchiveReader
from tiepolicy_dcp._ranks import num_ranks, on_all_ranks, rank


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

    Nothing is changed on any rank before every rank has found what it wants.

    Args:
        stored: The checkpoint.
        targets: The stored name and the tensor to read it into, by a name for each; whole tensors only.

    Raises:
        CheckpointError: On every rank, if one rank could not read.
    """
    fill: list[Callable[[], None]] = []
    # DCP's own load would send every plan to one rank and back, where nothing is changed.
    on_all_ranks(lambda: fill.append(find_tensors(stored, targets)))
    on_all_ranks(fill[0])


def find_tensors(stored: StoredTensors, targets: Mapping[str, tuple[str, torch.Tensor]]) -> Callable[[], None]:
    """What reads stored tensors into live ones as `read_tensors` does, on this rank alone, once all were found."""
    metadata = stored.metadata({name: source for name, (source, _) in targets.items()})
    reader, planner = ArchiveReader(stored.folder), DefaultLoadPlanner(flatten_state_dict=False)
    with _naming(stored.folder):
        planner.set_up_planner({name: tensor for name, (_, tensor) in targets.items()}, metadata)
        reader.set_up_storage_reader(metadata, is_coordinator=False)
        reader.find(planner.create_local_plan(), metadata)

    def fill() -> None:
        with _naming(stored.folder):
            reader.fill_(planner)

    return fill


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # damaged bytes can raise anything
        cause = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
        raise CheckpointError(f"{folder} could not be read: {cause}{error}") from error


def _tensor_metadata(tensor: ChunkedTensor) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=tensor.spec.dtype),
        size=torch.Size(tensor.spec.shape),
        chunks=[
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
            for offsets, sizes in tensor.chunks
        ],
    )
