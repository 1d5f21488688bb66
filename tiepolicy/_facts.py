"""Step 1, what was seen: the facts about one named tensor, without any inference."""

from collections.abc import Iterator, Mapping, Sequence
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


@dataclass(frozen=True, slots=True, kw_only=True)
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

    def __str__(self) -> str:
        return f"{self.name} {self.shape}"
