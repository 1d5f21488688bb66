"""The models that ranks shard and cut into stages, how they are trained, and how a rank reports what it saw.

What runs under gloo on the CPU runs under NCCL on GPUs.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import tiepolicy
from models import TiedPair
from torchrun import device_type, process_group

DEVICE = device_type()
ROWS = 13  # no number of ranks divides it
STEPS = 3
#: What DDP, torch.compile and activation checkpointing put into names.
WRAPPERS = re.compile(r"^module\.|_orig_mod\.|_checkpoint_wrapped_module\.")


class Layer(nn.Module):
    """A block with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.down = nn.Linear(4, 4)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + self.down(torch.tanh(self.up(states)))


class Tower(nn.Module):
    """An embedding, two blocks and a head, in float64; the head is tied, and so are the maps of the two blocks."""

    def __init__(self, *, rows: int = ROWS) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(rows, 4, dtype=torch.float64)
        self.layers = nn.ModuleDict({"0": Layer().double(), "1": Layer().double()})
        self.lm_head = nn.Linear(4, rows, bias=False, dtype=torch.float64)
        self.lm_head.weight = self.embed_tokens.weight
        self.layers["1"].up.weight = self.layers["0"].up.weight

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Runs what the stage of a pipeline has: ids in or hidden states in, hidden states or logits out."""
        if self.embed_tokens is not None:
            states = self.embed_tokens(states)
        for layer in self.layers.values():
            states = layer(states)
        return states if self.lm_head is None else self.lm_head(states)


def tower(**sizes) -> Tower:
    torch.manual_seed(3)
    return Tower(**sizes).to(DEVICE)


def pair(**options) -> TiedPair:
    torch.manual_seed(3)
    return TiedPair(vocab_size=ROWS, **options).double().to(DEVICE)


def mesh(*shape, names=None):
    return init_device_mesh(DEVICE, shape or (dist.get_world_size(),), mesh_dim_names=names)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, on the CPU, where what ranks have on their own GPUs can be compared."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def batch(step: int) -> torch.Tensor:
    ids = torch.randint(0, ROWS, (4 * dist.get_world_size(), 5), generator=torch.Generator().manual_seed(step))
    return ids.to(DEVICE)


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(1, 1).flatten())


def train(model, *, alone=False, split=True):
    """Steps of AdamW, each rank on its rows of the batch; the optimizer, and the gradients of the first step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    gradients = {}
    for step in range(STEPS):
        ids = batch(step)
        if split and not alone:
            ids = ids.chunk(dist.get_world_size())[dist.get_rank()]
        loss_of(model, ids).backward()
        if step == 0:
            gradients = {name: whole(parameter.grad).clone() for name, parameter in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, gradients


def compare(model, reference, *, split=True):
    """How far training a model on all ranks is from training the reference in one process."""
    optimizer, gradients = train(model, split=split)
    alone, expected_gradients = train(reference, alone=True)
    names = [WRAPPERS.sub("", name) for name, _ in model.named_parameters()]
    states = zip(optimizer.state.values(), alone.state.values(), strict=True)
    expected = dict(reference.named_parameters())
    return {
        "names": names == list(expected),
        "gradients": max(
            distance(gradients[name], expected_gradients[own]) for own, name in zip(names, gradients, strict=True)
        ),
        "weights": max(
            distance(whole(parameter), expected[own].detach())
            for own, (_, parameter) in zip(names, model.named_parameters(), strict=True)
        ),
        "states": max(distance(whole(mine[key]), theirs[key]) for mine, theirs in states for key in mine),
        "num_states": len(optimizer.state) == len(alone.state),
    }


def distance(a, b):
    return (whole(a) - whole(b)).abs().max().item()


def digests(model, optimizer):
    """The digests, by name, of every parameter and every tensor of its optimizer state."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{name} {key}": state for key, state in optimizer.state[parameter].items()}
    return {name: tiepolicy.content_digest(whole(tensor)) for name, tensor in tensors.items()}


def by_data():
    """A pair that is tied through `.data`: two parameters over one memory."""
    model = pair(tied=False)
    model.lm_head.weight = nn.Parameter(model.embed_tokens.weight.data)
    return model


def cuts():
    """Tensor parallelism over the vocabulary."""
    return {
        "embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }


def tied(model):
    return model.lm_head.weight is model.embed_tokens.weight


def num_parameters(model):
    return len(list(model.parameters()))


def message(step):
    try:
        step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def report(name, case, results_file):
    """Run a case and write down what the first rank saw, and whether all met the same error."""
    result = case()
    results = [result] * dist.get_world_size()
    dist.all_gather_object(results, result)
    if dist.get_rank() == 0:
        agreed = all(result.get("error") == results[0].get("error") for result in results)
        with results_file.open("a") as lines:
            lines.write(json.dumps({"case": name, "backend": dist.get_backend(), "agreed": agreed} | results[0]) + "\n")


def run(cases: Mapping[str, Callable[[], dict[str, object]]], chosen: list[str], results_file: Path) -> None:
    """Join the other ranks, run the chosen cases one after another, and leave."""
    with process_group():
        for name in chosen:
            report(name, cases[name], results_file)
