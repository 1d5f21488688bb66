"""A run that is saved, killed and looked at: small, made from its step alone, so that any mixture of two is seen.

Attempts are forked from the process of the tests, which has imported torch once.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from models import TiedPair
from tiepolicy_dcp import CheckpointStore

#: What a root holds beside checkpoints, after a save that went through.
OF_THE_STORE = {"LATEST", "BEST", ".pointers", ".lock", ".writer"}


class Training:
    """A model, its optimizer and what else is saved, every number of which follows from the step."""

    def __init__(self, step):
        generator = torch.Generator().manual_seed(step)
        self.step = step
        self.model = TiedPair(vocab_size=64, hidden_size=8)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3 * (1 + step))
        (weight,) = self.model.parameters()
        with torch.no_grad():
            weight.copy_(torch.rand(weight.shape, generator=generator))
        moments = {key: torch.rand(weight.shape, generator=generator) for key in ("exp_avg", "exp_avg_sq")}
        self.optimizer.state[weight] = {"step": torch.tensor(float(step)), **moments}
        self.extra = {"step": step, "rng": torch.rand(16, generator=generator)}

    def tensors(self):
        """All of it, by name."""
        (state,) = self.optimizer.state.values()
        lr = torch.tensor(self.optimizer.param_groups[0]["lr"], dtype=torch.float64)
        return {**self.model.state_dict(), **state, "rng": self.extra["rng"], "lr": lr}

    def save(self, store, *, consolidated=False, metrics=None):
        """Save it in a store as `step_N`."""
        store.save(
            f"step_{self.step}",
            model=self.model,
            optimizer=self.optimizer,
            extra=self.extra,
            consolidated=consolidated,
            metrics=metrics,
        )

    def async_save(self, store, worker, *, metrics=None):
        """The same in the background."""
        return store.async_save(
            f"step_{self.step}",
            model=self.model,
            optimizer=self.optimizer,
            extra=self.extra,
            worker=worker,
            metrics=metrics,
        )


def latest(root, reference="LATEST"):
    """The step that a checkpoint holds, after everything in it was found to be that step's, bit for bit."""
    folder = CheckpointStore(root).resolve(reference)
    step = read(root, reference)
    assert f"step_{step}" == folder.name
    if (folder / "model.safetensors").exists():
        (tensor,) = load_file(folder / "model.safetensors").values()
        assert torch.equal(Training(step).model.lm_head.weight, tensor)
    return step


def read(root, reference):
    """The same of what a store loads, while another process may write there."""
    found = Training(1 << 20)
    restored = CheckpointStore(root).load(reference, model=found.model, optimizer=found.optimizer)
    found.extra = dict(restored.extra)
    expected = Training(restored.extra["step"]).tensors()
    assert dict.fromkeys(expected, True) == {
        name: torch.equal(expected[name], tensor) for name, tensor in found.tensors().items()
    }
    return restored.extra["step"]


def leftovers(root, *, checkpoints):
    """What lies under a root and belongs to nothing."""
    names = {path.name for path in root.iterdir()} - OF_THE_STORE - set(checkpoints)
    return names - {(root / ".pointers").readlink().name}


@contextmanager
def fast_folder():
    """A folder in memory where there is one: a kill loses nothing that was written, whatever the disk."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def forked(work, *arguments):
    """A child that does something and leaves; nothing of the parent's end is run in it."""

    def run():
        work(*arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    return child


def on_events(root, act):
    """From now on, call something before every file operation under a root, with its number from 1.

    Python's own audit hooks tell of them. They cannot be taken back, so this is for children.
    """
    inside = str(root)
    number = 0

    def hook(event, arguments):
        nonlocal number
        by_name = event in ("open", "os.rename", "os.mkdir", "os.symlink", "os.listdir", "os.scandir")
        if not (by_name and any(inside in str(argument) for argument in arguments)) and (
            # Deleting a tree names what it deletes within an open folder.
            event not in ("os.remove", "os.rmdir", "fcntl.flock")
        ):
            return
        number += 1
        act(number)

    sys.addaudithook(hook)


def kill_before(root, number):
    """Kill this process with SIGKILL before the given file operation under a root."""
    on_events(root, lambda count: os.kill(os.getpid(), signal.SIGKILL) if count == number else None)


def count_operations(root, work):
    """How many file operations a piece of work does under a root; it is done in a child."""
    receive, send = multiprocessing.Pipe(duplex=False)

    def counted():
        counts = []
        on_events(root, counts.append)
        work()
        send.send(len(counts))

    child = forked(counted)
    count = receive.recv()
    child.join()
    return count
