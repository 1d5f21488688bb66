"""Hypothesis strategies for the tests: those that plugin authors get, and a few that only these tests need."""

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

from models import FlaggedPair
from tiepolicy.testing import FIELD_VOCAB_SIZES as FIELD_VOCAB_SIZES
from tiepolicy.testing import dtypes as dtypes
from tiepolicy.testing import nested_models as tied_modules
from tiepolicy.testing import small_sizes as small_sizes
from tiepolicy.testing import state_dicts as view_dicts
from tiepolicy.testing import vocab_sizes as vocab_sizes

__all__ = [
    "ALL_DTYPES",
    "FIELD_VOCAB_SIZES",
    "Damage",
    "blocked_modules",
    "changed_bytes",
    "damages",
    "dtypes",
    "flagged_pairs",
    "memory_dicts",
    "small_sizes",
    "tied_modules",
    "view_dicts",
    "vocab_sizes",
]


#: Every type that safetensors writes and this torch has; the last ones have no arithmetic.
ALL_DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2),
]


@st.composite
def memory_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Mappings of tensors that meet in memory in every way torch and NumPy allow, in any order of names.

    Slices, strides, other dtypes, lazy conjugation, empty ends, and storages made twice over one buffer.
    """
    tensors: list[torch.Tensor] = []
    for _ in range(draw(st.integers(1, 2))):
        buffer = np.frombuffer(draw(st.binary(min_size=96, max_size=96)), dtype=np.uint8).copy()
        for _ in range(draw(st.integers(1, 5))):
            first = draw(st.integers(0, 5)) * 8
            count = draw(st.integers(0, (96 - first) // 8)) * 8
            dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.int32, torch.uint8, torch.complex64]))
            row = torch.from_numpy(buffer[first : first + count]).view(dtype)
            tensors += draw(st.lists(st.sampled_from(_readings(row)), min_size=1, max_size=3))
    names = draw(st.permutations([f"layer{index}.weight" for index in range(len(tensors))]))
    return dict(zip(names, tensors, strict=True))


def _readings(row: torch.Tensor) -> list[torch.Tensor]:
    """A row of elements, read in other ways."""
    if row.numel() < 2:
        return [row, row, row.detach(), row.view(1, -1), row.conj()]
    table = row[: row.numel() // 2 * 2].view(2, -1)
    views = [table, table.t(), row[::2], row[1:], row[2:2], row[:1].expand(3), table[:, :1], table[:, 0].unsqueeze(1)]
    return [row, row, row.detach(), row.conj(), *views]


@st.composite
def changed_bytes(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """One of some files with a few pieces of it removed, repeated, or replaced by other bytes."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 8)))
        number = st.sampled_from([b"-1", b"1e999", b"NaN", b"[", b"{", b'"', b"9" * 20, b"null", b"\xff\xff\xff\x7f"])
        piece = draw(st.binary(max_size=8) | st.just(data[start:end] * 2) | number)
        data = data[:start] + piece + data[end:]
    return data


class Damage(NamedTuple):
    """What happens to a file of a checkpoint; the numbers are taken modulo what there is."""

    way: str
    file: int
    place: int
    bit: int


def damages() -> st.SearchStrategy[Damage]:
    """Every way in which a disk, a copy or a careless hand spoils one file, or exchanges it for another."""
    ways = st.sampled_from(["flip", "cut", "append", "delete", "older", "swap"])
    return st.builds(Damage, ways, st.integers(0, 99), st.integers(0, 2**20), st.integers(0, 7))


@st.composite
def blocked_modules(draw: st.DrawFn) -> tuple[nn.Module, list[str]]:
    """Trees of modules that share parameters and modules anywhere, and paths in them to be blocks."""
    paths = [""]
    modules = [nn.Module()]
    parameters: list[nn.Parameter] = []
    for index in range(draw(st.integers(1, 7))):
        parent = draw(st.integers(0, len(modules) - 1))
        # A module that was there before has several paths, and must not contain its parent.
        leaves = [other for other in modules[1:] if not list(other.children()) and other is not modules[parent]]
        module = draw(st.sampled_from(leaves)) if leaves and draw(st.integers(0, 3)) == 0 else nn.Module()
        setattr(modules[parent], f"m{index}", module)
        if module not in modules:
            modules.append(module)
            paths.append(f"{paths[parent]}.m{index}".removeprefix("."))
    for index in range(draw(st.integers(1, 6))):
        if not parameters or draw(st.booleans()):
            parameters.append(nn.Parameter(torch.zeros(2)))
        setattr(draw(st.sampled_from(modules)), f"p{index}", draw(st.sampled_from(parameters)))
    return modules[0], draw(st.lists(st.sampled_from(paths), unique=True))


@st.composite
def flagged_pairs(draw: st.DrawFn, *, sizes: st.SearchStrategy[int], device: str = "cpu") -> FlaggedPair:
    """An embedding and a head with any sizes, flag and, where the sizes allow it, any physical tie."""
    vocab_size, draft_vocab_size, hidden_size = draw(sizes), draw(sizes), draw(small_sizes())
    if draw(st.booleans()):
        draft_vocab_size = vocab_size
    tied = vocab_size == draft_vocab_size and draw(st.booleans())
    with torch.device(device):
        model = FlaggedPair(
            flag=draw(st.booleans()),
            vocab_size=vocab_size,
            draft_vocab_size=draft_vocab_size,
            hidden_size=hidden_size,
            tied=tied,
        )
    return model.to(draw(dtypes()))
