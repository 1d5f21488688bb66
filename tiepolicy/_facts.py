"""Step 1, what was seen: the facts about one named tensor, without any inference."""

import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

Kind = Literal["parameter", "buffer", "tensor"]


class TensorSpec(NamedTuple):
    """What a reader of a checkpoint must know to make room for a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the dense tensor in bytes."""
        num_elements = 1
        for size in self.shape:
            num_elements *= size
        return num_elements * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """The dtype as headers have it: `float32`."""
        return str(self.dtype).removeprefix("torch.")


class Specs(Mapping[str, TensorSpec]):
    """Global shape and dtype of every name, sorted by name.

    What it tells is fixed when it is made, and none of the tensors is kept; the sorting, and an object per name, wait
    until somebody asks. Most plans are asked about the tied names only.
    """

    def __init__(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> None:
        self._columns = (names, shapes, dtypes)
        self._rows: dict[str, TensorSpec] | None = None

    def __getitem__(self, name: str) -> TensorSpec:
        return self._sorted()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sorted())

    def __len__(self) -> int:
        return len(self._columns[0])

    def _sorted(self) -> dict[str, TensorSpec]:
        if self._rows is None:
            rows = sorted(zip(*self._columns, strict=True), key=lambda row: row[0])
            self._rows = {name: TensorSpec(tuple(shape), dtype) for name, shape, dtype in rows}
        return self._rows


class Region(NamedTuple):
    """The bytes that a tensor spans in the memory of this process."""

    #: Within what start and end count: a real device, or one storage without memory; None where nothing is known.
    space: Hashable | None
    start: int
    end: int

    def meets(self, other: "Region") -> bool:
        """Whether two tensors span common bytes."""
        return (
            self.space is not None and self.space == other.space and self.start < other.end and other.start < self.end
        )


@dataclass(frozen=True, kw_only=True)
class TensorFact:
    """What can be known about a named tensor without reading its data.

    Layout fields describe the memory that this process holds: for a DTensor the local shard, else the tensor itself.
    """

    #: Name in the module tree, without the prefixes that wrappers add. The tensors behind a parametrization keep the
    #: name they have in a state dict: `parametrizations.weight.original`.
    name: str
    kind: Kind
    #: Global shape; differs from `local_shape` for a DTensor only.
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    local_shape: tuple[int, ...]
    #: In elements; zeros for a tensor that is not strided.
    stride: tuple[int, ...]
    #: Of the first element from the start of the storage, in elements.
    offset: int
    #: Identity of the storage, or None where a storage proves nothing: no elements, no storage at all, or elements
    #: that are not what the storage says (sparse, quantized, lazily conjugated or negated).
    storage: int | None
    #: Address of the first element on a real device, in bytes; None where `storage` is None or has no memory (meta and
    #: fake tensors, storages that were freed). Two storages over one memory are told from their addresses.
    address: int | None
    #: Identity of the tensor object.
    object_id: int
    #: Mesh and placements of a DTensor, empty for a plain tensor.
    placement: str
    #: The tensors inside a tensor subclass (`__tensor_flatten__`), in its order; empty for all others.
    inner: tuple["TensorFact", ...] = ()
    #: What a tensor subclass says about itself beside its inner tensors.
    context: object = None

    @property
    def spec(self) -> TensorSpec:
        """Global shape and dtype."""
        return TensorSpec(self.shape, self.dtype)

    @functools.cached_property
    def extent(self) -> int:
        """Elements from the first to the last in memory, both included; 0 if there are none."""
        return extent(self.local_shape, self.stride)

    @functools.cached_property
    def region(self) -> Region:
        """Where the tensor lies."""
        itemsize = self.dtype.itemsize
        space: Hashable = self.storage if self.address is None else str(self.device)
        start = self.offset * itemsize if self.address is None else self.address
        return Region(space, start, start + self.extent * itemsize)

    @functools.cached_property
    def is_dense(self) -> bool:
        """Whether the tensor is contiguous in row-major order."""
        expected = 1
        for size, step in zip(reversed(self.local_shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return False
            expected *= size
        return True

    def __str__(self) -> str:
        return f"{self.name} {self.shape}"


def extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last that a strided tensor touches, both included; 0 if it has none."""
    if 0 in shape:
        return 0
    last = 0
    for size, step in zip(shape, stride, strict=True):
        last += (size - 1) * step
    return last + 1
