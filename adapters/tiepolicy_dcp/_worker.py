"""Step 22, another process that writes files, and how to talk to it.

The tensors lie in memory that both processes map; what is said is JSON, a line each way for each file.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tiepolicy.files import FileRecord
from tiepolicy_dcp._files import Written, write_tensors
from tiepolicy_dcp._staging import Place, mapped, views
from tiepolicy_dcp.errors import CheckpointError


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
                [sys.executable, "-c", "from tiepolicy_dcp._worker import main; main()", str(self._descriptor)],
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
