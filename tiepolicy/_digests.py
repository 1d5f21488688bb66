"""Step 24, digests: the files of a checkpoint held against what was recorded of them when they were written.

XXH3 with 128 bits finds accidents at the speed of memory. It is no signature: who can change a file can change its
digest. A disk is slower, so it is asked for what comes next long before that is hashed, or read by a load.
"""

import contextlib
import ctypes
import functools
import importlib
import json
import mmap
import os
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np

from tiepolicy._paths import member, open_file, read_json
from tiepolicy.errors import CheckpointError

#: File of a checkpoint with size and digest of all others.
DIGESTS = "digests.json"
_ALGORITHM = "xxh3_128"
#: What stands for it in a checkpoint that was saved without digests.
_SIZES_ONLY = "none"
_NUM_DIGITS = 32
#: Read at a time: of less, handing over costs more than reading.
_CHUNK_BYTES = 1 << 22
#: What a disk is asked for before it is read. The readahead of one reader leaves a disk idle in between.
READ_AHEAD_BYTES = 1 << 26
#: Threads that wait for what was asked for. One would stop with the disk.
_NUM_ASKERS = 4
#: Whoever reads less wants no large page.
_SHORT_BYTES = 1 << 17
# Since Linux 5.14 and 6.5; Python has no names for them.
_MADV_POPULATE_READ = 22
_CACHESTAT = 451
_libc = ctypes.CDLL(None)
#: Threads that read ahead of the hash, which is faster than one of them.
_NUM_AHEAD = 3

#: Is told how many bytes were read.
Seen = Callable[[int], None]

#: What a load checks of each file before reading it: size and digest, size only, or nothing.
Verify = Literal["full", "size", "off"]


def _ignore(_num_bytes: int) -> None:
    pass


class FileRecord(NamedTuple):
    """Size in bytes and digest as hexadecimal of one file; an empty digest if there is none."""

    num_bytes: int
    digest: str


class Digest(Protocol):
    """A digest in the making."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Take some bytes, `data`."""

    def hexdigest(self) -> str:
        """The digest of all bytes so far."""
        ...


def new_digest() -> Digest:
    """An empty digest.

    Raises:
        CheckpointError: If xxhash is not installed, which the extras `dcp` and `hf` bring; the core does without.
    """
    try:
        digest: Digest = vars(importlib.import_module("xxhash"))[_ALGORITHM]()
    except ImportError as error:
        raise CheckpointError("digests of files need xxhash: pip install xxhash") from error
    return digest


def measure(paths: Iterable[Path], *, digests: bool = True) -> dict[str, FileRecord]:
    """The size of the files at `paths` and, if `digests` are asked for, their digest, by file name."""
    return {path.name: FileRecord(path.stat().st_size, _digest(_chunks(path)) if digests else "") for path in paths}


def digests_text(records: Mapping[str, FileRecord]) -> str:
    """The text of `digests.json` with the `records` of the files of a checkpoint, by file name."""
    files = {name: list(record) for name, record in sorted(records.items())}
    algorithm = _ALGORITHM if all(record.digest for record in records.values()) else _SIZES_ONLY
    return json.dumps({"algorithm": algorithm, "files": files}, indent=1)


def read_digests(folder: Path) -> dict[str, FileRecord] | None:
    """The records of the checkpoint in `folder`, by file name; None if it has none.

    Raises:
        CheckpointError: If they are damaged, or of another algorithm.
    """
    path = folder / DIGESTS
    if not os.path.lexists(path):
        return None
    content = read_json(member(folder, DIGESTS))
    algorithm = content.get("algorithm")
    if algorithm not in (_ALGORITHM, _SIZES_ONLY):
        raise CheckpointError(f"{path} has the unknown algorithm {algorithm!r}: update tiepolicy to check its digests")
    length = 0 if algorithm == _SIZES_ONLY else _NUM_DIGITS
    files = content.get("files")
    if not isinstance(files, dict) or not all(_is_record(record, length) for record in files.values()):
        raise CheckpointError(f"{path} is damaged: its files are no object of names with size and digest")
    return {name: FileRecord(size, digest) for name, (size, digest) in files.items()}


def check_files(
    folder: Path, records: Mapping[str, FileRecord], names: Collection[str], *, verify: Verify, advice: str
) -> None:
    """Hold files of a checkpoint against their records.

    Args:
        folder: The checkpoint.
        records: What was written.
        names: The files to check.
        verify: What to check of each.
        advice: What to do about one that is damaged, as a sentence.

    Raises:
        CheckpointError: Naming the first file that is missing or holds something else than was written; or if there is
            no such way to verify.
    """
    if verify not in get_args(Verify):
        raise CheckpointError(f"verify is {verify!r}, but must be one of {', '.join(get_args(Verify))}")
    for name in names if verify != "off" else ():
        problem = _problem(folder, name, records[name], verify)
        if problem is not None:
            raise CheckpointError(f"{problem}. Nothing was loaded. {advice}")


def check_recorded(folder: Path, records: Mapping[str, FileRecord] | None, names: Iterable[str]) -> None:
    """Refuse files that were not there when the checkpoint was written.

    Args:
        folder: The checkpoint.
        records: What was written; nothing is refused if that is not known.
        names: The files that are about to be read, if they are there.

    Raises:
        CheckpointError: Naming the first.
    """
    for problem in unrecorded_problems(folder, records, names):
        raise CheckpointError(f"{problem}. Nothing was loaded")


def unrecorded_problems(folder: Path, records: Mapping[str, FileRecord] | None, names: Iterable[str]) -> Iterator[str]:
    """The same as sentences."""
    for name in () if records is None else sorted(set(names) - set(records)):
        if os.path.lexists(folder / name):
            yield f"{folder / name} is not recorded in {DIGESTS}: it was put there later, or {DIGESTS} was edited"


def digest_problems(folder: Path, seen: Seen = _ignore) -> Iterator[str]:
    """What differs from the record of a folder, as sentences; reads every file that is recorded.

    Without `digests.json` there is nothing to hold files against, and nothing is said.

    Args:
        folder: The checkpoint.
        seen: Is told of the bytes that were read, a few megabytes at a time.

    Raises:
        CheckpointError: If the record is damaged, or its algorithm is not at hand.
    """
    records = read_digests(folder)
    for name, record in sorted((records or {}).items()):
        try:
            problem = _problem(folder, name, record, "full", seen)
        except CheckpointError as error:
            problem = str(error)
        if problem is not None:
            yield problem


def _problem(folder: Path, name: str, record: FileRecord, verify: Verify, seen: Seen = _ignore) -> str | None:
    path = member(folder, name, named_by=DIGESTS)
    size = path.stat().st_size
    if size != record.num_bytes:
        return f"{path} has {size} bytes, but {record.num_bytes} were written: it was cut or replaced"
    if verify == "full" and record.digest and _digest(_chunks(path, ahead=True), seen) != record.digest:
        return f"{path} does not hold what was written: its digest differs, so it was damaged or replaced"
    return None


def _is_record(record: Any, length: int) -> bool:
    return isinstance(record, list) and [int, str] == [type(part) for part in record] and len(record[1]) == length


def _digest(chunks: Iterable[memoryview], seen: Seen = _ignore) -> str:
    state = new_digest()
    for chunk in chunks:
        state.update(chunk)
        seen(len(chunk))
    return state.hexdigest()


def read_soon(descriptor: int, start: int, num_bytes: int) -> None:
    """Ask the system to have a part of a file in memory when it is read; nobody waits for that.

    Linux answers a fault in a mapping that wants huge pages with large pages, which are copied in less time than the
    single ones that `posix_fadvise` gives; `benchmarks/bench_readahead.py` says how much.

    Args:
        descriptor: Of the file, open for reading.
        start: In bytes.
        num_bytes: None are asked for if negative.
    """
    if num_bytes <= 0 or _is_in_memory(descriptor, start, num_bytes):
        return
    end = start + num_bytes
    # Who reads the file will say what is wrong with it. And a process that ends starts no thread.
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        for place in range(start - start % mmap.ALLOCATIONGRANULARITY, end, _CHUNK_BYTES):
            region = mmap.mmap(descriptor, min(_CHUNK_BYTES, end - place), prot=mmap.PROT_READ, offset=place)
            if num_bytes < _SHORT_BYTES:
                region.madvise(mmap.MADV_WILLNEED)
            else:
                _askers().submit(_fill, region)


def _is_in_memory(descriptor: int, start: int, num_bytes: int) -> bool:
    """Whether all of it is, and need not be mapped. False where the system does not tell."""
    if sys.platform != "linux":
        return False
    part, counts = (ctypes.c_uint64 * 2)(start, num_bytes), (ctypes.c_uint64 * 5)()
    num_pages = (start + num_bytes - 1) // mmap.PAGESIZE - start // mmap.PAGESIZE + 1
    return _libc.syscall(_CACHESTAT, descriptor, part, counts, 0) == 0 and counts[0] >= num_pages


@functools.cache
def _askers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_NUM_ASKERS)


os.register_at_fork(after_in_child=_askers.cache_clear)  # a child has none of the threads


def _fill(region: mmap.mmap) -> None:
    if hasattr(mmap, "MADV_HUGEPAGE"):  # not on macOS
        with contextlib.suppress(OSError):  # a kernel without
            region.madvise(mmap.MADV_HUGEPAGE)
        address = np.frombuffer(region, np.uint8).ctypes.data
        # `region.madvise` would keep all threads of Python waiting; to touch it, end the process if the file was cut.
        if _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(len(region)), _MADV_POPULATE_READ) == 0:
            return
    region.madvise(mmap.MADV_WILLNEED)


def spare_processors() -> int:
    """How many threads can run beside this one, if each process that torchrun started here has as many."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, available // int(os.environ.get("LOCAL_WORLD_SIZE") or 1) - 1)


def _chunks(path: Path, *, ahead: bool = False) -> Iterator[memoryview]:
    """The bytes of a file, each chunk valid until the next; threads read `ahead`, but not in a process that may end."""
    coming: deque[Future[memoryview]] = deque()
    num_ahead = min(spare_processors(), _NUM_AHEAD) if ahead else 0
    with open_file(path) as file, ThreadPoolExecutor(max(num_ahead, 1)) as readers:
        size = os.fstat(file.fileno()).st_size
        read_soon(file.fileno(), 0, min(size, READ_AHEAD_BYTES))
        rooms = [memoryview(bytearray(min(size, _CHUNK_BYTES))) for _ in range(num_ahead + 1)]

        def read(start: int) -> memoryview:
            later = start + READ_AHEAD_BYTES
            read_soon(file.fileno(), later, min(size - later, _CHUNK_BYTES))
            room = rooms[start // _CHUNK_BYTES % len(rooms)]
            return room[: os.preadv(file.fileno(), [room], start)]

        if not num_ahead:
            yield from map(read, range(0, size, _CHUNK_BYTES))
            return
        for start in range(0, size, _CHUNK_BYTES):
            if len(coming) == len(rooms):
                yield coming.popleft().result()
            coming.append(readers.submit(read, start))
        while coming:
            yield coming.popleft().result()
