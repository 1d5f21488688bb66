"""Step 5, evidence: what the facts of two tensors prove about each other, the ground of every decision."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import NamedTuple

import torch

from tiepolicy._claims import Reason
from tiepolicy._facts import TensorFact, extent


class View(NamedTuple):
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
    return Reason.STORAGE_OVERLAP_PARTIAL if owner.region.meets(part.region) else Reason.STORAGE_DISJOINT


def layout(fact: TensorFact) -> Hashable:
    """What two tensors have in common exactly if they are the same elements in the same order.

    Where memory proves nothing, that is the identity of the object.
    """
    if fact.inner and all(part.inner or part.region.space is not None for part in fact.inner):
        within = tuple(layout(part) for part in fact.inner)
        return within, fact.shape, fact.stride, fact.dtype, fact.placement, described(fact.context)
    region = fact.region
    if region.space is None:
        return fact.object_id
    # The stride of a dimension of one element moves nowhere.
    steps = tuple(step if size != 1 else 0 for size, step in zip(fact.local_shape, fact.stride, strict=True))
    return region.space, region.start, fact.local_shape, steps, fact.shape, fact.dtype, fact.placement


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
    whole, inside = owner.region, part.region
    if whole.space is None or whole.space != inside.space or owner.dtype != part.dtype:
        return None
    if not owner.is_dense or owner.placement or part.placement:
        return None
    offset, rest = divmod(inside.start - whole.start, owner.dtype.itemsize)
    if rest or offset < 0 or inside.end > whole.end:
        return None
    return View(shape=part.local_shape, stride=part.stride, offset=offset)


def described(context: object) -> Hashable:
    """What a tensor subclass says of itself, to be compared without reading a tensor; else its own identity."""
    if dataclasses.is_dataclass(context) and not isinstance(context, type):
        return type(context), tuple(described(getattr(context, field.name)) for field in dataclasses.fields(context))
    if isinstance(context, Mapping):
        return frozenset((key, described(value)) for key, value in context.items())
    if isinstance(context, list | tuple):
        return type(context), tuple(map(described, context))
    try:
        hash(context)
    except TypeError:
        return id(context)
    return id(context) if isinstance(context, torch.Tensor) else context
