"""Step 28, digests: the files of a checkpoint held against what was recorded of them when they were written."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tiepolicy._paths import member, read_json
from tiepolicy.errors import CheckpointError

#: File of a checkpoint with size and digest of all others.
DIGESTS = "digests.json"
#: The algorithm of a record without digests.
SIZES_ONLY = "none"
_CHUNK_BYTES = 1 << 22


def digest_problems(folder: Path) -> Iterator[str]:
    """What differs from the record of a folder, as sentences; reads every file that is recorded.

    Without `digests.json` there is nothing to hold files against, and nothing is said.

    Raises:
        CheckpointError: If the record is damaged, or its algorithm is not at hand.
    """
    algorithm, files = recorded_files(folder)
    if algorithm is None:
        return
    new = None if algorithm == SIZES_ONLY else _algorithm(folder / DIGESTS, algorithm)
    for name, (size, digest) in sorted(files.items()):
        try:
            file = member(folder, name, named_by=DIGESTS)
        except CheckpointError as error:
            yield str(error)
            continue
        found = file.stat().st_size
        if found != size:
            yield f"{file} has {found} bytes, but {size} were written: it was cut or replaced"
        elif new is not None and _digest(file, new()) != digest:
            yield f"{file} does not hold what was written: its digest differs, so it was damaged or replaced"


def recorded_files(folder: Path) -> tuple[str | None, dict[str, tuple[int, str]]]:
    """The algorithm of a folder's record, None if it has none, and size and digest of each file by its name.

    Raises:
        CheckpointError: If the record is damaged.
    """
    path = folder / DIGESTS
    if not path.exists():
        return None, {}
    content = read_json(path)
    files = content.get("files")
    if not isinstance(files, dict) or not all(_is_record(record) for record in files.values()):
        raise CheckpointError(f"{path} is damaged: its files are no object of names with size and digest")
    return str(content.get("algorithm")), {name: (size, digest) for name, (size, digest) in files.items()}


def _algorithm(path: Path, name: Any) -> Callable[[], Any]:
    """What makes a new hash of the named algorithm."""
    if name == "xxh3_128":
        try:
            # Brought by the extra `dcp`, which wrote the record; the core does without.
            new: Callable[[], Any] = vars(importlib.import_module("xxhash"))["xxh3_128"]
        except ImportError as error:
            raise CheckpointError(
                f"the digests in {path} were not checked: they need xxhash, pip install 'tiepolicy[dcp]'"
            ) from error
        return new
    raise CheckpointError(f"{path} has the unknown algorithm {name!r}: update tiepolicy to check its digests")


def _is_record(record: Any) -> bool:
    return isinstance(record, list) and [int, str] == [type(part) for part in record]


def _digest(path: Path, state: Any) -> str:
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            state.update(chunk)
    return str(state.hexdigest())
