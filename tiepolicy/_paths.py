"""Step 12, opening: the files of a checkpoint, no file outside its folder, and none that is larger than honest ones."""

import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

from tiepolicy.errors import CheckpointError, UntrustedCheckpointError

#: Manifest of a checkpoint folder.
MANIFEST = "manifest.json"
#: Where the manifest lies in the metadata of a safetensors file, in folders that have no file for it.
MANIFEST_KEY = "tiepolicy"
#: Metadata of a folder of torch.distributed.checkpoint.
METADATA = ".metadata"
#: The largest JSON file or header that is read, in bytes; the limit of safetensors.
MAX_JSON_BYTES = 100_000_000
#: The most objects and lists in one. A manifest of a million tensors, all tied, has four million; in memory each takes
#: thirty times its brackets, so that without a limit a file of 100 MB took 3 GB.
MAX_JSON_PARTS = 5_000_000


def member(folder: Path, name: str, *, named_by: str | None = None) -> Path:
    """A file of a checkpoint folder.

    Args:
        folder: The checkpoint.
        name: Its path relative to the folder; if another file names it, as it stands there.
        named_by: That other file, for the message.

    Raises:
        UntrustedCheckpointError: If the path leaves the folder, upwards, from the root, or through a link; or if it is
            a pipe or a device.
        CheckpointError: If there is no such file.
    """
    windows = PureWindowsPath(name)
    parts = {*PurePosixPath(name).parts, *windows.parts}
    leaves = not name or "\0" in name or ".." in parts or name.startswith("/") or bool(windows.drive or windows.root)
    if leaves or not _stays_inside(folder, folder / name):
        named = f"{folder / named_by} points to {name!r}," if named_by else f"{folder / name} is a link to"
        raise UntrustedCheckpointError(f"{named} a file outside the checkpoint. Nothing was loaded")
    path = folder / name
    if not path.exists():
        raise CheckpointError(f"{path} is missing: a part of the checkpoint was lost. Nothing was loaded")
    check_regular(path)
    return path


def check_regular(path: Path) -> None:
    """Refuse what is no plain file: a reader of a pipe would wait for ever, and one of a device never end.

    Raises:
        UntrustedCheckpointError: If it is something else.
        CheckpointError: If it cannot be looked at.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise UntrustedCheckpointError(f"{path} is {kind} where a checkpoint has a file. Nothing was loaded")


def open_file(path: Path) -> BinaryIO:
    """Open a plain file to read its bytes.

    Raises:
        UntrustedCheckpointError: If it is something else.
        CheckpointError: If it cannot be opened.
    """
    check_regular(path)
    try:
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_bytes(path: Path, *, limit: int) -> bytes:
    """All of a plain file.

    Args:
        path: The file.
        limit: The most bytes that it may have.

    Raises:
        UntrustedCheckpointError: If it is no plain file.
        CheckpointError: If it is larger, or cannot be read.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise CheckpointError(f"{path} has {size} bytes, more than the {limit} that are read")
            return file.read(size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_json(path: Path, *, allow_nan: bool = False) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: The file.
        allow_nan: Whether NaN and Infinity, which are no JSON but which Python writes, are read.

    Raises:
        CheckpointError: If the file cannot be read, is no JSON object, or an object in it has a key twice.
    """
    return parse_json(read_bytes(path, limit=MAX_JSON_BYTES), source=str(path), allow_nan=allow_nan)


def parse_json(data: bytes, *, source: str, allow_nan: bool = False) -> dict[str, Any]:
    """The object that bytes are the JSON of.

    Args:
        data: UTF-8 text.
        source: Where it comes from, for the message.
        allow_nan: As in `read_json`.

    Raises:
        CheckpointError: If it is no JSON object, an object in it has a key twice, or it is larger than any honest one.
    """
    num_parts = data.count(b"[") + data.count(b"{")
    if len(data) > MAX_JSON_BYTES or num_parts > MAX_JSON_PARTS:
        raise CheckpointError(
            f"{source} has {len(data)} bytes and {num_parts} lists and objects; no more than {MAX_JSON_BYTES} and "
            f"{MAX_JSON_PARTS} are read"
        )
    constant: Callable[[str], float] = float if allow_nan else _no_constant
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=constant)
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
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r} occurs twice, and readers disagree about which one counts")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
