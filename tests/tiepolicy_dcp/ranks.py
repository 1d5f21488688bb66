"""What several ranks do in `test_ranks.py`: `torchrun ranks.py STEP FOLDER`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import tiepolicy
import tiepolicy_dcp
from models import TiedPair, train_steps
from tiepolicy.errors import TiePolicyError
from torchrun import process_group


def sharded(*, seed: int) -> nn.Module:
    """A tied pair of 13 rows, which two ranks cannot share evenly, in one FSDP2 group."""
    torch.manual_seed(seed)
    model = TiedPair(vocab_size=13)
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def save_sharded(folder: Path) -> None:
    model = sharded(seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train_steps(model, optimizer, num_steps=2)
    tiepolicy_dcp.save(folder, model=model, optimizer=optimizer, extra={"step": 2}, consolidated=True)


def load_sharded(folder: Path) -> None:
    model = sharded(seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    restored = tiepolicy_dcp.load(folder, model=model, optimizer=optimizer)
    losses = train_steps(model, optimizer, num_steps=2, seed=1)
    tied = model.lm_head.weight is model.embed_tokens.weight
    if dist.get_rank() == 0:
        print("losses", losses, "step", restored.extra["step"], "tied", tied)


def load_sharded_with_plain_dcp(folder: Path) -> None:
    model = fully_shard(TiedPair(tied=False, vocab_size=13), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    names = ("embed_tokens.weight", "lm_head.weight")
    embed, head = (state["model"][name].full_tensor() for name in names)
    if dist.get_rank() == 0:
        print("equal", torch.equal(embed, head), "sum", embed.double().sum().item())


def save_with_other_plans(folder: Path) -> None:
    model = TiedPair(tied=dist.get_rank() == 0)
    tiepolicy_dcp.save(folder, model=model)


def save_what_rank_0_cannot_write(folder: Path) -> None:
    tiepolicy_dcp.save(folder, model=TiedPair(), extra={"bad": object()})


def plan_fails_on_rank_1(folder: Path) -> None:
    class Fails:
        @tiepolicy.hookimpl
        def tiepolicy_claims(self):
            if dist.get_rank() == 1:
                raise RuntimeError("rank 1 has no config")

    model = TiedPair()
    policy = tiepolicy.Policy(plugins=[Fails()])
    # The plan is made where all ranks wait for each other.
    original = tiepolicy.plan
    tiepolicy.plan = policy.plan
    try:
        tiepolicy_dcp.save(folder, model=model)
    finally:
        tiepolicy.plan = original


if __name__ == "__main__":
    with process_group():
        torch.manual_seed(0)
        try:
            globals()[sys.argv[1]](Path(sys.argv[2]))
        except TiePolicyError as error:
            print(f"rank {dist.get_rank()}: {type(error).__name__}: {error}\n", end="", flush=True)
