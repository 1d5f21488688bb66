"""An accelerate script whose `save_state` and `load_state` keep the weights through `tiepolicy_dcp`.

python examples/accelerate_loop.py
"""

import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

import tiepolicy_dcp


class Model(nn.Module):
    """Its head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(500, 32)
        self.head = nn.Linear(32, 500, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits `(B, L, V)` of token ids `(B, L)`."""
        return self.head(self.embed(ids))


def keep_ties(accelerator: Accelerator) -> None:
    """Have the accelerator leave the weights to us; it goes on to save optimizers, schedulers and random states."""

    def save(models: list[nn.Module], weights: list[dict[str, torch.Tensor]], folder: str) -> None:
        for index, model in enumerate(models):
            tiepolicy_dcp.save(Path(folder) / f"model_{index}", model=model)
        weights.clear()

    def load(models: list[nn.Module], folder: str) -> None:
        if (Path(folder) / "model_0").exists():  # a state from before is left to the accelerator
            for index, model in enumerate(models):
                tiepolicy_dcp.load(Path(folder) / f"model_{index}", model=model)
            models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def main() -> None:
    """Train, save, spoil the weights, load."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    keep_ties(accelerator)
    model = Model()
    data = DataLoader(torch.randint(0, 500, (24, 9)), batch_size=8)
    model, optimizer, data = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2), data)
    for ids in data:
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    trained = accelerator.unwrap_model(model).embed.weight.detach().clone()
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        print("in the folder:", *sorted(path.name for path in Path(folder).iterdir()))
        nn.init.zeros_(model.embed.weight)
        accelerator.load_state(folder)
    print(f"loaded: {torch.equal(trained, model.head.weight)}, still tied: {model.head.weight is model.embed.weight}")


if __name__ == "__main__":
    main()
