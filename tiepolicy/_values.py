"""Step 7, values: the only functions that touch the elements of tensors, to rebuild a view and to compare two."""

import functools
import hashlib

import torch
from torch.distributed.tensor import DTensor

from tiepolicy._evidence import View, described
from tiepolicy._memory import has_elements, inner_tensors, is_real, local_tensor
from tiepolicy.errors import TiePolicyError

#: Words of eight bytes that `fingerprint` reads at a time, and the factor between one such piece and the next.
_WORDS, _FACTOR = 1 << 16, 6364136223846793005


def view_of(owner: torch.Tensor, view: View | None) -> torch.Tensor:
    """The alias of `owner` that a `view` describes: `owner` itself if there is no view, else a view of its memory."""
    if view is None:
        return owner
    dense = owner.contiguous()
    return dense.as_strided(view.shape, view.stride, dense.storage_offset() + view.offset)


def first_difference(expected: torch.Tensor, actual: torch.Tensor) -> str | None:
    """Where tensors `expected` and `actual` first differ in shape, dtype or bits, as a phrase; None if they do not.

    Compares bits, so a NaN equals itself and 0.0 differs from -0.0. Shards of DTensors are compared where they lie.
    """
    if (expected.shape, expected.dtype) != (actual.shape, actual.dtype):
        return f"{tuple(expected.shape)} {expected.dtype} and {tuple(actual.shape)} {actual.dtype}"
    if isinstance(expected, DTensor) != isinstance(actual, DTensor):
        return "one is sharded and the other is not"
    return _first_difference_here(local_tensor(expected), local_tensor(actual))


def _first_difference_here(expected: torch.Tensor, actual: torch.Tensor) -> str | None:
    """Where what this process holds of two tensors first differs."""
    if expected.shape != actual.shape:
        return "they are sharded differently"
    (a_parts, a_context), (b_parts, b_context) = inner_tensors(expected), inner_tensors(actual)
    if a_parts or b_parts:
        if len(a_parts) != len(b_parts) or described(a_context) != described(b_context):
            return f"one is a {type(expected).__name__}, the other a {type(actual).__name__} of another kind"
        differences = (_first_difference_here(a, b) for a, b in zip(a_parts, b_parts, strict=True))
        return next((difference for difference in differences if difference is not None), None)
    if not (_is_plain(expected) and _is_plain(actual)):
        return f"they cannot be compared bit by bit ({expected.layout} {expected.dtype})"
    if expected.numel() == 0:
        return None
    if expected.is_meta or actual.is_meta:
        return "they have no data to compare (meta device)"
    a, b = _bytes(expected), _bytes(actual)
    unequal = (a != b.to(a.device)).view(expected.numel(), -1).any(dim=1)
    if not unequal.any():
        return None
    position = int(unequal.to(torch.uint8).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(position), expected.shape))
    values = " and ".join(_shown(tensor, index) for tensor in (expected, actual))
    return f"first at {index}, {values}, {int(unequal.sum())} of {expected.numel()} elements in all"


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized and is_real(tensor) and has_elements(tensor)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in row-major order as bytes, 1-dimensional; a view where the tensor is dense."""
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # A dense tensor of one element may have any stride, which the next view would not take.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


def _shown(tensor: torch.Tensor, index: tuple[int, ...]) -> str:
    element = tensor[index]
    try:
        return str(element.item())
    except (RuntimeError, NotImplementedError):  # types made for matrix products only, such as float4
        return f"the bytes {_bytes(element).tolist()}"


def content_digest(tensor: torch.Tensor) -> str:
    """The SHA-256 of the elements of `tensor` in row-major order, as hexadecimal; equal bits, equal digests.

    Reads the tensor. For a DTensor it gathers the whole of it first: called by all ranks of its mesh.

    Raises:
        TiePolicyError: If the tensor has no data, as on the meta device, or is more than its elements: sparse,
            quantized, or made of others.
    """
    return hashlib.sha256(_bytes(_whole(tensor).cpu()).numpy().data).hexdigest()


def fingerprint(tensor: torch.Tensor) -> int:
    """A sum over the elements, to notice within one process that any of them has changed.

    Reads the tensor as `content_digest` does, but where it lies and at the speed of memory. Eight bytes that change are
    always noticed, more of them but for one case in 2**64. No proof against somebody who looks for two equal sums.

    Raises:
        TiePolicyError: As `content_digest` says.
    """
    elements = _bytes(_whole(tensor))
    factors = torch.frombuffer(_factors(), dtype=torch.int64).to(elements.device)
    value = torch.full((), elements.numel(), device=elements.device)
    for piece in elements.split(8 * _WORDS):
        if piece.numel() % 8 or piece.storage_offset() % 8:
            piece = torch.cat((piece, piece.new_zeros(-piece.numel() % 8)))
        words = piece.view(torch.int64)
        value = value * _FACTOR + (words * factors[: len(words)]).sum()
    return int(value)


@functools.cache
def _factors() -> memoryview:
    """Odd, so that a product modulo 2**64 differs where a factor does; no tensor, as a mode of torch might wrap it."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**62), 2**62, (_WORDS,), generator=generator).mul_(2).add_(1).numpy().data


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """All elements, which a DTensor has to gather."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    if whole.is_meta:
        raise TiePolicyError(
            f"a tensor {tuple(whole.shape)} on the meta device has no data to make a digest of; materialise the model "
            "first"
        )
    if not _is_plain(whole):
        raise TiePolicyError(
            f"a {type(whole).__name__} {tuple(whole.shape)} ({whole.layout}, {whole.dtype}) has no elements to make a "
            "digest of; give it as it was before it was packed, or plan without digests"
        )
    return whole
