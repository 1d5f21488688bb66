"""Step 20, headers: what a safetensors file holds, checked against its size, without reading a tensor, and written.

Format: safetensors, README.md "Format" at 24b0b285: eight bytes of length, a JSON header, then the bytes of the tensors
without gaps.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tiepolicy._facts import TensorSpec
from tiepolicy._paths import MAX_JSON_BYTES, open_file, parse_json
from tiepolicy.errors import CheckpointError

#: Name in torch and size in bits of each dtype of the format; `safetensors` writes tensors of the last ones first.
DTYPES = {
    "BOOL": ("bool", 8),
    "F4": ("float4_e2m1fn_x2", 4),
    "F6_E2M3": ("float6_e2m3", 6),
    "F6_E3M2": ("float6_e3m2", 6),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "C64": ("complex64", 64),
    "F64": ("float64", 64),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
}
_METADATA_KEY = "__metadata__"
_LENGTH_BYTES = 8
_MAX_SIZE = 2**63


class Stored(NamedTuple):
    """What a checkpoint says about one tensor that it holds."""

    shape: tuple[int, ...]
    #: As torch names it.
    dtype: str
    nbytes: int
    #: File that holds it, relative to the checkpoint; several for a tensor in shards.
    files: tuple[str, ...]
    #: Byte of its safetensors file at which its elements begin; None in other files.
    start: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The header of one safetensors file."""

    #: In the order of their bytes in the file.
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]
    #: Of the whole file in bytes.
    size: int


def read_header(path: Path) -> Header:
    """Read and check the header of the safetensors file at `path`.

    Reads at most 100 MB and no tensor. What it accepts, `safetensors` accepts; it refuses more: a name twice.

    Returns:
        Its tensors, without their elements.

    Raises:
        CheckpointError: If the file cannot be read, is cut, or its header is damaged.
    """
    try:
        with open_file(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
                raise CheckpointError(
                    f"{path} is cut or no safetensors file: it has {size} bytes, and a header of {length} was announced"
                )
            if length > MAX_JSON_BYTES:
                raise CheckpointError(
                    f"{path} announces a header of {length} bytes, more than the {MAX_JSON_BYTES} that are read"
                )
            data = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if data[:1] != b"{":
        raise CheckpointError(f"{path} is no safetensors file: its header does not begin with an object")
    entries = parse_json(data, source=f"the header of {path}")
    metadata = entries.pop(_METADATA_KEY, None) or {}
    _check_metadata(path, metadata)
    spans = {name: _read_entry(path, name, entry) for name, entry in entries.items()}
    _check_spans(path, spans, size - _LENGTH_BYTES - length)
    ordered = sorted(spans.items(), key=lambda item: (item[1][:2], item[0]))
    first = _LENGTH_BYTES + length
    tensors = {name: stored._replace(start=first + start) for name, (start, _, stored) in ordered}
    return Header(tensors=tensors, metadata=metadata, size=size)


def header_of(specs: Mapping[str, TensorSpec]) -> tuple[bytes, list[str]]:
    """What a safetensors file begins with, as `safetensors` writes it, and the order of the tensors that follow.

    Args:
        specs: Of the tensors, by name.

    Raises:
        CheckpointError: If the format has no such dtype.
    """
    types = {torch_name: (-rank, name, bits) for rank, (name, (torch_name, bits)) in enumerate(DTYPES.items())}
    for name, spec in specs.items():
        if spec.dtype_name not in types:
            raise CheckpointError(f"{name} is of {spec.dtype_name}, which no safetensors file can hold: convert it")
    order = sorted(specs, key=lambda name: (types[specs[name].dtype_name], name))
    header: dict[str, Any] = {_METADATA_KEY: {"format": "pt"}}
    end = 0
    for name in order:
        spec, start = specs[name], end
        end += spec.nbytes
        _, dtype, bits = types[spec.dtype_name]
        shape = (*spec.shape[:-1], *(size * 8 * spec.dtype.itemsize // bits for size in spec.shape[-1:]))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, order


_Span = tuple[int, int, Stored]


def _read_entry(path: Path, name: str, entry: Any) -> _Span:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, name, "it does not consist of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _damaged(path, name, f"its dtype {dtype!r} is not known")
    if not _are_sizes(shape):
        raise _damaged(path, name, f"its shape {shape!r} is no list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, name, f"its data_offsets {offsets!r} are no start and end")
    torch_name, bits = DTYPES[dtype]
    for size in shape:
        bits *= size
        if bits >= _MAX_SIZE:
            raise _damaged(path, name, f"its shape {shape!r} is larger than any memory")
    if bits != 8 * (offsets[1] - offsets[0]):
        raise _damaged(path, name, f"{shape} of {dtype} are not the {offsets[1] - offsets[0]} bytes it takes")
    return offsets[0], offsets[1], Stored(tuple(shape), torch_name, bits // 8, (path.name,))


def _check_spans(path: Path, spans: Mapping[str, _Span], num_bytes: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    position, previous = 0, "the header"
    for name, (start, end, _) in sorted(spans.items(), key=lambda item: item[1][:2]):
        if end > num_bytes:
            raise _damaged(path, name, f"it ends at byte {end} of {num_bytes}: the file was cut")
        if start < position:
            raise _damaged(path, name, f"its bytes overlap those of {previous}")
        if start > position:
            raise _damaged(path, name, f"{start - position} bytes between {previous} and it belong to no tensor")
        position, previous = end, name
    if position != num_bytes:
        raise CheckpointError(f"{path} is damaged: its last {num_bytes - position} bytes belong to no tensor")


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path} is damaged: the {_METADATA_KEY} of its header is no object of strings")


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _MAX_SIZE for value in values)


def _damaged(path: Path, name: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged at {name}: {problem}", names=[name])
