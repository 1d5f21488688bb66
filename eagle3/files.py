"""Step 1: small files that one run makes and the next one reads: whole or absent, made by one process at a time."""

import errno
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from eagle3.errors import CheckpointError, DataError, Eagle3Error

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("eagle3")


class TensorCache:
    """A folder of safetensors files, each under the digest of what it was made from.

    Args:
        folder: Made when something is written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Within the block, no other process is in a block for the same name.

        Raises:
            DataError: The folder cannot be made or written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / f"{name}.lock")
            lock.acquire()
        except OSError as error:
            raise DataError(_unwritable(self.folder, error)) from error
        try:
            yield
        finally:
            lock.release()

    def read(self, name: str) -> "tuple[dict[str, torch.Tensor], dict[str, str]] | None":
        """The tensors and the metadata of a file; None where there is none, or a damaged one, which is reported."""
        path = self.folder / name
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            logger.warning("%s cannot be read (%s) and is made anew", path, error)
            return None

    def write(self, name: str, tensors: "Mapping[str, torch.Tensor]", metadata: Mapping[str, str]) -> Path:
        """Writes a file, which appears under its name when it is whole.

        Returns:
            Its path.

        Raises:
            DataError: It cannot be written, for example because the disk is full; nothing of it is left.
        """
        # Here and not above: it imports torch, for which nobody should wait who asks for help.
        from safetensors.torch import save

        path = self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, save(dict(tensors), metadata=dict(metadata)))
        except OSError as error:
            raise DataError(_unwritable(path, error)) from error
        return path


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is on the disk, and whole, before it has its name; after an error nothing of it is left.

    Raises:
        OSError: It cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def append(path: Path, content: bytes) -> None:
    """Adds to the end of a file, all or nothing.

    Raises:
        OSError: It cannot be written.
    """
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        if file.write(content) < len(content):  # a part of it found room
            os.truncate(path, end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def write_in_run(path: Path, content: str) -> None:
    """Writes a small file in the folder of a run, whole or not at all; makes the folder.

    Raises:
        CheckpointError: It cannot be written.
    """
    with naming_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.encode())


@contextmanager
def naming_disk_errors(place: Path) -> Iterator[None]:
    """Within the block, a place that cannot be written is one sentence.

    Raises:
        CheckpointError: The system or safetensors refuses to write.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{place} cannot be written: {reason(error)}. Free some space or choose another folder."
        ) from error


def reason(error: Exception) -> str:
    """Why something cannot be read or written, without the path that the system puts before it."""
    return " ".join((getattr(error, "strerror", None) or str(error)).split())


@contextmanager
def sole_writer(lock: Path, *, patience: float, otherwise: Eagle3Error) -> Iterator[None]:
    """Within the block, no other process is in one for the same file; the kernel ends it with the process.

    Args:
        lock: A file, made if it is not there, as its folder is.
        patience: Seconds to wait for another process.
        otherwise: What to raise if it is still there then.

    Raises:
        OSError: The file cannot be made.
    """
    held = FileLock(lock)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held.acquire(timeout=patience)
    except Timeout as error:
        raise otherwise from error
    try:
        yield
    finally:
        held.release()


def _unwritable(path: Path, error: OSError) -> str:
    return f"{path} cannot be written: {reason(error)}. Free some space or set data.cache to another folder."
