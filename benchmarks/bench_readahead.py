"""python benchmarks/bench_readahead.py --out readahead.json.

Does it pay to ask a disk for what is about to be read, and for large pages? One thread reads a file into memory, 4 MB
at a time, and asks for the next 64 MB as a load does, in one of three ways: as `tiepolicy` asks, by `posix_fadvise` in
pieces of Linux's readahead, or not at all. First the file is on the disk only ("cold"); then it is read once more, from
the pages that the first read has left ("again"). Each round has an order of its own. `--size 0.02` tries it quickly.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_on_gpu import forget
from environment import environment

from tiepolicy.files import READ_AHEAD_BYTES, read_soon

_PIECE_BYTES = 1 << 22
#: What Linux reads of one request by default.
_REQUEST_BYTES = 1 << 17

Row = dict[str, Any]
Ask = Callable[[int, int, int], None]


def advise(descriptor: int, start: int, num_bytes: int) -> None:
    """Ask as programs usually do."""
    for place in range(start, start + num_bytes, _REQUEST_BYTES):
        os.posix_fadvise(descriptor, place, min(_REQUEST_BYTES, start + num_bytes - place), os.POSIX_FADV_WILLNEED)


def leave(_descriptor: int, _start: int, _num_bytes: int) -> None:
    """Ask for nothing."""


WAYS: dict[str, Ask] = {"read_soon": read_soon, "posix_fadvise": advise, "not asked": leave}


def seconds_to_read(path: Path, room: memoryview, ask: Ask) -> float:
    """How long it takes to fill `room` with a file of its size."""
    size = len(room)
    start_time = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        descriptor = file.fileno()
        ask(descriptor, 0, min(size, READ_AHEAD_BYTES))
        for start in range(0, size, _PIECE_BYTES):
            later = start + READ_AHEAD_BYTES
            ask(descriptor, later, min(size - later, _PIECE_BYTES))
            part = room[start : start + _PIECE_BYTES]
            if os.preadv(descriptor, [part], start) != len(part):
                raise OSError(f"{path} ends before {start + len(part)} bytes")
    return time.perf_counter() - start_time


def one_round(folder: Path, room: memoryview, number: int) -> dict[str, tuple[float, float]]:
    """Seconds of a cold read, and of one more, by way."""
    found = {}
    for way in random.Random(number).sample(list(WAYS), len(WAYS)):  # noqa: S311 - any order
        forget(folder)
        cold = seconds_to_read(folder / "file", room, WAYS[way])
        found[way] = cold, seconds_to_read(folder / "file", room, leave)
    return found


def summary(rounds: list[dict[str, tuple[float, float]]]) -> list[Row]:
    """Medians over rounds, and the median of each round's ratio to `posix_fadvise`."""
    rows: list[Row] = []
    for way in WAYS:
        for place, read in enumerate(("cold", "again")):
            taken = [seconds[way][place] for seconds in rounds]
            over = statistics.median(seconds[way][place] / seconds["posix_fadvise"][place] for seconds in rounds)
            row = {"way": way, "read": read, "seconds": statistics.median(taken), "over_posix_fadvise": over}
            rows.append(row | {"seconds_min": min(taken), "seconds_max": max(taken)})
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=0.5, help="GB of the file")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    content = np.random.default_rng(0).bytes(round(options.size * 1e9))
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        with (Path(folder) / "file").open("wb") as file:
            file.write(content)
            os.fsync(file.fileno())
        room = memoryview(bytearray(content))
        rounds = [one_round(Path(folder), room, number) for number in range(options.rounds + 1)]
    rows = summary(rounds[1:])  # the first one warms up
    print(f"{'way':14} {'read':6} {'s':>6}  {'min..max':13} /posix_fadvise")
    for row in rows:
        spread = f"{row['seconds_min']:.3f}..{row['seconds_max']:.3f}"
        print(f"{row['way']:14} {row['read']:6} {row['seconds']:6.3f}  {spread:13} {row['over_posix_fadvise']:.2f}")
    if options.out:
        measured = {"size_gb": options.size, "rounds": options.rounds, **environment()}
        options.out.write_text(json.dumps({"environment": measured, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
