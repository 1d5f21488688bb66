"""Step 16, staging: copies of live tensors that another process can write, so that training may go on.

What lies on a GPU is copied within it if it has room, which takes milliseconds, and fetched while it is written. Memory
is kept between saves and mapped by both processes; what they say is JSON, a line each way for each file.
"""

import json
import math
import mmap
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tiepolicy.errors import CheckpointError
from tiepolicy.files import FileRecord
from tiepolicy_dcp._devices import Streams, fetch
from tiepolicy_dcp._files import Written, write_tensors

#: Where a copy may begin: what vector instructions and DMA like.
_ALIGNMENT = 64
#: What a copy leaves free of a GPU.
_SPARE_BYTES = 1 << 30


class Place(NamedTuple):
    """Where a copy lies in the memory, in bytes, and what it is."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Staging:
    """Memory of one process for one copy of what it saves: a file that lies in memory and has no name.

    So another process can map it, the kernel frees it when the last of both is gone, however that ends, and a first
    copy is no slower than any other: what is written to a file needs no page that is cleared before, or mapped.
    """

    def __init__(self) -> None:
        self.descriptor = _file_in_memory()
        #: For what is read of the copies.
        self.streams = Streams()
        self._memory = memoryview(bytearray())
        self._on_devices: dict[torch.device, torch.Tensor] = {}

    def copy(self, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Copy tensors. The copies hold what the tensors held at the call, whatever is done to these afterwards.

        Returns:
            Contiguous tensors, valid until the next call; on the GPU of the tensor if that has room, else on the CPU,
            each with a storage of its own.
        """
        live = [tensor.detach() for tensor in tensors]
        places, num_bytes = layout(live)
        self._reserve(num_bytes)
        on_devices: dict[int, torch.Tensor] = {}
        for device in {tensor.device for tensor in live if tensor.is_cuda}:
            on_devices |= self._copied_within(device, live)
        self.streams.follow([*live, *on_devices.values()])
        rest = {place.start: live[index] for index, place in enumerate(places) if index not in on_devices}
        fetch(self.descriptor, rest, self.streams)
        return [on_devices.get(index, copy) for index, copy in enumerate(views(self._memory, places))]

    def fetch(self, copies: Sequence[torch.Tensor]) -> list[Place]:
        """Where copies lie in the file; those on GPUs are fetched first, which takes a while."""
        places, _ = layout(copies)
        on_devices = {place.start: copy for place, copy in zip(places, copies, strict=True) if copy.is_cuda}
        fetch(self.descriptor, on_devices, self.streams)
        return places

    def close(self) -> None:
        """Give the memory back, once no copy is in use."""
        self._memory = memoryview(bytearray())
        self._on_devices.clear()
        os.close(self.descriptor)

    def _copied_within(self, device: torch.device, live: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        """Copies, by index, of the tensors that lie on a GPU, if it has room for them."""
        indices = [index for index, tensor in enumerate(live) if tensor.device == device]
        places, num_bytes = layout([live[index] for index in indices])
        if not self._has_room(device, num_bytes):
            return {}
        copies = dict(zip(indices, views(self._on_devices[device], places), strict=True))
        for index, copy in copies.items():
            copy.copy_(live[index])  # before whatever its stream does next
        return copies

    def _has_room(self, device: torch.device, num_bytes: int) -> bool:
        """Whether a GPU has memory for copies that no training step has asked for; it is kept."""
        kept = self._on_devices.pop(device, None)
        if kept is None or len(kept) < num_bytes:
            del kept
            if torch.cuda.mem_get_info(device)[0] < num_bytes + _SPARE_BYTES:
                return False
            try:
                kept = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            except torch.OutOfMemoryError:
                return False
        self._on_devices[device] = kept
        return True

    def _reserve(self, num_bytes: int) -> None:
        if len(self._memory) < num_bytes:
            os.ftruncate(self.descriptor, num_bytes)  # what is not used of it takes no memory
            self._memory = mapped(self.descriptor)


def _file_in_memory() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("tiepolicy staging")
    with tempfile.TemporaryFile() as file:  # which has no name either
        return os.dup(file.fileno())


def mapped(descriptor: int) -> memoryview:
    """The whole of a file, to read and write."""
    num_bytes = os.fstat(descriptor).st_size
    return memoryview(mmap.mmap(descriptor, num_bytes) if num_bytes else bytearray())


def layout(tensors: Sequence[torch.Tensor]) -> tuple[list[Place], int]:
    """Where each tensor's copy goes, and how many bytes all of them take."""
    places, end = [], 0
    for tensor in tensors:
        places.append(Place(end, tuple(tensor.shape), tensor.dtype))
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return places, end


def views(memory: memoryview | torch.Tensor, places: Iterable[Place]) -> list[torch.Tensor]:
    """Tensors over places in memory: bytes of the CPU, of which each seems to be a storage, or a tensor of uint8."""
    found = []
    for start, shape, dtype in places:
        num_bytes = math.prod(shape) * dtype.itemsize
        if not num_bytes:
            found.append(torch.empty(shape, dtype=dtype))
        elif isinstance(memory, torch.Tensor):
            found.append(memory[start : start + num_bytes].view(dtype).view(shape))
        else:
            found.append(torch.frombuffer(memory[start : start + num_bytes], dtype=dtype).view(shape))
    return found


class WorkerProcess:
    """A process that writes files of staged tensors, started when it is needed, and again if it died.

    Args:
        descriptor: Of the memory that the tensors lie in.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the process if there is none, or none any more; returns at once."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter, with nothing of a user's in its arguments
                [sys.executable, "-c", "from tiepolicy_dcp._staging import main; main()", str(self._descriptor)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=[self._descriptor],
                # It finds what this process finds, and leaves GPUs alone.
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""},
            )

    def write(self, path: Path, places: Sequence[Place], *, digest: bool) -> Written:
        """Have a file written by the process that was started, and wait for it.

        Raises:
            CheckpointError: If the process cannot write it, or is gone; `start` then starts another one.
        """
        assert self._process is not None
        tensors = [[start, list(shape), str(dtype).removeprefix("torch.")] for start, shape, dtype in places]
        answer = _exchange(self._process, {"path": str(path), "tensors": tensors, "digest": digest})
        if answer is None:
            ended = self.close()
            raise CheckpointError(f"the process that wrote {path} is gone ({ended}). The next save starts another one")
        if "error" in answer:
            raise CheckpointError(f"{path} could not be written: {answer['error']}")
        return Written([(start, length) for start, length in answer["places"]], FileRecord(*answer["record"]))

    def close(self) -> str:
        """End the process, once it is idle; how it ended, for people."""
        if self._process is None:
            return "never started"
        self._process.communicate()
        code, self._process = self._process.returncode, None
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _exchange(process: "subprocess.Popen[str]", request: Mapping[str, Any]) -> dict[str, Any] | None:
    """Send one line and read one; None if there is nobody to answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        answer: dict[str, Any] = json.loads(process.stdout.readline())
    except (OSError, ValueError):
        return None
    return answer


def main() -> None:
    """Write what is asked for on standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the trainer, which then closes the pipe
    descriptor = int(sys.argv[1])
    for line in sys.stdin:
        answer = json.dumps(_answer(descriptor, json.loads(line)))
        try:
            print(answer, flush=True)  # noqa: T201 - the pipe
        except BrokenPipeError:  # nobody waits for it: the process that asked was killed
            os._exit(1)


def _answer(descriptor: int, request: Mapping[str, Any]) -> dict[str, Any]:
    places = [Place(start, tuple(shape), getattr(torch, dtype)) for start, shape, dtype in request["tensors"]]
    try:
        written = write_tensors(Path(request["path"]), views(mapped(descriptor), places), digest=request["digest"])
    except (OSError, ValueError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"places": written.places, "record": written.record}
