"""Step 26, reading DCP's metadata: a pickle becomes plain records of tensors, and nothing that it names is run.

Format: torch/distributed/checkpoint/metadata.py and filesystem.py of torch 2.13.
"""

import contextlib
import gc
import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

import torch

from tiepolicy._facts import TensorSpec
from tiepolicy._paths import METADATA, member
from tiepolicy.errors import CheckpointError, UntrustedCheckpointError

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


def read_sharded_metadata(folder: Path) -> ShardedMetadata:
    """Read `.metadata` of a folder without running what it names, and check that all files it names are there.

    Raises:
        CheckpointError: If there is none, it is damaged, or a file is missing.
        UntrustedCheckpointError: If it names anything but the parts of tensor metadata, or a file elsewhere.
    """
    found = parse_sharded_metadata(folder)
    for file in sorted({place.file for place in found.places}):
        member(folder, file, named_by=METADATA)
    return found


def parse_sharded_metadata(folder: Path) -> ShardedMetadata:
    """As `read_sharded_metadata`, without looking for the files that it names."""
    path = folder / METADATA
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is no checkpoint: it has no {METADATA} file. A checkpoint whose save was cut has none either; "
            "load an earlier one"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        with _no_collection():
            found = _Unpickler(data).load()
            fields = _fields(found) if isinstance(found, _METADATA_RECORD) else {}
            known = _metadata(fields) if isinstance(fields.get("storage_data"), dict) else None
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


class _Record:
    """Keeps what a pickle says about an object, and does nothing with it."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Self:
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record


def _record(name: str) -> type:
    return type(name, (_Record,), {})


_METADATA_RECORD = _record("Metadata")
_TENSOR_RECORD = _record("TensorStorageMetadata")
_OBJECT_RECORD = _record("BytesStorageMetadata")
_PATH_RECORD = _record("Path")
_DCP = "torch.distributed.checkpoint"

# All that DCP's metadata of tensors is made of. Its file is a pickle, and a pickle may name any function to call.
_ALLOWED: dict[tuple[str, str], type] = {
    (f"{_DCP}.metadata", "Metadata"): _METADATA_RECORD,
    (f"{_DCP}.metadata", "TensorStorageMetadata"): _TENSOR_RECORD,
    (f"{_DCP}.metadata", "BytesStorageMetadata"): _OBJECT_RECORD,
    (f"{_DCP}.metadata", "ChunkStorageMetadata"): _record("ChunkStorageMetadata"),
    (f"{_DCP}.metadata", "MetadataIndex"): _record("MetadataIndex"),
    (f"{_DCP}.metadata", "StorageMeta"): _record("StorageMeta"),
    (f"{_DCP}.metadata", "TensorProperties"): _record("TensorProperties"),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"): _record("_MEM_FORMAT_ENCODING"),
    (f"{_DCP}.filesystem", "_StorageInfo"): _record("_StorageInfo"),
    ("torch", "Size"): tuple,
    # A layout by its name.
    ("torch.serialization", "_get_layout"): _record("_get_layout"),
    # Where the checkpoint was written, as a path of that machine; Python 3.13 moved the classes.
    ("pathlib", "PosixPath"): _PATH_RECORD,
    ("pathlib", "WindowsPath"): _PATH_RECORD,
    ("pathlib._local", "PosixPath"): _PATH_RECORD,
    ("pathlib._local", "WindowsPath"): _PATH_RECORD,
}


# What a pickle is written with that these need: numbers, strings, tuples, lists, dicts, and records of them.
_OPCODES = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET "
    "NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT GLOBAL STACK_GLOBAL REDUCE NEWOBJ"
)


def _refuse(_unpickler: object) -> NoReturn:
    raise UntrustedCheckpointError("its metadata uses a part of pickle that no tensor needs")


class _Unpickler(pickle._Unpickler):  # noqa: SLF001 - the one in C has no table of opcodes to take from
    """Python's own, without most opcodes and without names of anything but records.

    The one in C takes a third of the time, but allocates whatever a file of few bytes asks it to: 64 GB for one PUT.
    """

    append: Callable[[Any], None]
    stack: list[Any]
    metastack: list[list[Any]]
    memo: dict[int, Any]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]
    proto: int
    pop_mark: Callable[[], list[Any]]

    def __init__(self, data: bytes) -> None:
        file = io.BytesIO(data)
        super().__init__(file)
        # Python's own reads through frames, which are of no use in memory and take most of its time.
        self.read, self.readline = file.read, file.readline

    def load(self) -> Any:
        """Run the opcodes; the value that the last one leaves."""
        self.metastack, self.stack, self.proto = [], [], 0
        self.append = self.stack.append
        read, dispatch = self.read, self.dispatch
        while key := read(1):
            if key == pickle.STOP:
                return self.stack.pop()
            dispatch[key[0]](self)
        raise EOFError("it ends before its end")

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict.fromkeys(range(256), _refuse) | {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]  # noqa: SLF001 - as above
        for name in _OPCODES.split()
    }

    def find_class(self, module: str, name: str) -> Any:
        """A record, a dtype, or an error."""
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        # Not `getattr`, which would import what torch loads on demand.
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        raise UntrustedCheckpointError(f"its metadata asks for {module}.{name}, which no tensor needs")

    def skip_frame(self) -> None:
        """FRAME, which says how much could be read ahead."""
        self.read(8)

    def set_items(self) -> None:
        """SETITEMS, for keys whose hash takes no time: that of nested tuples can take forever."""
        items = self.pop_mark()
        self._set(items[::2], items[1::2])

    def set_item(self) -> None:
        """SETITEM, likewise."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key], [value])

    def _set(self, keys: Sequence[Any], values: Sequence[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or not all(isinstance(key, str | _Record) for key in keys):
            raise TypeError("an entry that has no string or record for a key")
        target.update(zip(keys, values, strict=True))

    def build(self) -> None:
        """BUILD, for records only."""
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Record):
            raise UntrustedCheckpointError(f"its metadata changes a {type(self.stack[-1]).__name__}")
        self.stack[-1].state = state

    dispatch |= {
        pickle.FRAME[0]: skip_frame,
        pickle.SETITEMS[0]: set_items,
        pickle.SETITEM[0]: set_item,
        pickle.BUILD[0]: build,
    }


def _metadata(fields: dict[str, Any]) -> ShardedMetadata:
    tensors: dict[str, ChunkedTensor] = {}
    objects: list[str] = []
    for name, entry in fields["state_dict_metadata"].items():
        if not isinstance(name, str):
            raise TypeError("a name that is no string")
        if isinstance(entry, _OBJECT_RECORD):
            objects.append(name)
        else:
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
    if not isinstance(record, _Record) or not isinstance(record.state, dict):
        raise TypeError(f"{type(record).__name__} stands where a record is expected")
    return record.state


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(type(value) is int and 0 <= value < _MAX_SIZE for value in values):
        raise ValueError("sizes that are no numbers of this machine")
    return values
