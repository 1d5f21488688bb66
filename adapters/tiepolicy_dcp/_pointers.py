"""Step 19, pointers: which checkpoint of a root is the latest and which the best; both move in one step.

`LATEST` and `BEST` are links to files of one name in `.pointers`, itself a link to a folder. Renaming another link over
`.pointers` moves both.
"""

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from tiepolicy_dcp._folder import flush_folder, temporary, write_text
from tiepolicy_dcp.errors import CheckpointError

#: Name that always means the newest whole checkpoint; a file in the root that holds the checkpoint's name.
LATEST: Final = "LATEST"
#: Name that always means the checkpoint with the best metric; a file like `LATEST`.
BEST: Final = "BEST"
POINTERS: Final = (LATEST, BEST)

Pointer = Literal["LATEST", "BEST"]

_FOLDER = ".pointers"
#: How often a reader may lose a race against a writer; a pointer that is not there is looked for as often.
_NUM_TRIES = 10


def read_pointer(root: Path, pointer: Pointer) -> str | None:
    """The name that a pointer holds; None if there is no such pointer.

    Raises:
        CheckpointError: If it is damaged.
    """
    for _ in range(_NUM_TRIES):  # a writer may remove the old target between the steps of following the links
        path = root / pointer
        try:
            if path.exists() and not path.is_file():
                raise CheckpointError(f"{path} is no file, and nothing was read of it. Name the checkpoint instead")
            return path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            continue
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is damaged: {error}. Name the checkpoint instead") from error
    return None


def move_pointers(root: Path, names: Mapping[Pointer, str]) -> None:
    """Make the pointers hold these names; one without a name is gone."""
    target = root / f"{_FOLDER}.{secrets.token_hex(4)}.target"
    target.mkdir()
    for pointer, name in names.items():
        write_text(target / pointer, name + "\n")
    flush_folder(target)
    for pointer in POINTERS:
        if not (root / pointer).exists():  # it leads nowhere yet
            _link(root / pointer, f"{_FOLDER}/{pointer}")
    if (root / _FOLDER).is_dir() and not (root / _FOLDER).is_symlink():  # a copy of the root that followed links
        (root / _FOLDER).rename(temporary(root / _FOLDER, "doomed"))
    _link(root / _FOLDER, target.name)
    for pointer in POINTERS:
        if not (root / pointer).is_symlink():  # a file, for the same reason
            _link(root / pointer, f"{_FOLDER}/{pointer}")
    flush_folder(root)
    for path in root.glob(f"{_FOLDER}.*.target"):
        if path != target:
            shutil.rmtree(path, ignore_errors=True)


def _link(path: Path, target: str) -> None:
    fresh = temporary(path, "unfinished")
    fresh.symlink_to(target)
    os.replace(fresh, path)  # noqa: PTH105 - atomic over an existing file on every system
