"""Step 6, archives: tensors that `torch.save` wrote are read straight to where they belong.

Format: a zip file of stored records, `data.pkl` and `data/0` among them (torch/serialization.py of torch 2.13).
`torch.load` reads into memory of its own, which is then copied. What is no plain contiguous tensor is left to it.
"""

import io
import math
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, ClassVar, NamedTuple, cast

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from tiepolicy.errors import CheckpointError
from tiepolicy.files import Record, RecordUnpickler, member, read_soon, record
from tiepolicy_dcp._devices import Section, as_bytes, fill_, read_
from tiepolicy_dcp._frames import STORAGES, contiguous_stride, frame

#: Types that `torch.save` names beside a storage without one.
_OTHER_DTYPES = frozenset(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))
#: What a record that is none, or no such tensor, makes of the steps of reading it.
_NO_TENSOR = (
    *(ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError, EOFError, RuntimeError),
    StopIteration,
    *(struct.error, zipfile.BadZipFile, pickle.PickleError),
)
#: Of one tensor takes some hundred bytes.
_MAX_PICKLE_BYTES = 1 << 16
#: What is looked at of either end of an archive, and from which length on each end is asked for by itself.
_END_BYTES, _LONG_BYTES = 1 << 10, 1 << 20
#: Signature to extra field, of which the lengths of the name and of the extra field are the last.
_LOCAL_HEADER = struct.Struct("<26xHH")


class StoredTensor(NamedTuple):
    """Where the elements of a contiguous tensor begin in a file, in bytes."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class ArchiveReader(FileSystemReader):
    """DCP's reader of a local folder, which finds first and reads then, without a copy in between where it can."""

    def find(self, plan: LoadPlan, metadata: Metadata) -> None:
        """Find what the plan asks for where and as the metadata says it is.

        Raises:
            CheckpointError: If something else is there.
        """
        self._tensors = metadata.state_dict_metadata
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        self._found = {name: self._find_all(name, items) for name, items in by_file.items()}

    def fill_(self, planner: LoadPlanner) -> None:
        """Read what was found into the tensors of the planner."""
        for name, pairs in self._found.items():
            with self._open(name) as file:
                sections: list[Section] = []
                for stored, item in pairs:
                    sections += [] if stored is None else _read(file, stored, item, planner)
                read_(sections)
        left = [item for pairs in self._found.values() for stored, item in pairs if stored is None]
        self.read_data(LoadPlan(left), planner).wait()

    def _find_all(self, name: str, items: Sequence[ReadItem]) -> list[tuple[StoredTensor | None, ReadItem]]:
        with self._open(name) as file:
            for info in (self.storage_data[item.storage_index] for item in items):
                if info.length >= _LONG_BYTES:  # one by one, the disk would be waited for twice for each
                    for place in (info.offset, info.offset + info.length - _END_BYTES):
                        read_soon(file.fileno(), place, _END_BYTES)
            return [(self._find(file, item), item) for item in items]

    def _open(self, name: str) -> BinaryIO:
        return cast("BinaryIO", member(Path(str(self.path)), name).open("rb", buffering=0))

    def _find(self, file: BinaryIO, item: ReadItem) -> StoredTensor | None:
        info: _StorageInfo = self.storage_data[item.storage_index]
        assert item.type is LoadItemType.TENSOR  # what else there may be would be unpickled
        if info.transform_descriptors:
            return None
        tensor, index = self._tensors[item.storage_index.fqn], item.storage_index.index
        assert isinstance(tensor, TensorStorageMetadata)
        assert index is not None  # DCP's planner says which chunk it is
        shape, dtype = tuple(tensor.chunks[index].sizes), tensor.properties.dtype
        stored = find_framed(file, info.offset, info.length, shape=shape, dtype=dtype)
        stored = stored or find_tensor(file, info.offset, info.length)
        if stored is None:
            check_archive(file, info.offset, info.length, name=item.dest_index.fqn)
        elif not _holds(stored, item):
            raise CheckpointError(
                f"{item.dest_index.fqn} has a part of shape {stored.shape} in its file, which is not what the metadata "
                "says"
            )
        return stored


def find_framed(
    file: BinaryIO, offset: int, length: int, *, shape: tuple[int, ...], dtype: torch.dtype
) -> StoredTensor | None:
    """Look at both ends of a part of a file; None if they are not those that this library writes for a tensor."""
    num_bytes = math.prod(shape) * dtype.itemsize
    around = frame(shape, dtype) if num_bytes < length else None
    if around is None or length != len(around.head) + num_bytes + len(around.tail):
        return None
    start = offset + len(around.head)
    for place, expected in ((offset, around.head), (start + num_bytes, around.tail)):
        file.seek(place)
        if file.read(len(expected)) != expected:
            return None
    return StoredTensor(start, shape, dtype)


def find_tensor(file: BinaryIO, offset: int, length: int) -> StoredTensor | None:
    """Look at an archive that is a part of a file; None if it holds anything but a contiguous tensor of its own."""
    try:
        with _archive(file, offset, length) as archive:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            data = records["data/0"]
            described = _description(archive)
            order = archive.read(records["byteorder"]).decode()
        storage, first, shape, stride = described.args[:4]
        dtype = STORAGES[storage[1]]
        num_bytes = math.prod(shape) * dtype.itemsize
        plain = (order, first, stride) == (sys.byteorder, 0, contiguous_stride(shape)) and isinstance(
            described, _TENSOR
        )
        if not plain or data.file_size != num_bytes:
            return None
        file.seek(offset + data.header_offset)
        start = data.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size)))
    except _NO_TENSOR:
        return None
    return StoredTensor(offset + start, shape, dtype) if start + num_bytes <= length else None


def check_archive(file: BinaryIO, offset: int, length: int, *, name: str) -> None:
    """Refuse what `torch.load` is not to be given: all but a tensor as `torch.save` writes it.

    Even of plain tensors alone, a pickle may name a key whose hash takes for ever, or a record that unpacks to more
    than any memory.

    Raises:
        CheckpointError: If it is something else.
    """
    try:
        with _archive(file, offset, length) as archive:
            described = _description(archive)
    except _NO_TENSOR as error:
        raise CheckpointError(
            f"the bytes of {name} are damaged, or no tensor: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(described, Record):
        raise CheckpointError(f"the bytes of {name} are a {type(described).__name__}, no tensor")


def _archive(file: BinaryIO, offset: int, length: int) -> zipfile.ZipFile:
    archive = zipfile.ZipFile(cast("IO[bytes]", _Part(file, offset, length)))
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > length:
            raise zipfile.BadZipFile(f"{info.filename} was compressed, or is larger than its file")
    return archive


def _description(archive: zipfile.ZipFile) -> Any:
    """What the pickle in an archive says, in records."""
    found = next(info for info in archive.infolist() if info.filename.partition("/")[2] == "data.pkl")
    if found.file_size > _MAX_PICKLE_BYTES:
        raise zipfile.BadZipFile(f"its data.pkl has {found.file_size} bytes")
    return _Unpickler(archive.read(found)).load()


def _holds(stored: StoredTensor, item: ReadItem) -> bool:
    ends = [start + size for start, size in zip(item.storage_offsets, item.lengths, strict=True)]
    return len(ends) == len(stored.shape) and all(end <= size for end, size in zip(ends, stored.shape, strict=True))


def _read(file: BinaryIO, stored: StoredTensor, item: ReadItem, planner: LoadPlanner) -> list[Section]:
    """Read what an item asks for: whole rows of the stored tensor alone, else all of it.

    Returns:
        What is to be read as it is, which is left to be done with others.
    """
    target = planner.resolve_tensor(item).detach()
    lengths, offsets = tuple(item.lengths), tuple(item.storage_offsets)
    assert tuple(target.shape) == lengths
    rows = lengths[1:] == stored.shape[1:]
    skipped = math.prod(stored.shape[1:]) * offsets[0] * stored.dtype.itemsize if rows and offsets else 0
    if rows and target.is_contiguous() and target.dtype == stored.dtype and target.device.type in ("cpu", "cuda"):
        planner.commit_tensor(item, target)
        return [Section(file.fileno(), stored.start + skipped, as_bytes(target))]
    room = torch.empty(lengths if rows else stored.shape, dtype=stored.dtype)
    fill_(file.fileno(), stored.start + skipped, as_bytes(room))
    for dim, (start, size) in enumerate(zip(offsets, lengths, strict=True) if not rows else ()):
        room = room.narrow(dim, start, size)
    target.copy_(room)
    planner.commit_tensor(item, target)
    return []


_TENSOR = record("tensor")
_OTHER_TENSOR = record("other tensor")


class _Unpickler(RecordUnpickler):
    """Reads the description of one tensor."""

    names: ClassVar[Mapping[tuple[str, str], Any]] = {
        ("torch._utils", "_rebuild_tensor_v2"): _TENSOR,
        ("collections", "OrderedDict"): record("OrderedDict"),
    }

    def find_class(self, module: str, name: str) -> Any:
        """A kind of storage or a dtype by its name, a record for what rebuilds tensors, or an error."""
        if module in ("torch", "torch.storage") and (name.endswith("Storage") or name in _OTHER_DTYPES):
            return name
        if module == "torch._utils" and name.startswith("_rebuild_") and name != "_rebuild_tensor_v2":
            return _OTHER_TENSOR
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        """What stands for a storage: its kind, key, device and number of elements."""
        return pid

    dispatch: ClassVar[dict[int, Callable[..., None]]] = RecordUnpickler.dispatch | {
        pickle.BINPERSID[0]: pickle._Unpickler.dispatch[pickle.BINPERSID[0]]  # noqa: SLF001 - as the base class
    }


class _Part(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        super().__init__()
        self._file, self._offset, self._length, self._place = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        place += {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        if place < 0:
            raise OSError("a place before the archive")
        self._place = place
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._place, 0)
        self._file.seek(self._offset + self._place)
        data = self._file.read(left if size < 0 else min(size, left))
        self._place += len(data)
        return data
