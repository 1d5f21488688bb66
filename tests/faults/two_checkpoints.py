"""Two checkpoints of one run, sharded over the processes: `torchrun two_checkpoints.py ROOT`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from models import TiedPair, train_steps
from tiepolicy_dcp import CheckpointStore
from torchrun import process_group


def write(root: Path, model: nn.Module) -> None:
    """Train a step, save, train another one, save."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with CheckpointStore(root) as store:
        for step in (1, 2):
            train_steps(model, optimizer, num_steps=1, seed=step)
            extra = {"step": step, "rng": torch.arange(4) + step}
            store.save(f"step-{step}", model=model, optimizer=optimizer, extra=extra, consolidated=True)


if __name__ == "__main__":
    with process_group():
        torch.manual_seed(0)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        write(Path(sys.argv[1]), fully_shard(TiedPair(vocab_size=13), mesh=mesh))
