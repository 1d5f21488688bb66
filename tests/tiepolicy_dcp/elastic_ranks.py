"""What ranks do in `test_elastic.py`: `torchrun elastic_ranks.py save|load FOLDER...`, every case in one start.

Each rank holds the shards of FSDP2 or HSDP. What is saved and what is loaded has, bit for bit, the values that one
process computes from the same seed.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import tiepolicy_dcp
from models import TiedPair
from torchrun import process_group

CASES = [(tied, hybrid) for tied in (True, False) for hybrid in (False, True)]


class Uneven(TiedPair):
    """A vocabulary that no world size divides, and parameters with fewer rows than there are ranks."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__(tied=tied, vocab_size=8193)
        self.scale = nn.Parameter(torch.ones(1))
        self.table = nn.Embedding(2, 3)


def trained(*, tied: bool) -> tuple[Uneven, torch.optim.Optimizer]:
    """The model and its optimizer after two steps, in this process alone."""
    torch.manual_seed(3)
    model = Uneven(tied=tied)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return model, optimizer


def rows_of_ranks(*, hybrid: bool) -> DeviceMesh:
    """All ranks share the rows, or two halves of the ranks hold the same."""
    size = dist.get_world_size()
    if hybrid and size % 2 == 0:
        return init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh("cpu", (size,))


def save(folder: Path) -> None:
    for tied, hybrid in CASES:
        reference, reference_optimizer = trained(tied=tied)
        model, _ = trained(tied=tied)
        fully_shard(model, mesh=rows_of_ranks(hybrid=hybrid))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for parameter, whole in zip(model.parameters(), reference.parameters(), strict=True):
            optimizer.state[parameter] = {
                key: distribute_tensor(value, parameter.device_mesh, parameter.placements) if value.dim() else value
                for key, value in reference_optimizer.state[whole].items()
            }
        tiepolicy_dcp.save(folder / f"{tied}_{hybrid}", model=model, optimizer=optimizer)


def load(*folders: Path) -> None:
    for folder in folders:
        for tied, hybrid in CASES:
            for meta in (False, True):
                model = sharded(tied=tied, hybrid=hybrid, meta=meta)
                optimizer = torch.optim.AdamW(model.parameters(), lr=9.0)
                tiepolicy_dcp.load(folder / f"{tied}_{hybrid}", model=model, optimizer=optimizer)
                assert tied is (model.lm_head.weight is model.embed_tokens.weight)
                assert_as_trained(model, optimizer, tied=tied)
    if dist.get_rank() == 0:
        print("all equal")


def sharded(*, tied: bool, hybrid: bool, meta: bool) -> nn.Module:
    """A model with other values, or with no memory until it is in shards."""
    torch.manual_seed(4)
    with torch.device("meta" if meta else "cpu"):
        model = fully_shard(Uneven(tied=tied), mesh=rows_of_ranks(hybrid=hybrid))
    return model.to_empty(device="cpu") if meta else model


def assert_as_trained(model: nn.Module, optimizer: torch.optim.Optimizer, *, tied: bool) -> None:
    """Every parameter, and every tensor of its optimizer state, has the bits that one process computes."""
    reference, reference_optimizer = trained(tied=tied)
    assert 0.1 == optimizer.param_groups[0]["lr"]
    for (name, parameter), whole in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(whole, full(parameter)), name
        state = optimizer.state[parameter]
        for key, value in reference_optimizer.state[whole].items():
            assert torch.equal(value, full(state[key])), (name, key)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor put together from its shards."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    with process_group():
        globals()[sys.argv[1]](*map(Path, sys.argv[2:]))
