"""A training loop with tied embeddings that is stopped, resumed, and ends with the bits of one that was not.

python examples/dcp_loop.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.distributed import checkpoint as dcp

import tiepolicy
import tiepolicy_dcp


class Model(nn.Module):
    """Its head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(2000, 64)
        self.block = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64))
        self.head = nn.Linear(64, 2000, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits `(B, L, V)` of token ids `(B, L)`."""
        return self.head(self.block(self.embed(ids)))


def train(root: Path, *, num_steps: int) -> Model:
    """Go on from the newest checkpoint under `root`, if there is one."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with tiepolicy_dcp.CheckpointStore(root, keep_last=2) as store:
        done = 0
        if store.names():
            restored = store.load("LATEST", model=model, optimizer=optimizer)
            done = restored.extra["step"]
            print(f"resumed after step {done}")
        for step in range(done, num_steps):
            ids = torch.randint(0, 2000, (4, 17), generator=torch.Generator().manual_seed(step))
            loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (step + 1) % 3 == 0:
                store.save(f"step_{step + 1}", model=model, optimizer=optimizer, extra={"step": step + 1})
    return model


def main() -> None:
    """Train 9 steps at once, and 4 and then the rest; compare."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        whole = train(root / "whole", num_steps=9)
        train(root / "cut", num_steps=4)
        resumed = train(root / "cut", num_steps=9)
        same = all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())
        print(
            f"the same weights to the bit: {same}; still one parameter: {resumed.head.weight is resumed.embed.weight}"
        )
        print(tiepolicy.plan(resumed))

        folder = tiepolicy_dcp.save(root / "ours", model=whole)
        dcp.save({"model": whole.state_dict()}, checkpoint_id=root / "plain")
        ours, plain = (
            sum(file.stat().st_size for file in (root / name).glob("*.distcp")) for name in ("ours", "plain")
        )
        print(f"weights on disk: {ours / plain:.0%} of what plain DCP writes")
        untied = {"model": {"head.weight": torch.zeros(2000, 64)}}
        dcp.load(untied, checkpoint_id=folder)
        print(f"plain DCP finds the other name: {torch.equal(untied['model']['head.weight'], whole.embed.weight)}")


if __name__ == "__main__":
    main()
