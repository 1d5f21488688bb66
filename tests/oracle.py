"""The slow, obvious way to decide which tensors must be stored: list the address of every element, compare all pairs.

Shares no code with the library. For tensors with data on the CPU, a few elements each.
"""

import itertools

import torch


def addresses(tensor: torch.Tensor) -> list[int] | None:
    """Where each element lies, in row-major order; None where the memory does not say what the elements are."""
    if tensor.device.type != "cpu" or tensor.numel() == 0 or tensor.is_conj() or tensor.is_neg():
        return None
    start, strides = tensor.data_ptr(), tensor.stride()
    return [
        start + tensor.element_size() * sum(i * step for i, step in zip(index, strides, strict=True))
        for index in itertools.product(*map(range, tensor.shape))
    ]


def rebuildable(owner: torch.Tensor, part: torch.Tensor) -> bool:
    """Whether `part` can be had from `owner`: it is the same, or made of elements of an owner without gaps."""
    if owner is part:
        return True
    theirs, mine = addresses(owner), addresses(part)
    if theirs is None or mine is None or owner.dtype != part.dtype:
        return False
    if (owner.shape, theirs) == (part.shape, mine):
        return True
    return owner.is_contiguous() and set(mine) <= set(theirs)


def stored(tensors: dict[str, torch.Tensor]) -> set[str]:
    """The names that a checkpoint must hold: all but those that another one, of equals the first, can give back."""
    return {
        name
        for name, tensor in tensors.items()
        if not any(
            rebuildable(other, tensor) and (not rebuildable(tensor, other) or other_name < name)
            for other_name, other in tensors.items()
            if other_name != name
        )
    }
