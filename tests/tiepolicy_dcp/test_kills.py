"""A process is killed wherever it is in saving, pointing and deleting: what LATEST names is whole."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from models import TiedPair
from tiepolicy_dcp import CheckpointStore


def filled(step):
    """A model all of whose elements say which step it is."""
    model = TiedPair(vocab_size=20_000)
    with torch.no_grad():
        model.lm_head.weight.fill_(step)
    return model


def save_until_killed(root, start, background, connection):
    """Saves step after step, saying when each is done."""
    store = CheckpointStore(root, keep_last=2, keep_best=1)
    for step in range(start, start + 10_000):
        arguments = {"model": filled(step), "metrics": {"accept_length": step % 5}}
        if background:
            store.async_save(f"step_{step}", **arguments).result()
        else:
            store.save(f"step_{step}", **arguments)
        connection.send(step)


def killed_at(root, start, background, seconds):
    """Let another process save for some time after its first save; the last step that it said was done."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=save_until_killed, args=(root, start, background, send)
    )
    process.start()
    send.close()
    done = receive.recv()
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    try:
        while True:
            done = receive.recv()
    except EOFError:
        return done


def loaded(store, reference):
    """The only value in a checkpoint, after all its digests were checked."""
    model = filled(-1)
    store.load(reference, model=model)
    (value,) = model.lm_head.weight.unique().tolist()
    return value


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True], ids=["save", "async_save"])
def test_a_kill_at_any_moment_leaves_the_latest_or_the_one_before_it(tmp_path, background):
    moments = random.Random(background)
    store = CheckpointStore(tmp_path)
    start = 0
    for _ in range(10):
        done = killed_at(tmp_path, start, background, moments.uniform(0, 0.2))
        latest = int(store.resolve("LATEST").name.removeprefix("step_"))
        assert done <= latest <= done + 1
        assert latest == loaded(store, "LATEST")
        for name in store.names():  # what has a name is whole
            assert f"step_{loaded(store, name):.0f}" == name
        assert loaded(store, "BEST") % 5 >= latest % 5
        start = latest + 1
    with CheckpointStore(tmp_path, keep_last=1) as after:
        after.save("last", model=filled(start))
        assert [] == [path for path in tmp_path.iterdir() if path.suffix in (".unfinished", ".doomed")]
        assert start == loaded(after, "LATEST")
