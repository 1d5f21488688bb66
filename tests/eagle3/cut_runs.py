"""Runs that a test cuts: the command line's own `main`, each in processes that can be sent real signals.

They are forked from one process that has imported the trainer already, as its imports take four of five seconds.
"""

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["eagle3.cli", "eagle3.trainer", "cut_runs"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A run under way, and the file that its processes print to."""

    processes: Sequence[BaseProcess]
    log: Path

    @property
    def is_over(self) -> bool:
        """Whether all processes have ended."""
        return all(process.exitcode is not None for process in self.processes)

    def send(self, number: signal.Signals, *, to: Sequence[int]) -> None:
        """A signal to some of the processes, by rank."""
        for rank in to:
            pid = self.processes[rank].pid
            assert pid is not None
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, *, seconds: float = 60) -> list[int | None]:
        """The exit codes, by rank; None for a process that has not ended in time."""
        for process in self.processes:
            process.join(seconds)
        return [process.exitcode for process in self.processes]


@contextmanager
def started(arguments: Sequence[str], *, num_processes: int, log: Path) -> Iterator[Started]:
    """`eagle3 ARGUMENTS` in several processes, as torchrun would start them; what is left at the end is killed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    rendezvous = {"WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes, "MASTER_ADDR": "localhost"}
    places = [{**rendezvous, "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank} for rank in range(num_processes)]
    processes = [
        _CONTEXT.Process(target=_run, args=(list(arguments), place if num_processes > 1 else {}, log))
        for place in places
    ]
    for process in processes:
        process.start()
    try:
        yield Started(processes=processes, log=log)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _run(arguments: list[str], environment: dict[str, object], log: Path) -> None:
    from eagle3.cli import main

    os.environ.update({name: str(value) for name, value in environment.items()})
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main(arguments))
