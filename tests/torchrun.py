"""Starts real processes under torchrun, for the tests of what ranks do together."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist


def torchrun(
    *arguments: str | Path, num_processes: int, on_gpus: bool = False, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run a script, or `-m module`, in several processes; output and errors as one text.

    Args:
        arguments: What comes after torchrun's own options.
        num_processes: World size.
        on_gpus: Let each process see the GPUs, see `share_gpus`; otherwise they see none.
        timeout: Seconds until all processes are killed and the test fails.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    if not on_gpus:  # more processes than GPUs is the rule here
        environment["CUDA_VISIBLE_DEVICES"] = ""
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
def started(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """`python -m` as a child that can be signalled; its output as lines. It is killed at the end, if it still runs."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", *map(str, arguments)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """What a process prints up to the line that holds a text, which must come."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError("".join(lines))


def results_of(
    script: Path, folder: Path, cases: Iterable[str], *, num_processes: int, on_gpus: bool = False
) -> dict[str, dict[str, Any]]:
    """What a script's first rank writes of each case into `results.jsonl` of the folder, by the case's name.

    Several cases in one start: starting processes takes longer than most of what they do. A file, since what several
    processes print at once ends in one another's lines.
    """
    results_file = folder / "results.jsonl"
    results_file.unlink(missing_ok=True)
    output = torchrun(script, folder, *cases, num_processes=num_processes, on_gpus=on_gpus)
    assert output.returncode == 0, output.stdout
    return {result["case"]: result for result in map(json.loads, results_file.read_text().splitlines())}


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started: by NCCL where they see GPUs, else by gloo.

    The process ends with the block, 0 if it went through. gloo's threads may still hold tensors of the last collective.
    One that lets go of them while the interpreter shuts down aborts a process whose work is done ("terminate called
    without an active exception", torch 2.13).
    """
    if device_type() == "cuda":
        share_gpus()
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    else:
        dist.init_process_group("gloo")
    yield
    dist.destroy_process_group()
    leave()


def share_gpus() -> None:
    """Where there are fewer GPUs than processes, make each of these a machine of its own that has the first GPU.

    NCCL refuses two ranks of one machine on one GPU.
    """
    if torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        os.environ |= {"NCCL_HOSTID": os.environ["RANK"], "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def device_type() -> str:
    """Where the processes that torchrun started have their tensors."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def leave() -> NoReturn:
    """End a process whose work is done without the interpreter's shutdown, see `process_group`."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
