"""Step 8, intact files: while ranks agree on what to read, each holds its share of the files against their digests."""

import logging
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from tiepolicy.files import DIGESTS, FileRecord, Verify, check_files, check_recorded, read_digests
from tiepolicy_dcp._folder import MANIFEST
from tiepolicy_dcp._ranks import num_ranks, rank
from tiepolicy_dcp.errors import CheckpointError

logger = logging.getLogger("tiepolicy_dcp")

_DATA_FILE = re.compile(r"__(\d+)_\d+\.distcp")
#: What is fetched of a file before anybody knows what of it is wanted: as much as a disk gives meanwhile.
_AHEAD_BYTES = 1 << 28


class IntactFiles:
    """The files of a checkpoint, looked at by a thread that begins at once.

    A rank looks at the file that a rank of its number wrote: it will read most of that if as many save as load.

    Args:
        folder: The checkpoint.
        verify: What is checked of each file.
    """

    def __init__(self, folder: Path, *, verify: Verify) -> None:
        self.folder = folder
        self._expected: set[str] = set()
        self._records: Future[Mapping[str, FileRecord] | None] = Future()
        # A daemon: who gives up for another reason does not wait for it.
        threading.Thread(target=self._run, args=(verify, rank(), num_ranks()), daemon=True).start()

    def expect(self, names: Iterable[str]) -> None:
        """Have `check` refuse files that are about to be read, if they were put there later."""
        self._expected.update(names)

    def check(self) -> None:
        """Wait until this rank's share is looked at.

        Raises:
            CheckpointError: If a file is damaged, or was put there later.
        """
        check_recorded(self.folder, self._records.result(), self._expected)

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Within the block, a damaged file goes before any other error, which it may be the cause of."""
        try:
            yield
        except Exception:
            self.check()
            raise

    def _run(self, verify: Verify, of_rank: int, num_ranks: int) -> None:
        try:
            if verify != "full":
                _fetch(self.folder / f"__{of_rank}_0.distcp")
            records = None if verify == "off" else _records(self.folder)
            if verify == "full" and not all(record.digest for record in (records or {}).values()):
                logger.warning("%s was saved without digests: only the sizes of its files are checked", self.folder)
            names = [name for name in sorted(records or {}) if (_number(name) - of_rank) % num_ranks == 0]
            check_files(self.folder, records or {}, names, verify=verify, advice="Load an earlier checkpoint")
        except Exception as error:  # handed on whole, to who asks
            self._records.set_exception(error)
        else:
            self._records.set_result(records)


def _records(folder: Path) -> Mapping[str, FileRecord] | None:
    """What was recorded of the files; None of a checkpoint that was written without a manifest, by plain DCP."""
    records = read_digests(folder)
    if records is None and (folder / MANIFEST).exists():
        raise CheckpointError(
            f"{folder / DIGESTS} is missing: a part of the checkpoint was lost. Nothing was loaded. To load it "
            'unchecked, pass verify="off"'
        )
    return records


def _number(name: str) -> int:
    """The rank that wrote a file; the last one has the others'."""
    found = _DATA_FILE.fullmatch(name)
    return int(found[1]) if found else -1


def _fetch(path: Path) -> None:
    """Have the kernel read a file ahead; it is only a hint."""
    if hasattr(os, "posix_fadvise") and path.is_file():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
