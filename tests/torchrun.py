"""Starts real processes under torchrun, for the tests of what ranks do together."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist


def torchrun(*arguments: str | Path, num_processes: int, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a script, or `-m module`, on gloo in several processes; output and errors as one text.

    Args:
        arguments: What comes after torchrun's own options.
        num_processes: World size.
        timeout: Seconds until all processes are killed and the test fails.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
        # More processes than GPUs is the rule here.
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(
        [*command, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started; the process ends with the block, 0 if it went through.

    gloo's threads may still hold tensors of the last collective. One that lets go of them while the interpreter shuts
    down aborts a process whose work is done ("terminate called without an active exception", torch 2.13).
    """
    dist.init_process_group("gloo")
    yield
    dist.destroy_process_group()
    leave()


def leave() -> NoReturn:
    """End a process whose work is done without the interpreter's shutdown, see `process_group`."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
