"""Step 7, evidence: what the facts of two tensors prove about each other, the ground of every decision."""

from collections.abc import Hashable
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


def layout(fact: TensorFact) -> Hashable:
    """What two tensors have in common exactly if they are the same elements in the same order.

    Where memory proves nothing, that is the identity of the object.
    """
    if fact.inner and all(part.inner or memory_space(part) is not None for part in fact.inner):
        within = tuple(layout(part) for part in fact.inner)
        return within, fact.shape, fact.stride, fact.dtype, fact.placement, _described(fact.context)
    space = memory_space(fact)
    if space is None:
        return fact.object_id
    # The stride of a dimension of one element moves nowhere.
    steps = tuple(step if size != 1 else 0 for size, step in zip(fact.local_shape, fact.stride, strict=True))
    return space, byte_span(fact)[0], fact.local_shape, steps, fact.shape, fact.dtype, fact.placement


def same_layout(a: TensorFact, b: TensorFact) -> bool:
    """Whether two tensors are the same elements of one memory in the same order."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.address is None or b.address is None or a.inner or b.inner or a.stride != b.stride:
        return layout(a) == layout(b)
    # What `layout` comes to for nearly every pair of tensors with memory, without building it.
    return (a.address, a.device, a.local_shape, a.placement) == (b.address, b.device, b.local_shape, b.placement)


def view_within(owner: TensorFact, part: TensorFact) -> View | None:
    """The view of `owner` that is `part`, or None where `part` is not made of the owner's elements only.

    Only a dense owner can be indexed by a flat offset, and a view of a DTensor's shard is no view of the whole.
    """
    if not _in_one_memory(owner, part) or owner.dtype != part.dtype or owner.placement or part.placement:
        return None
    offset, rest = divmod(byte_span(part)[0] - byte_span(owner)[0], owner.dtype.itemsize)
    view = View(shape=part.local_shape, stride=part.stride, offset=offset)
    num_elements = extent(owner.local_shape, owner.stride)
    if not is_dense(owner) or rest or view.offset < 0 or view.end > num_elements:
        return None
    return view


def overlap(a: TensorFact, b: TensorFact) -> bool:
    """Whether the byte ranges that two tensors span in one memory meet."""
    if not _in_one_memory(a, b):
        return False
    (a_start, a_end), (b_start, b_end) = byte_span(a), byte_span(b)
    return a_start < b_end and b_start < a_end


def memory_space(fact: TensorFact) -> Hashable | None:
    """Within what `byte_span` counts: a real device, or one storage without memory; None where nothing is known."""
    return fact.storage if fact.address is None else str(fact.device)


def byte_span(fact: TensorFact) -> tuple[int, int]:
    """Start and end of a tensor in its memory space, in bytes."""
    start = fact.offset * fact.dtype.itemsize if fact.address is None else fact.address
    return start, start + extent(fact.local_shape, fact.stride) * fact.dtype.itemsize


def extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last that a strided tensor touches, both included; 0 if it has none."""
    if 0 in shape:
        return 0
    last = 0
    for size, step in zip(shape, stride, strict=True):
        last += (size - 1) * step
    return last + 1


def is_dense(fact: TensorFact) -> bool:
    """Whether the tensor is contiguous in row-major order."""
    expected = 1
    for size, step in zip(reversed(fact.local_shape), reversed(fact.stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _in_one_memory(a: TensorFact, b: TensorFact) -> bool:
    space = memory_space(a)
    return space is not None and space == memory_space(b)


def _described(context: object) -> Hashable:
    """The context of a tensor subclass, if it can be compared safely; its own identity otherwise."""
    try:
        hash(context)
    except TypeError:
        return id(context)
    return context
