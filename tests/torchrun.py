"""Starts real processes under torchrun, for the tests of what ranks do together."""

import os
import subprocess
import sys
from pathlib import Path


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
