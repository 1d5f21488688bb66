"""Step 8, writing once and naming twice: each rank writes its share, and an alias points to the canonical bytes.

So a plain `dcp.load` or `dcp_to_torch_save`, which knows nothing of ties, finds every name, at no extra byte. A view
that is made of whole rows of its tensor is found like this too, as the tensor is cut there into chunks. Any other view,
such as a transposed one, is no box of the tensor's elements, and so it is in the manifest only.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from tiepolicy import TiePlan, View
from tiepolicy_dcp._files import Written
from tiepolicy_dcp._folder import METADATA, naming
from tiepolicy_dcp._ranks import is_first_rank, rank, through_first_rank

State = Mapping[str, Mapping[str, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A further name for a tensor that is written, or for some of its rows."""

    #: The name that is written.
    canonical: str
    #: First row, and one past the last; None for the whole tensor.
    rows: tuple[int, int] | None = None


def further_names(plan: TiePlan, state: State) -> dict[str, Entry]:
    """What else the tensors of a state can be called, with the prefixes of their parts.

    Args:
        plan: The model's plan.
        state: By part ("model", "optimizer") and name, as `ModelState` and `OptimizerState` give it.
    """
    model, optimizer = state.get("model", {}), state.get("optimizer", {})
    names: dict[str, Entry] = {}
    for group in plan.groups:
        if group.canonical in model:
            for alias in group.aliases:
                rows = None if alias.view is None else _rows(alias.view, model[group.canonical])
                if alias.view is None or rows is not None:
                    names[f"model.{alias.name}"] = Entry(canonical=f"model.{group.canonical}", rows=rows)
    for flat in optimizer:
        name, _, key = flat.removeprefix("state.").rpartition(".")
        for alias in plan.whole_aliases(name):
            if f"state.{alias.name}.{key}" not in optimizer:
                names[f"optimizer.state.{alias.name}.{key}"] = Entry(canonical=f"optimizer.{flat}")
    return names


def _rows(view: View, owner: torch.Tensor) -> tuple[int, int] | None:
    """First and end of the rows of a tensor that a view is made of; None if it is no block of whole rows."""
    shape = tuple(owner.shape)
    alike = len(shape) == len(view.shape) and shape[1:] == view.shape[1:]
    if isinstance(owner, DTensor) or not shape or 0 in view.shape or not alike:
        return None
    row = 1
    for size, step in zip(reversed(shape[1:]), reversed(view.stride[1:]), strict=True):
        if size != 1 and step != row:
            return None
        row *= size
    if view.offset % row or (view.shape[0] != 1 and view.stride[0] != row):
        return None
    return view.offset // row, view.offset // row + view.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one rank writes; what several ranks hold alike is written by one of them."""

    rank: int
    #: What else the tensors are called; on rank 0 those of all ranks.
    names: Mapping[str, Entry]
    planner: DefaultSavePlanner
    plan: SavePlan
    #: Of the whole checkpoint, on rank 0.
    metadata: Metadata | None

    def tensors(self) -> Iterator[torch.Tensor]:
        """The parts that this rank writes, in the order of the file; live, not copied."""
        for item in self.plan.items:
            tensor = self.planner.resolve_data(item)
            assert isinstance(tensor, torch.Tensor)  # nothing else is let into a state
            yield tensor.detach()

    def results(self, written: Written) -> list[WriteResult]:
        """What DCP's metadata needs to know of the file."""
        file = data_file(self.rank)
        return [
            WriteResult(item.index, length, _StorageInfo(file, start, length))
            for item, (start, length) in zip(self.plan.items, written.places, strict=True)
        ]


def data_file(of_rank: int) -> str:
    """The name of the file that a rank writes, as DCP calls it."""
    return f"__{of_rank}_0.distcp"


def divide(plan: TiePlan, state: State) -> Share:
    """Agree on who writes what. Called by all ranks; reads no tensor data.

    Args:
        plan: The model's plan.
        state: By part (model, optimizer) and name; sharded or replicated.
    """
    names = further_names(plan, state)
    planner = _RowPlanner(names)

    def local() -> tuple[SavePlan, dict[str, Entry]]:
        planner.set_up_planner(dict(state), is_coordinator=is_first_rank())
        return planner.create_local_plan(), names

    metadata: list[Metadata] = []
    of_all_ranks = dict(names)

    def of_all(found: list[tuple[SavePlan, dict[str, Entry]]]) -> list[SavePlan]:
        shares, of_checkpoint = planner.create_global_plan([plan for plan, _ in found])
        metadata.append(of_checkpoint)
        for _, theirs in found:
            of_all_ranks.update(theirs)
        return shares

    of_rank = planner.finish_plan(through_first_rank(local, of_all))
    of_checkpoint = metadata[0] if metadata else None
    return Share(rank=rank(), names=of_all_ranks, planner=planner, plan=of_rank, metadata=of_checkpoint)


class AliasWriter(FileSystemWriter):
    """DCP's writer of a folder's metadata, with further names for what was written.

    Args:
        path: The folder.
        names: The further names.
    """

    def __init__(self, path: Path, names: Mapping[str, Entry]) -> None:
        super().__init__(path, sync_files=True)
        self.names = names

    def storage_meta(self) -> StorageMeta | None:
        """Nothing: DCP's would be where the checkpoint lay before it was published, and a random number."""
        return None

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the metadata, with the records of each canonical tensor repeated under its further names."""
        written: dict[str, list[WriteResult]] = {}
        for result in (result for of_rank in results for result in of_rank):
            written.setdefault(result.index.fqn, []).append(result)
        further = []
        for name, entry in self.names.items():
            tensor = metadata.state_dict_metadata[entry.canonical]
            assert isinstance(tensor, TensorStorageMetadata)
            metadata.state_dict_metadata[name] = tensor if entry.rows is None else _block(tensor, entry.rows)
            if metadata.planner_data is not None:
                part, _, path = name.partition(".")
                metadata.planner_data[name] = (part, path)
            for result in written[entry.canonical]:
                index = _index_within(name, result.index, entry.rows)
                if index is not None:
                    further.append(replace(result, index=index))
        with naming(Path(self.path) / METADATA):
            super().finish(metadata, [*results, further])


class _RowPlanner(DefaultSavePlanner):
    """DCP's save planner, which cuts tensors into chunks where a further name for some of their rows begins or ends.

    Args:
        names: What `further_names` returned.
    """

    def __init__(self, names: Mapping[str, Entry]) -> None:
        super().__init__()
        self._cuts: dict[str, set[int]] = {}
        for entry in names.values():
            if entry.rows is not None:
                self._cuts.setdefault(entry.canonical, set()).update(entry.rows)

    def create_local_plan(self) -> SavePlan:
        """The plan of this rank, with the tensors cut."""
        plan = super().create_local_plan()
        self.plan = replace(plan, items=[part for item in plan.items for part in self._parts(item)])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The tensor to write, or the rows of it that an index means."""
        if index.fqn not in self._cuts or index.offset is None:
            return super().lookup_object(index)
        tensor = self.state_dict[index.fqn]
        first = index.offset[0]
        return tensor[first : min(cut for cut in (*self._cuts[index.fqn], len(tensor)) if cut > first)]

    def _parts(self, item: WriteItem) -> Iterable[WriteItem]:
        if item.index.fqn not in self._cuts or item.tensor_data is None:
            return [item]
        shape = item.tensor_data.size
        cuts = sorted({0, shape[0]} | self._cuts[item.index.fqn])
        parts = []
        for first, end in pairwise(cuts):
            chunk = ChunkStorageMetadata(
                offsets=torch.Size((first, *(0 for _ in shape[1:]))), sizes=torch.Size((end - first, *shape[1:]))
            )
            parts.append(
                WriteItem(
                    index=MetadataIndex(item.index.fqn, chunk.offsets),
                    type=WriteItemType.SHARD,
                    tensor_data=replace(item.tensor_data, chunk=chunk),
                )
            )
        return parts


def _block(tensor: TensorStorageMetadata, rows: tuple[int, int]) -> TensorStorageMetadata:
    """The metadata of some rows of a tensor as if they were one of their own."""
    first, end = rows
    chunks = [
        ChunkStorageMetadata(offsets=torch.Size((chunk.offsets[0] - first, *chunk.offsets[1:])), sizes=chunk.sizes)
        for chunk in tensor.chunks
        if first <= chunk.offsets[0] < end
    ]
    return TensorStorageMetadata(
        properties=tensor.properties, size=torch.Size((end - first, *tensor.size[1:])), chunks=chunks
    )


def _index_within(name: str, index: MetadataIndex, rows: tuple[int, int] | None) -> MetadataIndex | None:
    """What a chunk of a tensor is called under another name; None if it is no part of it."""
    if rows is None:
        return MetadataIndex(name, index.offset, index.index)
    first, end = rows
    if index.offset is None or not first <= index.offset[0] < end:
        return None
    # The hint at the position among the chunks would be that of the whole tensor.
    return MetadataIndex(name, torch.Size((index.offset[0] - first, *index.offset[1:])))
