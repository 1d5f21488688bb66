"""Step 3, folders: which files are weights, what is looked at before they are opened, and how a folder is replaced.

A folder that exists is never written into: the new one is made whole beside it, takes along what is no part of a model,
and then the two change places. Whoever looks finds the old checkpoint or the new one, never files of both.
"""

import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig

from tiepolicy import TiePlan
from tiepolicy.errors import CheckpointError, TiePolicyError, UntrustedCheckpointError
from tiepolicy.files import (
    DIGESTS,
    MANIFEST_KEY,
    Verify,
    check_files,
    check_recorded,
    digests_text,
    measure,
    member,
    read_digests,
    read_header,
    read_index,
    read_json,
)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"

# What one save writes, and the next one replaces; all else in a folder belongs to others and stays.
_OURS = re.compile(
    r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?|(generation_)?config\.json|"
    + re.escape(DIGESTS)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The files of a folder that hold its weights."""

    files: tuple[Path, ...]
    pickled: bool
    #: The manifest as JSON text; None where another tool wrote the folder.
    manifest: str | None
    #: Names that are not stored, each with the stored name that `safetensors.torch.save_model` noted for it.
    noted: Mapping[str, str] = field(default_factory=dict)


def find_weights(folder: Path, *, allow_pickle: bool) -> Weights:
    """The files that transformers would read, each inside the folder, whole, and as the index says.

    Raises:
        UntrustedCheckpointError: If the index points out of the folder.
        CheckpointError: If there are no weights, or only pickles that nobody allowed, or a file is damaged or missing,
            or two sets of files are there of which only one can be meant.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is no folder. A model of the Hub is loaded from what huggingface_hub.snapshot_download(...) "
            "returns"
        )
    single, index = folder / WEIGHTS, folder / INDEX
    if single.exists() and index.exists():
        raise CheckpointError(
            f"{folder} holds both {WEIGHTS} and {INDEX}: two checkpoints, of which loaders read one or the other. "
            "Remove the one that is not meant"
        )
    if single.exists() or single.is_symlink():
        return _safe(folder, {WEIGHTS: set()}, named_by=folder.name)
    if index.exists():
        return _safe(folder, _by_file(index), named_by=INDEX)
    pickles = [name for name in (PICKLE, PICKLE_INDEX) if (folder / name).exists()]
    if not pickles:
        raise CheckpointError(f"{folder} holds no weights: neither {WEIGHTS} nor {INDEX}")
    if not allow_pickle:
        raise CheckpointError(
            f"{folder} holds its weights as {pickles[0]}, a pickle, which can run code when it is read. Convert it to "
            "safetensors; or read it with torch's weights-only unpickler by allow_pickle=True"
        )
    names = [PICKLE] if pickles[0] == PICKLE else sorted(_by_file(folder / PICKLE_INDEX))
    files = tuple(member(folder, name, named_by=pickles[0]) for name in names)
    return Weights(files=files, pickled=True, manifest=None)


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a new folder and give it a name that may be taken; the old folder stays as it was until then.

    Args:
        folder: The name. Files in it that are no part of a model are kept.
        write: Fills the folder that it is given.

    Raises:
        CheckpointError: If the folder cannot be written. What was under its name is unchanged.
    """
    unfinished, replaced = (folder.with_name(f".{folder.name}.{state}") for state in ("unfinished", "replaced"))
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(f"{folder} is a link or a file; a model is saved into a folder of its own")
    try:
        with writing(folder):
            _replace(folder, write, unfinished, replaced)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def is_of_model(name: str) -> bool:
    """Whether a file is one of those that a save of a model writes."""
    return _OURS.fullmatch(name) is not None


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Say of what goes wrong with a disk where it did."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} could not be written: {error}") from error


def _replace(folder: Path, write: Callable[[Path], None], unfinished: Path, replaced: Path) -> None:
    if replaced.exists() and not folder.exists():  # a save was killed between its two renames
        replaced.rename(folder)
    for rest in (unfinished, replaced):
        shutil.rmtree(rest, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write(unfinished)
    if folder.exists():
        _keep(folder, unfinished)
    flush(unfinished)
    if folder.exists():
        folder.rename(replaced)
    unfinished.rename(folder)
    _flush_one(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_model_(folder: Path) -> None:
    """Take the files of a model out of a folder; what belongs to others stays."""
    for path in folder.iterdir():
        if is_of_model(path.name):
            path.unlink()


def flush(folder: Path) -> None:
    """Wait until the files of a folder, and their names, are on disk."""
    for path in folder.iterdir():
        _flush_one(path)
    _flush_one(folder)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _by_file(index: Path) -> dict[str, set[str]]:
    """The names that an index expects in each file."""
    expected: dict[str, set[str]] = {}
    for name, file in read_index(member(index.parent, index.name)).items():
        expected.setdefault(file, set()).add(name)
    return expected


def _safe(folder: Path, expected: Mapping[str, set[str]], *, named_by: str) -> Weights:
    files, manifests = [], []
    metadata: dict[str, str] = {}
    seen: dict[str, str] = {}
    for file, names in sorted(expected.items()):
        path = member(folder, file, named_by=named_by)
        header = read_header(path)
        held = set(header.tensors)
        absent = sorted(names - held)
        if absent:
            raise CheckpointError(
                f"{folder / named_by} says that {absent[0]} is in {file}, which does not hold it: files of two saves "
                "lie in one folder. Nothing was loaded",
                names=absent,
            )
        twice = sorted(held & seen.keys())
        if twice:
            raise CheckpointError(
                f"{folder} holds {twice[0]} twice, in {seen[twice[0]]} and {file}: whichever is read last would win. "
                "Nothing was loaded",
                names=twice,
            )
        seen |= dict.fromkeys(held, file)
        files.append(path)
        metadata |= header.metadata
        manifests += [header.metadata[MANIFEST_KEY]] if MANIFEST_KEY in header.metadata else []
    if len(manifests) > 1:
        raise CheckpointError(f"{folder} holds files of several saves: {len(manifests)} of them have a manifest")
    noted = {alias: name for alias, name in metadata.items() if name in seen and alias not in seen}
    return Weights(files=tuple(files), pickled=False, manifest=next(iter(manifests), None), noted=noted)


def _keep(old: Path, new: Path) -> None:
    """Link what is no part of a model into the new folder; copy it where links cannot be made."""
    for path in old.iterdir():
        target = new / path.name
        if is_of_model(path.name) or target.exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, target, symlinks=True, copy_function=_link)
        else:
            _link(path, target)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


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
