"""Step 4, trust: what of a folder is looked at before transformers opens it, and what is said if it fails at it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from tiepolicy import TiePlan
from tiepolicy.errors import CheckpointError, TiePolicyError, UntrustedCheckpointError
from tiepolicy.files import (
    DIGESTS,
    Verify,
    check_files,
    check_recorded,
    digests_text,
    measure,
    member,
    read_digests,
    read_json,
)
from tiepolicy_hf._folder import Weights, is_of_model

CONFIG = "config.json"
_GENERATION_CONFIG = "generation_config.json"
#: transformers takes the base model from wherever this file says.
_ADAPTER = "adapter_config.json"
_ADVICE = f'Load another copy; or, if a file was changed on purpose, delete {DIGESTS} or pass verify="off"'


def write_digests(folder: Path) -> None:
    """Record what the files of a model hold that were just written."""
    written = [path for path in folder.iterdir() if is_of_model(path.name) and path.name != DIGESTS]
    (folder / DIGESTS).write_text(digests_text(measure(written)), encoding="utf-8")


def check_folder(folder: Path, *, verify: Verify) -> None:
    """Hold the files that transformers will read against their digests, if there are any, and look at the others.

    Raises:
        CheckpointError: If a file is damaged, was replaced, or was not there when the folder was written.
        UntrustedCheckpointError: If it is a pipe or leads out of the folder, or the folder is an adapter of another.
    """
    records = None if verify == "off" else read_digests(folder)
    check_files(folder, records or {}, sorted(records or {}), verify=verify, advice=_ADVICE)
    present = {path.name for path in folder.glob("*") if path.suffix != ".bin" and is_of_model(path.name)}
    check_recorded(folder, records, present - {DIGESTS})
    for name in (CONFIG, _GENERATION_CONFIG):
        if (folder / name).exists() or (folder / name).is_symlink():
            read_json(member(folder, name))
    if (folder / _ADAPTER).exists() or (folder / _ADAPTER).is_symlink():
        raise UntrustedCheckpointError(
            f"{folder} holds {_ADAPTER}, which says where to take a base model from. Nothing was loaded. Load that "
            "model from its own folder, and the adapter with peft"
        )


def check_size(plan: TiePlan, weights: Weights) -> None:
    """Refuse a config of a model far larger than its files, before there is memory for it.

    Args:
        plan: Of the model, on the meta device.
        weights: The files; even packed weights take a bit for each element.

    Raises:
        CheckpointError: If they cannot hold it.
    """
    num_bytes = sum(file.stat().st_size for file in weights.files)
    num_elements = sum(math.prod(spec.shape) for spec in plan.stored().values())
    if num_elements > 8 * num_bytes:
        raise CheckpointError(
            f"{CONFIG} describes a model of {num_elements} elements, of which files of {num_bytes} bytes hold a part "
            "at most: one of them is damaged or belongs to another model. Nothing was loaded"
        )


@contextmanager
def naming_config(cls: Any, folder: Path) -> Iterator[None]:
    """Say so if transformers fails because of the folder's config: it answers a damaged one with any error.

    Args:
        cls: The class that is loaded, or an Auto class.
        folder: Where the config is.
    """
    try:
        yield
    except TiePolicyError:
        raise
    except Exception as error:
        cause = _why_not_built(cls, folder)
        if cause is None or not (hasattr(cls, "config_class") or hasattr(cls, "from_config")):
            raise
        raise CheckpointError(
            f"{folder / CONFIG} describes no model: {type(cause).__name__}: {cause}. Nothing was loaded"
        ) from error


def _why_not_built(cls: Any, folder: Path) -> Exception | None:
    try:
        with torch.device("meta"):
            if hasattr(cls, "config_class"):
                cls(cls.config_class.from_pretrained(folder))
            else:
                cls.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:
        return error
    return None
