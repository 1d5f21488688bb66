"""Step 3, digests: what every file of a checkpoint held when it was written, to find damage before it is loaded.

XXH3 with 128 bits finds accidents at the speed of memory. It is no signature: who can change a file can change its
digest.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from tiepolicy_dcp._folder import MANIFEST, read_json, write_text
from tiepolicy_dcp.errors import CheckpointError

try:
    import xxhash
except ImportError as error:
    raise ImportError("tiepolicy_dcp needs xxhash: pip install 'tiepolicy[dcp]'") from error

#: File of a checkpoint with the digests of all others.
DIGESTS = "digests.json"
_ALGORITHM = "xxh3_128"
#: What stands for it in a checkpoint that was saved without digests.
_SIZES_ONLY = "none"
_CHUNK_BYTES = 1 << 22

logger = logging.getLogger("tiepolicy_dcp")

#: What a load checks of each file before reading it: size and digest, size only, or nothing.
Verify = Literal["full", "size", "off"]


#: XXH3 with 128 bits, fed piece by piece.
Digest = xxhash.xxh3_128


class FileRecord(NamedTuple):
    """Size in bytes and digest as hexadecimal of one file; an empty digest if there is none."""

    num_bytes: int
    digest: str


def measure(paths: Iterable[Path], *, digests: bool = True) -> dict[str, FileRecord]:
    """Size and, if asked for, digest of files, by file name."""
    return {path.name: FileRecord(path.stat().st_size, _digest(path) if digests else "") for path in paths}


def write_digests(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Keep the records in the checkpoint that they describe."""
    files = {name: list(record) for name, record in sorted(records.items())}
    algorithm = _ALGORITHM if all(record.digest for record in records.values()) else _SIZES_ONLY
    write_text(folder / DIGESTS, json.dumps({"algorithm": algorithm, "files": files}, indent=1))


def read_digests(folder: Path) -> dict[str, FileRecord]:
    """The records of a checkpoint; none for one that was written without a manifest, by plain DCP.

    Raises:
        CheckpointError: If they are missing or cannot be read.
    """
    content = read_json(folder / DIGESTS)
    if content is None:
        if (folder / MANIFEST).exists():
            raise CheckpointError(
                f"{folder / DIGESTS} is missing: a part of the checkpoint was lost. Nothing was loaded. To load it "
                'unchecked, pass verify="off"'
            )
        return {}
    try:
        algorithm = content["algorithm"]
        records = {name: FileRecord(int(size), str(digest)) for name, (size, digest) in content["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / DIGESTS} is damaged: {error!r}. Nothing was loaded") from error
    if algorithm not in (_ALGORITHM, _SIZES_ONLY):
        raise CheckpointError(f"{folder / DIGESTS} has the unknown algorithm {algorithm!r}. Nothing was loaded")
    return records


def check_files(folder: Path, records: Mapping[str, FileRecord], names: Sequence[str], *, verify: Verify) -> None:
    """Hold files of a checkpoint against their records.

    Raises:
        CheckpointError: Naming the first file that is missing or holds something else than was written.
    """
    if verify == "full" and not all(records[name].digest for name in names):
        logger.warning("%s was saved without digests: only the sizes of its files are checked", folder)
    for name in names if verify != "off" else ():
        path, record = folder / name, records[name]
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{path} is missing: a part of the checkpoint was lost. Nothing was loaded")
        size = path.stat().st_size
        if size != record.num_bytes:
            raise CheckpointError(
                f"{path} has {size} bytes, but {record.num_bytes} were written: it was cut or replaced. Nothing was "
                "loaded. Load an earlier checkpoint"
            )
        if verify == "full" and record.digest and _digest(path) != record.digest:
            raise CheckpointError(
                f"{path} does not hold what was written: its digest differs, so it was damaged or replaced. Nothing "
                "was loaded. Load an earlier checkpoint"
            )


def _digest(path: Path) -> str:
    state = Digest()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(buffer[:count])
    return state.hexdigest()
