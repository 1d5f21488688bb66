"""FSDP2 with tied embeddings: made on the meta device, sharded, trained, saved, read into a sharded and a whole model.

torchrun --nproc-per-node=2 examples/fsdp2_loop.py
"""

import tempfile

import torch
import torch.distributed as dist
from torch import nn

import tiepolicy_dcp
import tiepolicy_fsdp2


class Block(nn.Module):
    """A residual layer."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(64, 64)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """States `(B, L, D)` to states."""
        return states + torch.relu(self.map(states))


class Model(nn.Module):
    """Its head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(2000, 64)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(64, 2000, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits `(B, L, V)` of token ids `(B, L)`."""
        return self.head(self.blocks(self.embed(ids)))


def main() -> None:
    """Shard, train, save; load into another sharded model and into a whole one."""
    dist.init_process_group("gloo")
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    say = print if dist.get_rank() == 0 else lambda *_: None

    with torch.device("meta"):
        model, resumed = Model(), Model()
    for each in (model, resumed):
        tiepolicy_fsdp2.fully_shard(each, blocks=[Block, "embed", "head"], mesh=mesh)
        tiepolicy_fsdp2.materialize(each, "cpu", init=lambda module: module.reset_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    say(f"one sharded parameter under two names: {model.head.weight is model.embed.weight}")

    for step in range(3):
        ids = torch.randint(0, 2000, (4, 17), generator=torch.Generator().manual_seed(step + 100 * dist.get_rank()))
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tiepolicy_fsdp2.verify(model, step="training", optimizer=optimizer)

    with tempfile.TemporaryDirectory() as temporary:
        shared = [temporary]
        dist.broadcast_object_list(shared)
        folder = tiepolicy_dcp.save(f"{shared[0]}/step_3", model=model, optimizer=optimizer, extra={"step": 3})
        whole = Model()
        for each in (resumed, whole):
            restored = tiepolicy_dcp.load(folder, model=each)
        dist.barrier()
    say(f"step {restored.extra['step']} in a whole model: tied {whole.head.weight is whole.embed.weight}")
    say(f"the same in a sharded model: tied {resumed.head.weight is resumed.embed.weight}")
    say(f"equal values: {torch.equal(resumed.embed.weight.full_tensor(), whole.embed.weight)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
