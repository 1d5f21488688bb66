"""Step 5, writing once and naming twice: an alias gets an entry in DCP's metadata that points to the canonical bytes.

So a plain `dcp.load` or `dcp_to_torch_save`, which knows nothing of ties, finds every name, at no extra byte.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult


class AliasWriter(FileSystemWriter):
    """DCP's writer of a local folder, flushing each file, with further names for what it writes.

    Args:
        path: The folder.
        aliases: For each further name, the one that is written, both with the prefix of their part of the state.
    """

    def __init__(self, path: Path, aliases: Mapping[str, str]) -> None:
        super().__init__(path, sync_files=True)
        self.aliases = aliases

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
