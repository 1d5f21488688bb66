"""Step 1, what was seen: the facts about one named tensor, without any inference."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFact:
    """What can be known about a named tensor without reading its data.

    Layout fields describe the memory that this process holds: for a DTensor the local shard, else the tensor itself.
    """

    #: Name in the module tree, without the prefixes that wrappers add.
    name: str
    kind: Kind
    #: Global shape; differs from `local_shape` for a DTensor only.
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    local_shape: tuple[int, ...]
    #: In elements.
    stride: tuple[int, ...]
    #: Of the first element from the start of the storage, in elements.
    offset: int
    #: Identity of the storage, or None where a storage proves nothing: no elements, or no storage at all.
    storage: int | None
    #: Identity of the tensor object.
    object_id: int
    #: Mesh and placements of a DTensor, empty for a plain tensor.
    placement: str

    @property
    def spec(self) -> TensorSpec:
        """Global shape and dtype."""
        return TensorSpec(self.shape, self.dtype)

    def __str__(self) -> str:
        return f"{self.name} {self.shape}"
