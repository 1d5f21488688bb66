"""Step 9, values: the only functions that touch the elements of tensors, to rebuild a view and to compare two."""

import hashlib

import torch
from torch.distributed.tensor import DTensor

from tiepolicy._evidence import View
from tiepolicy._memory import local_tensor
from tiepolicy.errors import TiePolicyError


def view_of(owner: torch.Tensor, view: View | None) -> torch.Tensor:
    """The alias of `owner` that a view describes: `owner` itself if there is no view, else a view of its memory."""
    if view is None:
        return owner
    dense = owner.contiguous()
    return dense.as_strided(view.shape, view.stride, dense.storage_offset() + view.offset)


def first_difference(expected: torch.Tensor, actual: torch.Tensor) -> str | None:
    """Where two tensors first differ in shape, dtype or bits, as a phrase; None if they do not.

    Compares bits, so a NaN equals itself and 0.0 differs from -0.0. Shards of DTensors are compared where they lie.
    """
    if (expected.shape, expected.dtype) != (actual.shape, actual.dtype):
        return f"{tuple(expected.shape)} {expected.dtype} and {tuple(actual.shape)} {actual.dtype}"
    if isinstance(expected, DTensor) != isinstance(actual, DTensor):
        return "one is sharded and the other is not"
    a, b = (_elements(tensor) for tensor in (expected, actual))
    if a.shape != b.shape:
        return "they are sharded differently"
    if a.numel() == 0:
        return None
    if a.is_meta or b.is_meta:
        return "they have no data to compare (meta device)"
    unequal = (a.view(torch.uint8) != b.to(a.device).view(torch.uint8)).view(a.numel(), -1).any(dim=1)
    if not unequal.any():
        return None
    position = int(unequal.to(torch.uint8).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(position), local_tensor(expected).shape))
    count = int(unequal.sum())
    return f"first at {index}, {a[position].item()} and {b[position].item()}, {count} of {a.numel()} elements in all"


def _elements(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, as one row."""
    return local_tensor(tensor).detach().resolve_conj().resolve_neg().contiguous().view(-1)


def content_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of the elements in row-major order, as hexadecimal; equal bits, equal digests.

    Reads the tensor. For a DTensor it gathers the whole of it first: called by all ranks of its mesh.

    Raises:
        TiePolicyError: If the tensor has no data, as on the meta device.
    """
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    if whole.is_meta:
        raise TiePolicyError(
            f"a tensor {tuple(whole.shape)} on the meta device has no data to make a digest of; materialise the model "
            "first"
        )
    dense = whole.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(dense.numpy().data).hexdigest()
