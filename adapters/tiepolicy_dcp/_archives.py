"""Step 8, archives: tensors that `torch.save` wrote are read straight to where they belong.

Format: a zip file of stored records, `data.pkl` and `data/0` among them (torch/serialization.py of torch 2.13).
`torch.load` reads into memory of its own, which is then copied. What is no plain contiguous tensor is left to it.
"""

import io
import math
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, NoReturn, cast

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from tiepolicy_dcp._devices import Section, as_bytes, fill_, read_
from tiepolicy_dcp._frames import STORAGES, contiguous_stride

#: What a record that is none, or no such tensor, makes of the steps of reading it.
_NO_TENSOR = (AttributeError, LookupError, TypeError, ValueError, EOFError, zipfile.BadZipFile, pickle.PickleError)
#: Signature to extra field, of which the lengths of the name and of the extra field are the last.
_LOCAL_HEADER = struct.Struct("<26xHH")


class StoredTensor(NamedTuple):
    """Where the elements of a contiguous tensor begin in a file, in bytes."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class ArchiveReader(FileSystemReader):
    """DCP's reader of a local folder, without a copy in between where that is possible."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors that the plan asks for."""
        left: list[ReadItem] = []
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            with (Path(str(self.path)) / name).open("rb", buffering=0) as file:
                for_devices: list[Section] = []
                for item in items:
                    stored = self._find(cast("BinaryIO", file), item)
                    if stored is None:
                        left.append(item)
                    else:
                        for_devices += _read(cast("BinaryIO", file), stored, item, planner)
                read_(for_devices)
        return super().read_data(LoadPlan(left, plan.storage_data, plan.planner_data), planner)

    def _find(self, file: BinaryIO, item: ReadItem) -> StoredTensor | None:
        info: _StorageInfo = self.storage_data[item.storage_index]
        if item.type is LoadItemType.BYTE_IO or info.transform_descriptors:
            return None
        return find_tensor(file, info.offset, info.length)


def find_tensor(file: BinaryIO, offset: int, length: int) -> StoredTensor | None:
    """Look at an archive that is a part of a file; None if it holds anything but a contiguous tensor of its own."""
    try:
        with zipfile.ZipFile(cast("IO[bytes]", _Part(file, offset, length))) as archive:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            data = records["data/0"]
            described = _Unpickler(io.BytesIO(archive.read(records["data.pkl"]))).load()
            order = archive.read(records["byteorder"]).decode()
        kind, first, shape, stride = described.storage[1], described.offset, described.shape, described.stride
        dtype = STORAGES[kind]
        num_bytes = math.prod(shape) * dtype.itemsize
    except _NO_TENSOR:
        return None
    plain = (order, first, stride, data.compress_type) == (
        sys.byteorder,
        0,
        contiguous_stride(shape),
        zipfile.ZIP_STORED,
    )
    if not plain or data.file_size != num_bytes:
        return None
    file.seek(offset + data.header_offset)
    start = data.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size)))
    return StoredTensor(offset + start, shape, dtype) if start + num_bytes <= length else None


def _read(file: BinaryIO, stored: StoredTensor, item: ReadItem, planner: LoadPlanner) -> list[Section]:
    """Read what an item asks for: whole rows of the stored tensor alone, else all of it.

    Returns:
        What is to be read into the memory of a GPU as it is, which is left to be done with others.
    """
    target = planner.resolve_tensor(item).detach()
    lengths, offsets = tuple(item.lengths), tuple(item.storage_offsets)
    ends = [start + size for start, size in zip(offsets, lengths, strict=True)]
    inside = len(ends) == len(stored.shape) and all(end <= size for end, size in zip(ends, stored.shape, strict=True))
    if not inside or tuple(target.shape) != lengths:
        raise ValueError(
            f"{item.dest_index.fqn} has a part of shape {stored.shape} in its file, which is not what the metadata says"
        )
    rows = lengths[1:] == stored.shape[1:]
    skipped = math.prod(stored.shape[1:]) * offsets[0] * stored.dtype.itemsize if rows and offsets else 0
    direct = rows and target.is_contiguous() and target.dtype == stored.dtype
    if direct and target.is_cuda:
        planner.commit_tensor(item, target)
        return [Section(file.fileno(), stored.start + skipped, as_bytes(target))]
    direct = direct and target.device.type == "cpu"
    room = target if direct else torch.empty(lengths if rows else stored.shape, dtype=stored.dtype)
    fill_(file.fileno(), stored.start + skipped, as_bytes(room))
    if not direct:
        for dim, (start, size) in enumerate(zip(offsets, lengths, strict=True) if not rows else ()):
            room = room.narrow(dim, start, size)
        target.copy_(room)
    planner.commit_tensor(item, target)
    return []


class _Tensor(NamedTuple):
    """What a pickle says of a tensor."""

    storage: tuple[str, str, str, str, int]
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _describe(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, shape, stride)


class _Unpickler(pickle.Unpickler):
    """Reads the description of one tensor; every name stands for something harmless of ours, or is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _describe
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in STORAGES:
            return name
        return _refuse(module, name)

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _refuse(module: str, name: str) -> NoReturn:
    raise pickle.UnpicklingError(f"{module}.{name}")


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
        self._place = place + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._place, 0)
        self._file.seek(self._offset + self._place)
        data = self._file.read(left if size < 0 else min(size, left))
        self._place += len(data)
        return data
