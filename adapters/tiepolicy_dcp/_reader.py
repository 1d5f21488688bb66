"""Step 4, reading without trust: DCP's files, with no code run and no file opened outside the checkpoint."""

import io
import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from tiepolicy_dcp._folder import METADATA
from tiepolicy_dcp.errors import CheckpointError, UntrustedCheckpointError

# All that DCP's metadata of tensors is made of. Its file is a pickle, and a pickle may name any function to call.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("torch.distributed.checkpoint.metadata", name): getattr(metadata, name)
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
}
_ALLOWED |= {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): torch.Size,
    # A name of a layout, looked up in a table of torch.
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,  # noqa: SLF001
}
# Where the checkpoint was written, as a path of that machine; Python 3.13 moved the classes.
_PATH_MODULES = frozenset({"pathlib", "pathlib._local"})


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in _PATH_MODULES and name in ("PosixPath", "WindowsPath"):
            return pathlib.PurePath
        raise UntrustedCheckpointError(f"its metadata asks for {module}.{name}, which no tensor needs")


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
    """DCP's metadata of a folder, see `SafeReader.read_metadata`."""
    path = folder / METADATA
    try:
        found = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is no checkpoint: it has no {METADATA} file. A checkpoint whose save was cut has none either; "
            "load an earlier one"
        ) from error
    except UntrustedCheckpointError as error:
        raise UntrustedCheckpointError(f"{path} is not trusted: {error}. Nothing was loaded") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}. Nothing was loaded") from error
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
        raise CheckpointError(f"{path} is no metadata of a checkpoint. Nothing was loaded")
    for entry in found.storage_data.values():
        _check_inside(folder, entry.relative_path)
    return found


def _check_inside(folder: Path, relative_path: str) -> None:
    path = folder / relative_path
    if Path(relative_path).name != relative_path or path.resolve().parent != folder.resolve():
        raise UntrustedCheckpointError(
            f"{folder / METADATA} points to {relative_path!r}, a file outside the checkpoint. Nothing was loaded"
        )
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: a part of the checkpoint was lost. Nothing was loaded")
