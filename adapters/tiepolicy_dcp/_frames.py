"""Step 4, frames: what `torch.save` writes before and after the bytes of a tensor, so that they can go by themselves.

Format: a zip file of stored records, one of them a pickle that describes the tensor (torch/serialization.py of torch
2.13; zip: APPNOTE 6.3.10 of PKWARE, sections 4.3 and 4.5.3). The elements' record has no checksum, as with
`torch.serialization.set_crc32_options(False)`; `torch.load` asks for none, and the file's digest stands for it.
"""

import functools
import io
import math
import pickle
import struct
import sys
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch._utils import _rebuild_tensor_v2

#: The storage classes that `torch.save` names, and what they hold. Dtypes without one have another format.
STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
_KINDS = {dtype: kind for kind, dtype in STORAGES.items()}
#: Signature, version needed, flags, method, time, date (1 January 1980), checksum, sizes, lengths of name and extra.
_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END_64 = struct.Struct("<IQHHIIQQQQ")
_LOCATOR = struct.Struct("<IIQI")
_END = struct.Struct("<IHHHHIIH")
#: Sizes with 64 bits, of which the fields for 32 say nothing.
_SIZES_64 = struct.Struct("<HHQQ")
_VERSION, _DATE, _UNSAID, _UNSAID_SHORT = 45, 1 << 5 | 1, 0xFFFFFFFF, 0xFFFF


class Frame(NamedTuple):
    """What a file has before and after the elements of a contiguous tensor."""

    head: bytes
    tail: bytes


@functools.lru_cache(maxsize=1024)
def frame(shape: tuple[int, ...], dtype: torch.dtype) -> Frame | None:
    """The frame of a tensor; None if `torch.save` writes such a dtype in another format."""
    if dtype not in _KINDS:
        return None
    records = {
        "data.pkl": _description(tuple(shape), _KINDS[dtype]),
        "byteorder": sys.byteorder.encode(),
        "version": b"3\n",
    }
    head, entries = b"", b""
    for name, content in records.items():
        entries += _entry(name, len(content), zlib.crc32(content), len(head))
        head += _local(name, len(content), zlib.crc32(content)) + content
    num_bytes = math.prod(shape) * dtype.itemsize
    entries += _entry("data/0", num_bytes, 0, len(head))
    head += _local("data/0", num_bytes, 0)
    return Frame(head, entries + _end(len(records) + 1, len(entries), len(head) + num_bytes))


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """The stride of a tensor whose elements lie in order of their indices."""
    stride = []
    step = 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


class _Storage(NamedTuple):
    kind: str
    num_elements: int


class _Described:
    """Stands for the tensor while its description is pickled."""

    def __init__(self, shape: tuple[int, ...], storage: _Storage) -> None:
        self.shape = shape
        self.storage = storage


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return "storage", getattr(torch, obj.kind), "0", "cpu", obj.num_elements
        return None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, _Described):
            # The name of this function is what the format says.
            return _rebuild_tensor_v2, (obj.storage, 0, obj.shape, contiguous_stride(obj.shape), False, OrderedDict())
        return NotImplemented


def _description(shape: tuple[int, ...], kind: str) -> bytes:
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump(_Described(shape, _Storage(kind, math.prod(shape))))
    return pickled.getvalue()


def _local(name: str, num_bytes: int, checksum: int) -> bytes:
    path = f"archive/{name}".encode()
    fields = (_VERSION, 0, 0, 0, _DATE, checksum, _UNSAID, _UNSAID, len(path), _SIZES_64.size)
    return _LOCAL.pack(0x04034B50, *fields) + path + _SIZES_64.pack(1, 16, num_bytes, num_bytes)


def _entry(name: str, num_bytes: int, checksum: int, place: int) -> bytes:
    path = f"archive/{name}".encode()
    fields = (_VERSION, _VERSION, 0, 0, 0, _DATE, checksum, _UNSAID, _UNSAID, len(path), _SIZES_64.size, 0, 0, 0, 0)
    return _CENTRAL.pack(0x02014B50, *fields, place) + path + _SIZES_64.pack(1, 16, num_bytes, num_bytes)


def _end(num_entries: int, num_bytes: int, place: int) -> bytes:
    counts = (num_entries, num_entries, num_bytes, place)
    return (
        _END_64.pack(0x06064B50, _END_64.size - 12, _VERSION, _VERSION, 0, 0, *counts)
        + _LOCATOR.pack(0x07064B50, 0, place + num_bytes, 1)
        + _END.pack(0x06054B50, 0, 0, _UNSAID_SHORT, _UNSAID_SHORT, _UNSAID, _UNSAID, 0)
    )
