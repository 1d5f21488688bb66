"""Step 6, writing once and naming twice: each rank writes its share, and an alias points to the canonical bytes.

So a plain `dcp.load` or `dcp_to_torch_save`, which knows nothing of ties, finds every name, at no extra byte.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from tiepolicy_dcp._files import Written
from tiepolicy_dcp._ranks import is_first_rank, rank, through_first_rank

State = Mapping[str, Mapping[str, torch.Tensor]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one rank writes; what several ranks hold alike is written by one of them."""

    rank: int
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


def divide(state: State) -> Share:
    """Agree on who writes what. Called by all ranks; reads no tensor data.

    Args:
        state: By part (model, optimizer) and name; sharded or replicated.
    """
    planner = DefaultSavePlanner()

    def local() -> SavePlan:
        planner.set_up_planner(dict(state), is_coordinator=is_first_rank())
        return planner.create_local_plan()

    metadata: list[Metadata] = []

    def of_all(plans: list[SavePlan]) -> list[SavePlan]:
        shares, of_checkpoint = planner.create_global_plan(plans)
        metadata.append(of_checkpoint)
        return shares

    plan = planner.finish_plan(through_first_rank(local, of_all))
    return Share(rank=rank(), planner=planner, plan=plan, metadata=metadata[0] if metadata else None)


class AliasWriter(FileSystemWriter):
    """DCP's writer of a folder's metadata, with further names for what was written.

    Args:
        path: The folder.
        aliases: For each further name, the one that is written, both with the prefix of their part of the state.
    """

    def __init__(self, path: Path, aliases: Mapping[str, str]) -> None:
        super().__init__(path, sync_files=True)
        self.aliases = aliases

    def storage_meta(self) -> StorageMeta | None:
        """Nothing: DCP's would be where the checkpoint lay before it was published, and a random number."""
        return None

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the metadata, with the records of each canonical tensor repeated under its aliases."""
        written: dict[str, list[WriteResult]] = {}
        for result in (result for of_rank in results for result in of_rank):
            written.setdefault(result.index.fqn, []).append(result)
        further = []
        for alias, canonical in self.aliases.items():
            metadata.state_dict_metadata[alias] = metadata.state_dict_metadata[canonical]
            if metadata.planner_data is not None:
                part, _, name = alias.partition(".")
                metadata.planner_data[alias] = (part, name)
            for result in written[canonical]:
                index = MetadataIndex(alias, result.index.offset, result.index.index)
                further.append(dataclasses.replace(result, index=index))
        super().finish(metadata, [*results, further])
