"""SIGKILL before every file operation of a save, and at random times: `LATEST` is the old or the new one, whole."""

import itertools
import multiprocessing
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from runs import Training, count_operations, fast_folder, forked, kill_before, latest, leftovers

from tiepolicy_dcp import CheckpointError, CheckpointStore


def save(root, step):
    """Publish, move `LATEST`, delete the checkpoint before."""
    with CheckpointStore(root, keep_last=1) as store:
        Training(step).save(store)


def save_consolidated(root, step):
    with CheckpointStore(root, keep_last=1) as store:
        Training(step).save(store, consolidated=True)


def save_in_thread(root, step):
    with CheckpointStore(root, keep_last=1) as store:
        Training(step).async_save(store, "thread").result()


def save_on_and_on(root, start, worker, connection):
    """Save step after step until killed, saying when each is done."""
    store = CheckpointStore(root, keep_last=2, keep_best=1)
    for step in itertools.count(start):
        training = Training(step)
        metrics = {"accept_length": step % 5}
        if worker is None:
            training.save(store, metrics=metrics)
        else:
            training.async_save(store, worker, metrics=metrics).result()
        connection.send(step)


def after_a_kill(root, child, *, before, timeout=60):
    """Wait for the child, look at what is there and save once more; whether it was killed, and the step after."""
    child.join(timeout)
    assert child.exitcode in (0, -signal.SIGKILL)
    found = latest(root)
    assert found in ({before, before + 1} if child.exitcode else {before + 1})
    save(root, before + 2)
    assert before + 2 == latest(root)
    assert set() == leftovers(root, checkpoints=[f"step_{before + 2}"])
    return child.exitcode != 0


def killed_before(root, work, number, *, before):
    """Whether an attempt to save ended at that file operation."""

    def attempt():
        kill_before(root, number)
        work(root, before + 1)

    return after_a_kill(root, forked(attempt), before=before)


def killed_after(root, work, seconds, *, before):
    """Whether an attempt to save was still under way then."""
    child = forked(work, root, before + 1)
    time.sleep(seconds)
    os.kill(child.pid, signal.SIGKILL)
    return after_a_kill(root, child, before=before)


def measured(root, work):
    """Seconds that a save takes here and now, as `step_1` after `step_0`."""
    save(root, 0)
    start = time.perf_counter()
    forked(work, root, 1).join()
    return time.perf_counter() - start


def test_a_save_killed_before_any_of_a_few_file_operations_leaves_the_old_or_the_new_checkpoint():
    moments = random.Random(0)
    with fast_folder() as root:
        save(root, 0)
        num_operations = count_operations(root, lambda: save_consolidated(root, 1))
        for attempt, number in enumerate(sorted(moments.sample(range(1, num_operations + 1), 8))):
            assert killed_before(root, save_consolidated, number, before=1 + 2 * attempt), number


@pytest.mark.slow
@pytest.mark.parametrize("work", [save_consolidated, save_in_thread])
def test_a_save_killed_before_any_file_operation_leaves_the_old_or_the_new_checkpoint(work):
    with fast_folder() as root:
        save(root, 0)
        num_operations = count_operations(root, lambda: work(root, 1))
        kills = [killed_before(root, work, number, before=2 * number - 1) for number in range(1, num_operations + 1)]
    print(f"{sum(kills)} kills, one before each file operation")
    assert num_operations == sum(kills) > 40


@pytest.mark.slow
@pytest.mark.parametrize(("work", "num_kills"), [(save, 40), (save_consolidated, 40), (save_in_thread, 40)])
def test_a_save_killed_at_a_random_time_leaves_the_old_or_the_new_checkpoint(work, num_kills):
    moments = random.Random(work.__name__)
    with fast_folder() as root:
        seconds = measured(root, work)
        kills = [
            killed_after(root, work, moments.uniform(0, seconds), before=1 + 2 * attempt)
            for attempt in range(num_kills)
        ]
    print(f"seed {work.__name__!r}: {sum(kills)} of {num_kills} kills came within {seconds:.3f} s, before the end")
    assert sum(kills) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("worker", "num_kills"), [(None, 15), ("thread", 15), ("process", 10)])
def test_a_run_killed_at_a_random_time_goes_on_from_the_last_save_or_the_one_under_way(worker, num_kills):
    moments = random.Random(str(worker))
    start = 0
    with fast_folder() as root:
        for _ in range(num_kills):
            done = killed_after_a_while(root, start, worker, moments.uniform(0, 0.1))
            found = latest(root)
            assert found in (done, done + 1)
            store = CheckpointStore(root)
            assert dict.fromkeys(store.names(), True) == {
                name: name == f"step_{latest(root, name)}" for name in store.names()
            }
            assert latest(root, "BEST") % 5 >= found % 5
            start = found + 1
        save(root, start)
        assert set() == leftovers(root, checkpoints=[f"step_{start}", store.resolve("BEST").name])


@pytest.mark.slow
def test_a_worker_killed_at_a_random_time_is_one_sentence_and_the_next_save_starts_another():
    moments = random.Random("worker")
    outcomes = []
    with fast_folder() as root, CheckpointStore(root, keep_last=1) as store:
        Training(0).async_save(store, "process").result()
        for step in range(1, 9, 2):
            (worker,) = children()
            if step % 4 == 1:  # it has not begun
                os.kill(worker, signal.SIGSTOP)
            pending = Training(step).async_save(store, "process")
            time.sleep(moments.uniform(0, 0.01))
            os.kill(worker, signal.SIGKILL)
            with suppress(ChildProcessError):  # the store has waited for it first
                os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)
            error = pending._future.exception(timeout=60)
            outcomes.append("saved" if error is None else str(error).partition(" is gone ")[2])
            with suppress(CheckpointError):  # told once more, here
                pending.result()
            assert step - (error is not None) == latest(root)
            Training(step + 1).async_save(store, "process").result()
            assert step + 1 == latest(root)
            assert set() == leftovers(root, checkpoints=[f"step_{step + 1}"])
    print(outcomes)
    assert {"saved", "(killed by SIGKILL). The next save starts another one"} >= set(outcomes) != {"saved"}


def killed_after_a_while(root, start, worker, seconds):
    """Let a child save for some time after its first save; the last step that it said was done."""
    receive, send = multiprocessing.Pipe(duplex=False)
    child = forked(save_on_and_on, root, start, worker, send)
    send.close()
    done = receive.recv()
    time.sleep(seconds)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    with suppress(EOFError):
        while True:
            done = receive.recv()
    return done


def children():
    """The processes that this one started and that still live."""
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
