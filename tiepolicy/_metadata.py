"""Step 22, reading DCP's metadata: a pickle becomes plain records of tensors, and nothing that it names is run.

Format: torch/distributed/checkpoint/metadata.py and filesystem.py of torch 2.13.
"""

import contextlib
import gc
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from tiepolicy._facts import TensorSpec
from tiepolicy._paths import METADATA, member, read_bytes
from tiepolicy._pickles import Record, RecordUnpickler, record
from tiepolicy.errors import CheckpointError, UntrustedCheckpointError

#: The largest `.metadata` that is read, in bytes: a thousand tensors in ten thousand parts each.
MAX_METADATA_BYTES = 1 << 30
_MAX_DIMS = 64
_MAX_SIZE = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the bytes of one chunk of a tensor, or of one object, are."""

    name: str
    #: Of the chunk in the tensor; None for an object.
    offsets: tuple[int, ...] | None
    #: DCP's hint at the position of the chunk.
    index: int | None
    #: Relative to the folder.
    file: str
    #: First byte in the file, and how many.
    start: int
    length: int
    #: Names of what was done to the bytes, such as compression.
    transforms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkedTensor:
    """Shape and dtype of a stored tensor, and the offsets and sizes of the chunks it is stored in."""

    spec: TensorSpec
    chunks: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedMetadata:
    """What the `.metadata` of a folder of torch.distributed.checkpoint says."""

    tensors: Mapping[str, ChunkedTensor]
    #: Names of entries that are pickled objects. They are never read.
    objects: tuple[str, ...]
    places: tuple[Place, ...]


def read_sharded_metadata(folder: Path, *, files: slice = slice(None)) -> ShardedMetadata:
    """Read `.metadata` of a folder without running what it names, and check that the files it names are there.

    Args:
        folder: The checkpoint.
        files: Which of the files to look at, sorted by name; ranks that load together share the work.

    Returns:
        Its tensors, and where their bytes are.

    Raises:
        CheckpointError: If there is none, it is damaged, a file is missing or was cut, or a tensor is said to be larger
            than all its bytes in the files.
        UntrustedCheckpointError: If it names anything but the parts of tensor metadata, or a file elsewhere.
    """
    found = parse_sharded_metadata(folder)
    looked_at = sorted({place.file for place in found.places})[files]
    sizes = {file: member(folder, file, named_by=METADATA).stat().st_size for file in looked_at}
    room = dict.fromkeys(found.tensors, 0)
    for place in found.places:
        if place.start + place.length > sizes.get(place.file, math.inf):
            raise CheckpointError(
                f"{folder / place.file} was cut: {place.name} ends at byte {place.start + place.length}, the file has "
                f"{sizes[place.file]} bytes. Nothing was loaded",
                names=[place.name],
            )
        # What was compressed may be larger than its bytes.
        room[place.name] = _MAX_SIZE if place.transforms else room.get(place.name, 0) + place.length
    for name, tensor in found.tensors.items():
        if tensor.spec.nbytes > room[name]:
            raise CheckpointError(
                f"{folder / METADATA} is damaged: it says that {name} {tensor.spec.shape} has {tensor.spec.nbytes} "
                f"bytes, of which {room[name]} are in the files. Nothing was loaded",
                names=[name],
            )
    return found


def parse_sharded_metadata(folder: Path) -> ShardedMetadata:
    """As `read_sharded_metadata`, without looking for the files that it names."""
    path = folder / METADATA
    if not os.path.lexists(path):
        raise CheckpointError(
            f"{folder} is no checkpoint: it has no {METADATA} file. A checkpoint whose save was cut has none either; "
            "load an earlier one"
        )
    data = read_bytes(member(folder, METADATA), limit=MAX_METADATA_BYTES)
    try:
        with _no_collection():
            found = _Unpickler(data).load()
            fields = _fields(found) if isinstance(found, _METADATA_RECORD) else {}
            known = _metadata(fields, len(data)) if isinstance(fields.get("storage_data"), dict) else None
    except UntrustedCheckpointError as error:
        raise UntrustedCheckpointError(f"{path} is not trusted: {error}. Nothing was loaded") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}. Nothing was loaded") from error
    if known is None:
        raise CheckpointError(f"{path} is no metadata of a checkpoint. Nothing was loaded")
    return known


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without looks for cycles, which take half of the time where nothing but millions of objects is made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _as_sizes(values: object) -> tuple[Any, ...]:
    """A `torch.Size`. Never made of a list, which would copy it: one list, named again and again, fills any memory."""
    if type(values) is not tuple:
        raise TypeError("sizes that are no tuple")
    return values


_METADATA_RECORD = record("Metadata")
_OBJECT_RECORD = record("BytesStorageMetadata")
_PATH_RECORD = record("Path")
_DCP = "torch.distributed.checkpoint"


class _Unpickler(RecordUnpickler):
    """Reads all that DCP's metadata of tensors is made of. As a pickle its file may name any function to call."""

    names: ClassVar[Mapping[tuple[str, str], Any]] = {
        (f"{_DCP}.metadata", "Metadata"): _METADATA_RECORD,
        (f"{_DCP}.metadata", "BytesStorageMetadata"): _OBJECT_RECORD,
        **{
            (f"{_DCP}.metadata", name): record(name)
            for name in (
                *("TensorStorageMetadata", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
                "_MEM_FORMAT_ENCODING",
            )
        },
        (f"{_DCP}.filesystem", "_StorageInfo"): record("_StorageInfo"),
        ("torch", "Size"): _as_sizes,
        # A layout by its name.
        ("torch.serialization", "_get_layout"): record("_get_layout"),
        # Where the checkpoint was written, as a path of that machine; Python 3.13 moved the classes.
        **{
            (module, name): _PATH_RECORD
            for module in ("pathlib", "pathlib._local")
            for name in ("PosixPath", "WindowsPath")
        },
    }

    def find_class(self, module: str, name: str) -> Any:
        """A dtype, or what the base class knows."""
        # Not `getattr`, which would import what torch loads on demand.
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        return super().find_class(module, name)


def _metadata(fields: dict[str, Any], num_bytes: int) -> ShardedMetadata:
    tensors: dict[str, ChunkedTensor] = {}
    objects: list[str] = []
    num_chunks = 0
    for name, entry in fields["state_dict_metadata"].items():
        if not isinstance(name, str):
            raise TypeError("a name that is no string")
        if isinstance(entry, _OBJECT_RECORD):
            objects.append(name)
        else:
            num_chunks += len(_fields(entry)["chunks"])
            if num_chunks > num_bytes:  # one list, which many tensors share
                raise ValueError(f"it describes more than {num_bytes} chunks in {num_bytes} bytes")
            tensors[name] = _tensor(name, _fields(entry))
    places = tuple(_place(_fields(index), _fields(info)) for index, info in fields["storage_data"].items())
    return ShardedMetadata(tensors=tensors, objects=tuple(objects), places=places)


def _tensor(name: str, fields: dict[str, Any]) -> ChunkedTensor:
    dtype = fields["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} has no dtype")
    spec = TensorSpec(_sizes(fields["size"]), dtype)
    chunks = tuple((_sizes(_fields(c)["offsets"]), _sizes(_fields(c)["sizes"])) for c in fields["chunks"])
    if any(len(offsets) != len(spec.shape) or len(sizes) != len(spec.shape) for offsets, sizes in chunks):
        raise ValueError(f"{name} {spec.shape} has chunks of another number of dimensions")
    return ChunkedTensor(spec=spec, chunks=chunks)


def _place(index: dict[str, Any], info: dict[str, Any]) -> Place:
    name, file, hint, offset = index["fqn"], info["relative_path"], index.get("index"), index.get("offset")
    transforms = tuple(info.get("transform_descriptors") or ())
    if not all(isinstance(text, str) for text in (name, file, *transforms)):
        raise TypeError("the place of a tensor is not made of strings")
    start, length = _sizes((info["offset"], info["length"]))
    return Place(
        name=name,
        offsets=None if offset is None else _sizes(offset),
        index=None if hint is None else _sizes((hint,))[0],
        file=file,
        start=start,
        length=length,
        transforms=transforms,
    )


def _fields(record: Any) -> dict[str, Any]:
    if not isinstance(record, Record) or not isinstance(record.state, dict):
        raise TypeError(f"{type(record).__name__} stands where a record is expected")
    return record.state


def _sizes(values: Any) -> tuple[int, ...]:
    if (
        not isinstance(values, tuple)
        or len(values) > _MAX_DIMS
        or not all(type(value) is int and 0 <= value < _MAX_SIZE for value in values)
    ):
        raise ValueError("sizes that are no numbers of this machine")
    return values
