"""Step 2, memory: where tensors lie, and which of them meet there.

This is the only reader of torch storages and of DTensors. It reads addresses, never elements.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Types whose attributes are those of torch itself: no subclass has a word in what `data_ptr` says.
_PLAIN = frozenset({torch.Tensor, nn.Parameter})
# What a class inherits that has no dispatch of its own; torch's annotations do not know the attribute.
_NO_DISPATCH: object = getattr(torch.Tensor, "__torch_dispatch__", None)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The memory this process holds of a tensor: the local shard of a DTensor, the tensor itself otherwise."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            local: torch.Tensor = tensor.to_local()
        return local
    return tensor


def are_plain(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no tensor is of a class of its own."""
    return _PLAIN.issuperset(map(type, tensors))


def placement(tensor: torch.Tensor) -> str:
    """Mesh and placements of a DTensor as text, empty for any other tensor."""
    if not isinstance(tensor, DTensor):
        return ""
    return f"{tensor.device_mesh.device_type}{tuple(tensor.device_mesh.shape)} {tuple(tensor.placements)}"


def inner_tensors(local: torch.Tensor) -> tuple[list[torch.Tensor], object]:
    """The tensors inside a tensor subclass and what it says beside them; nothing for all others."""
    if type(local) in _PLAIN or isinstance(local, DTensor) or not is_traceable_wrapper_subclass(local):
        return [], None
    names, context = local.__tensor_flatten__()
    return [getattr(local, name) for name in names], (type(local), context)


def whereabouts(local: torch.Tensor) -> tuple[int | None, int | None]:
    """Identity of the storage object, and address of the first element; None where one of them proves nothing.

    The storage object is told from others by its own address. Unlike a data pointer, that also tells meta and fake
    storages apart, which all point to 0.
    """
    if not _is_what_its_storage_says(local):
        return None, None
    try:
        storage = int(local.untyped_storage()._cdata)  # noqa: SLF001 - torch has no public identity of a storage
    except NotImplementedError:  # what torch.func wraps while it runs has none
        return None, None
    return storage, (local.data_ptr() or None) if is_real(local) else None


def sharing(tensors: list[torch.Tensor]) -> list[list[int]]:
    """The sets of two or more tensors that may be one, by position: their byte ranges meet, or they are one object.

    Tensors of different devices may come together by chance; that is for the caller to see. Sorted by address, a
    tensor meets an earlier one exactly if it starts before the farthest end so far; so one pass is enough.
    """
    starts, lengths = _regions(tensors)
    sets: list[list[int]] = []
    met: list[int] | None = None
    first = end = 0
    rest: list[int] = []
    for position in sorted(range(len(tensors)), key=starts.__getitem__):
        start = starts[position]
        if start == 0:
            rest.append(position)
        elif start >= end:
            first, met, end = position, None, start + lengths[position]
        else:
            if met is None:
                met = [first]
                sets.append(met)
            met.append(position)
            end = max(end, start + lengths[position])
    return sets + _sharing_without_address([(position, tensors[position]) for position in rest])


def nested(tensors: list[torch.Tensor]) -> tuple[int, list[int]] | None:
    """Which of some tensors, the first that is dense, holds all the others; and where each begins in it, in elements.

    None if there is no such tensor, or if addresses do not say everything about one of them.
    """
    if len({(tensor.dtype, tensor.device) for tensor in tensors}) > 1 or not _are_what_their_storage_says(tensors):
        return None
    starts = [tensor.data_ptr() for tensor in tensors]
    ends = [start + _length(tensor) for start, tensor in zip(starts, tensors, strict=True)]
    first, last = min(starts), max(ends)
    reach_all = (position for position, ends_at in enumerate(ends) if starts[position] == first and ends_at == last)
    owner = next((position for position in reach_all if tensors[position].is_contiguous()), None)
    itemsize = tensors[0].itemsize
    if owner is None or first == 0 or any((start - first) % itemsize for start in starts):
        return None
    return owner, [(start - first) // itemsize for start in starts]


def _sharing_without_address(tensors: list[tuple[int, torch.Tensor]]) -> list[list[int]]:
    """The sets of tensors that are one object or lie in one storage object."""
    positions: dict[int, list[int]] = {}
    for position, tensor in tensors:
        storage, _ = whereabouts(_leaf(tensor))
        # Objects and storages are both addresses of living objects, so the two cannot collide.
        positions.setdefault(id(tensor) if storage is None else storage, []).append(position)
    return [found for found in positions.values() if len(found) > 1]


def _regions(tensors: list[torch.Tensor]) -> tuple[list[int], list[int]]:
    """Address and length in bytes of every tensor; address 0 for one without memory on a real device."""
    if are_plain(tensors):
        try:
            starts = [tensor.data_ptr() for tensor in tensors]
            lengths = [tensor.nbytes if tensor.is_contiguous() else _length(tensor) for tensor in tensors]
        except (RuntimeError, NotImplementedError):  # a sparse tensor or the like has no address
            pass
        else:
            return starts, lengths
    leaves = [_leaf(tensor) for tensor in tensors]
    starts = [whereabouts(leaf)[1] or 0 for leaf in leaves]
    return starts, [_length(leaf) if start else 0 for leaf, start in zip(leaves, starts, strict=True)]


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that stands for another's memory: itself, its local shard, or its first inner tensor."""
    local = local_tensor(tensor)
    inner, _ = inner_tensors(local)
    return _leaf(inner[0]) if inner else local


def _length(tensor: torch.Tensor) -> int:
    """Bytes from the first to the last element of a strided tensor, both included."""
    if tensor.is_contiguous():
        return tensor.nbytes
    if tensor.numel() == 0:
        return 0
    steps = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.itemsize


def is_real(local: torch.Tensor) -> bool:
    """Whether nobody but torch answers for the memory; a fake tensor, for one, warns when asked for an address."""
    return type(local) in _PLAIN or getattr(type(local), "__torch_dispatch__", None) is _NO_DISPATCH


def has_elements(local: torch.Tensor) -> bool:
    """Whether the elements can be read: `torch.func` wraps tensors that have none, and FSDP1 frees memory."""
    try:
        return local.numel() == 0 or local.is_meta or local.data_ptr() != 0
    except (RuntimeError, NotImplementedError):
        return False


def _is_what_its_storage_says(local: torch.Tensor) -> bool:
    """Whether dtype, shape, stride and storage are all there is to know about the elements."""
    return (
        local.layout is torch.strided
        and local.numel() > 0
        and not (local.is_quantized or local.is_conj() or local.is_neg())
        and (type(local) in _PLAIN or not is_traceable_wrapper_subclass(local))
    )


def _are_what_their_storage_says(tensors: list[torch.Tensor]) -> bool:
    """Whether that holds for all of some tensors of one dtype, none of a class of its own."""
    return (
        are_plain(tensors)
        and {tensor.layout for tensor in tensors} == {torch.strided}
        and all(map(torch.Tensor.numel, tensors))
        and not (tensors[0].is_quantized or any(map(torch.Tensor.is_conj, tensors)))
        and not any(map(torch.Tensor.is_neg, tensors))
    )
