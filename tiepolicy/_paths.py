"""Step 24, opening: the files of a checkpoint, and no file outside its folder."""

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from tiepolicy.errors import CheckpointError, UntrustedCheckpointError

#: Manifest of a checkpoint folder.
MANIFEST = "manifest.json"
#: Where the manifest lies in the metadata of a safetensors file, in folders that have no file for it.
MANIFEST_KEY = "tiepolicy"
#: Metadata of a folder of torch.distributed.checkpoint.
METADATA = ".metadata"
#: The largest JSON file or header that is read, in bytes; the limit of safetensors.
MAX_JSON_BYTES = 100_000_000


def member(folder: Path, name: str, *, named_by: str) -> Path:
    """The file of a checkpoint folder that another file of it names.

    Args:
        folder: The checkpoint.
        name: The path as it stands in the other file, relative to the folder.
        named_by: The other file, for the message.

    Raises:
        UntrustedCheckpointError: If the path leaves the folder: upwards, from the root, or through a link.
        CheckpointError: If there is no such file.
    """
    windows = PureWindowsPath(name)
    parts = {*PurePosixPath(name).parts, *windows.parts}
    leaves = not name or "\0" in name or ".." in parts or name.startswith("/") or bool(windows.drive or windows.root)
    if leaves or not _stays_inside(folder, folder / name):
        raise UntrustedCheckpointError(
            f"{folder / named_by} points to {name!r}, a file outside the checkpoint. Nothing was loaded"
        )
    if not (folder / name).is_file():
        raise CheckpointError(f"{folder / name} is missing: a part of the checkpoint was lost. Nothing was loaded")
    return folder / name


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: If the file cannot be read, is no JSON object, or an object in it has a key twice.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size} bytes, more than the {MAX_JSON_BYTES} that are read")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return parse_json(data, source=str(path))


def parse_json(data: bytes, *, source: str) -> dict[str, Any]:
    """The object that bytes are the JSON of.

    Args:
        data: UTF-8 text.
        source: Where it comes from, for the message.

    Raises:
        CheckpointError: If it is no JSON object, or an object in it has a key twice.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source} is damaged: it holds a {type(value).__name__}, expected an object")
    return value


def _stays_inside(folder: Path, path: Path) -> bool:
    try:
        root, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself; Python 3.13 raises another class
        return False
    if target.is_relative_to(root):
        return True
    # The cache of Hugging Face: models--x/snapshots/<revision>/file is a link to models--x/blobs/<digest>.
    return root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs twice, and readers disagree about which one counts")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
