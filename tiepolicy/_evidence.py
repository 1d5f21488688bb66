"""Step 5, evidence: what the facts of two tensors prove about each other, the ground of every decision."""

from dataclasses import dataclass

from tiepolicy._facts import TensorFact
from tiepolicy._verdicts import Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """How a tensor lies inside a dense one, all in elements: `owner.flatten().as_strided(shape, stride, offset)`."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    #: From the first element of the owner.
    offset: int

    @property
    def end(self) -> int:
        """One past the last element of the owner that the view touches."""
        return self.offset + extent(self.shape, self.stride)


def relate(owner: TensorFact, part: TensorFact) -> Reason:
    """What the facts say about `part` being rebuildable from `owner`.

    The result proves an alias, or is the strongest reason against one.
    """
    if owner.object_id == part.object_id:
        return Reason.SAME_OBJECT
    if _in_one_storage(owner, part):
        if same_layout(owner, part):
            return Reason.SAME_STORAGE
        if view_within(owner, part) is not None:
            return Reason.VIEW_OF
    if owner.shape != part.shape:
        return Reason.SHAPE_MISMATCH
    if owner.dtype != part.dtype:
        return Reason.DTYPE_MISMATCH
    if (owner.device, owner.placement) != (part.device, part.placement):
        return Reason.PLACEMENT_MISMATCH
    return Reason.STORAGE_OVERLAP_PARTIAL if overlap(owner, part) else Reason.STORAGE_DISJOINT


def same_layout(a: TensorFact, b: TensorFact) -> bool:
    """Whether two tensors of one storage are the same elements in the same order."""
    return (a.offset, a.local_shape, a.stride, a.shape, a.dtype, a.placement) == (
        b.offset,
        b.local_shape,
        b.stride,
        b.shape,
        b.dtype,
        b.placement,
    )


def view_within(owner: TensorFact, part: TensorFact) -> View | None:
    """The view of `owner` that is `part`, or None where `part` is not made of the owner's elements only.

    Only a dense owner can be indexed by a flat offset, and a view of a DTensor's shard is no view of the whole.
    """
    if not _in_one_storage(owner, part) or owner.dtype != part.dtype or owner.placement or part.placement:
        return None
    view = View(shape=part.local_shape, stride=part.stride, offset=part.offset - owner.offset)
    num_elements = extent(owner.local_shape, owner.stride)
    if not is_dense(owner) or view.offset < 0 or view.end > num_elements:
        return None
    return view


def overlap(a: TensorFact, b: TensorFact) -> bool:
    """Whether the byte ranges that two tensors span in one storage meet."""
    if not _in_one_storage(a, b):
        return False
    (a_start, a_end), (b_start, b_end) = byte_span(a), byte_span(b)
    return a_start < b_end and b_start < a_end


def byte_span(fact: TensorFact) -> tuple[int, int]:
    """Start and end of a tensor in its storage, in bytes."""
    start = fact.offset * fact.dtype.itemsize
    return start, start + extent(fact.local_shape, fact.stride) * fact.dtype.itemsize


def extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last that a strided tensor touches, both included; 0 if it has none."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def is_dense(fact: TensorFact) -> bool:
    """Whether the tensor is contiguous in row-major order."""
    expected = 1
    for size, step in zip(reversed(fact.local_shape), reversed(fact.stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _in_one_storage(a: TensorFact, b: TensorFact) -> bool:
    return a.storage is not None and a.storage == b.storage
