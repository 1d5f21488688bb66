"""How each tool saves a model to a folder and loads it from there, for `bench_checkpoint.py`."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_model, save_model
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

import tiepolicy_dcp

Save = Callable[[Any, Path], object]
HEAD = "lm_head.weight"
#: What all are held against, and what is measured.
BASELINE, OURS = "dcp, alias popped", "tiepolicy_dcp"


def flushed(folder: Path) -> None:
    """Wait for the disk, for tools that do not."""
    for path in [folder] if folder.is_file() else folder.rglob("*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def popped(model: nn.Module) -> dict[str, Any]:
    """The state without the alias, as one writes it by hand."""
    state = get_model_state_dict(model)
    if model.config.tie_word_embeddings:
        del state[HEAD]
    return {"model": state}


def save_safetensors(model: nn.Module, folder: Path) -> None:
    """One file, aliases dropped."""
    folder.mkdir()
    save_model(model, str(folder / "model.safetensors"))
    flushed(folder)


def save_transformers(model: nn.Module, folder: Path) -> None:
    """The folder that `from_pretrained` reads."""
    model.save_pretrained(folder)
    flushed(folder)


def save_torch(model: nn.Module, folder: Path) -> None:
    """One file, aliases kept by storage."""
    folder.mkdir()
    torch.save(model.state_dict(), folder / "model.pt")
    flushed(folder)


def save_dcp(model: nn.Module, folder: Path) -> None:
    """Both names, as the documentation of DCP has it."""
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)


def load_dcp(model: nn.Module, folder: Path) -> None:
    """The same the other way."""
    dcp.load({"model": get_model_state_dict(model)}, checkpoint_id=folder)


def load_torch(model: nn.Module, folder: Path) -> None:
    """Through a second copy in memory."""
    model.load_state_dict(torch.load(folder / "model.pt"))


#: How each tool saves (what is loaded is what the last way wrote), and its ways to load.
TOOLS: dict[str, tuple[dict[str, Save], dict[str, Save]]] = {
    OURS: (
        {
            "save, no digests": lambda model, folder: tiepolicy_dcp.save(folder, model=model, digests=False),
            "save": lambda model, folder: tiepolicy_dcp.save(folder, model=model),
        },
        {
            "load": lambda model, folder: tiepolicy_dcp.load(folder, model=model),
            "load, verify=off": lambda model, folder: tiepolicy_dcp.load(folder, model=model, verify="off"),
        },
    ),
    BASELINE: (
        {"save": lambda model, folder: dcp.save(popped(model), checkpoint_id=folder)},
        {"load": lambda model, folder: dcp.load(popped(model), checkpoint_id=folder)},
    ),
    "dcp": ({"save": save_dcp}, {"load": load_dcp}),
    "safetensors save_model": (
        {"save": save_safetensors},
        {"load": lambda model, folder: load_model(model, str(folder / "model.safetensors"))},
    ),
    "transformers": ({"save": save_transformers}, {}),
    "torch.save": ({"save": save_torch}, {"load": load_torch}),
}
