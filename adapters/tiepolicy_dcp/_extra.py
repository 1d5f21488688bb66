"""Step 12, extra state: JSON values and tensors that ride along with a checkpoint, without pickle."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from tiepolicy.files import member
from tiepolicy_dcp._files import write_safetensors
from tiepolicy_dcp._folder import read_json, write_text
from tiepolicy_dcp.errors import CheckpointError

VALUES = "extra.json"
TENSORS = "extra.safetensors"
_REFERENCE = "tensor in extra.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Extra:
    """Extra state as its two files hold it; the tensors are copies on the CPU."""

    values: str = "{}"
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


def pack_extra(extra: Mapping[str, Any]) -> Extra:
    """Take a nested structure of JSON values and tensors apart.

    Raises:
        CheckpointError: If it holds what is neither, or would come back as something else.
    """
    tensors: dict[str, torch.Tensor] = {}
    if not isinstance(extra, Mapping):
        raise CheckpointError(f"extra must be a dict, not a {type(extra).__name__}")
    try:
        return Extra(values=json.dumps(_take_tensors(extra, "", tensors), indent=1), tensors=tensors)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"extra state can hold tensors and what JSON can (strings, numbers, lists, dicts with string keys): {error}"
        ) from error


def write_extra(folder: Path, extra: Extra) -> None:
    """Write both files; the one for tensors only if there are any."""
    if extra.tensors:
        write_safetensors(folder / TENSORS, extra.tensors)
    write_text(folder / VALUES, extra.values)


def read_extra(folder: Path) -> dict[str, Any]:
    """What was packed and written; tensors come back on the CPU, tuples as lists.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    values = read_json(folder / VALUES, allow_nan=True)
    if values is None:
        raise CheckpointError(f"{folder / VALUES} is missing: a part of the checkpoint was lost")
    try:
        tensors = load_file(member(folder, TENSORS)) if os.path.lexists(folder / TENSORS) else {}
        return dict(_put_tensors(values, tensors))
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:  # RuntimeError: cannot be opened
        raise CheckpointError(f"{folder / TENSORS} is damaged or does not belong to {VALUES}: {error}") from error


def _take_tensors(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        while path in tensors:  # a key may have a slash of its own
            path += "/"
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {_REFERENCE: path}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{key!r}, a key of {path or 'it'}, would come back as a string")
        return {key: _take_tensors(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_take_tensors(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    return value


def _put_tensors(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_REFERENCE}:
            return tensors[value[_REFERENCE]]
        return {key: _put_tensors(item, tensors) for key, item in value.items()}
    return [_put_tensors(item, tensors) for item in value] if isinstance(value, list) else value
