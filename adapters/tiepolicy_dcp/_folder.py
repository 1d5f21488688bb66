"""Step 2, folders: a checkpoint appears under its name in one step, when every byte of it is on disk."""

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from tiepolicy import TiePlan, files
from tiepolicy.errors import CheckpointError, ManifestError
from tiepolicy.files import member

MANIFEST = "manifest.json"
METADATA = ".metadata"
#: Of a checkpoint that a store wrote: its number, counted from 1, and its metrics.
RECORD = "checkpoint.json"

#: Names that this library gives to what is not, or no longer, a checkpoint. The token keeps what orphaned ranks of a
#: killed run may still write out of the next run's folders.
_TEMPORARY = re.compile(r"\.(?P<name>.+?)(\.[0-9a-f]{8})?\.(unfinished|doomed)")


def temporary(path: Path, purpose: Literal["unfinished", "doomed"]) -> Path:
    """A fresh name beside a path, so that a rename leads from one to the other."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{purpose}")


def prepare(folder: Path) -> Path:
    """Make the empty folder that a checkpoint is written into; what killed saves of its name left there is removed.

    Returns:
        The empty folder, which `publish` gives the checkpoint's name.

    Raises:
        CheckpointError: If there is something under the checkpoint's name already, or no folder can be made.
    """
    if folder.exists() or folder.is_symlink():
        raise CheckpointError(
            f"{folder} exists already, and a checkpoint is never written over another: choose another name, or delete "
            "it first"
        )
    unfinished = temporary(folder, "unfinished")
    try:
        remove_leftovers(folder.parent, name=folder.name)
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot make a folder for the checkpoint {folder}: {error.strerror or error}. Name one in a folder that "
            "you may write to"
        ) from error
    return unfinished


def publish(unfinished: Path, folder: Path) -> None:
    """Give a finished checkpoint its name: flush the folder, rename it, flush its parent."""
    flush_folder(unfinished)
    unfinished.rename(folder)
    flush_folder(folder.parent)


def discard(unfinished: Path) -> None:
    """Remove what was written of a checkpoint that could not be finished."""
    shutil.rmtree(unfinished, ignore_errors=True)


def withdraw(folder: Path) -> Path:
    """Take a checkpoint's name away at once; its bytes are left where this says, as a leftover to be removed."""
    doomed = temporary(folder, "doomed")
    folder.rename(doomed)
    flush_folder(folder.parent)
    return doomed


def remove_leftovers(root: Path, *, name: str | None = None) -> None:
    """Remove what killed saves and deletions left in a folder: of one checkpoint, or of all."""
    for path in root.iterdir() if root.is_dir() else ():
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or name not in (None, match["name"]):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give a system error the path that it is about: one of a write or a flush says only why."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def flush_folder(folder: Path) -> None:
    """Wait until the entries of a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file and wait until it is on disk."""
    with naming(path), path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_manifest(folder: Path, plan: TiePlan) -> None:
    """Write the plan beside DCP's metadata."""
    write_text(folder / MANIFEST, json.dumps(plan.to_manifest(), indent=1))


def read_manifest(folder: Path) -> TiePlan | None:
    """The plan in a checkpoint; None if the checkpoint was written without one.

    Raises:
        ManifestError: If there is a manifest that cannot be trusted; the message names the file.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest is None:
        return None
    try:
        return TiePlan.from_manifest(manifest)
    except ManifestError as error:
        raise ManifestError(f"{folder / MANIFEST}: {error}", names=error.names) from error


def read_json(path: Path, *, allow_nan: bool = False) -> Mapping[str, Any] | None:
    """A JSON object from a file of a checkpoint; None if there is no such file.

    Args:
        path: The file.
        allow_nan: Whether NaN and Infinity are read, which Python writes.

    Raises:
        CheckpointError: If the file is not JSON, no object, or not in its folder.
    """
    try:
        return files.read_json(member(path.parent, path.name), allow_nan=allow_nan)
    except CheckpointError:
        if os.path.lexists(path):
            raise
        return None
