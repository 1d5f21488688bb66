"""SIGKILL of one rank, or of all: `LATEST` is whole, and the rank that survives ends with one sentence."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch.distributed as dist
from runs import Training, count_operations, fast_folder, forked, kill_before, latest, leftovers

from tiepolicy_dcp import CheckpointStore, LostRankError

pytestmark = pytest.mark.slow

#: Seconds within which the kernel tells a rank that its peer is gone; a minute is what a busy machine may need.
BOUND = 60


def save_together(root, step, rank, connection, *, worker=None, kill_at=None):
    """What one of two ranks does: two saves, with word after the first, and how the second ended."""
    dist.init_process_group("gloo", init_method=f"file://{root}.{step}", rank=rank, world_size=2)
    try:
        with CheckpointStore(root, keep_last=1) as store:
            save(store, step, worker)
            dist.barrier()
            connection.send("met")
            if kill_at is not None:
                kill_before(root, kill_at)
            save(store, step + 1, worker)
            connection.send("saved")
    except LostRankError as error:
        connection.send(str(error))


def save(store, step, worker):
    if worker is None:
        Training(step).save(store, consolidated=True)
    else:
        Training(step).async_save(store, worker).result()


class Attempt:
    """A save of two ranks, forked."""

    def __init__(self, root, step, **of_rank_0):
        self.connections, self.children = [], []
        for rank in range(2):
            receive, send = multiprocessing.Pipe(duplex=False)
            options = of_rank_0 if rank == 0 else {"worker": of_rank_0.get("worker")}
            self.children.append(
                forked(lambda rank=rank, send=send, options=options: save_together(root, step, rank, send, **options))
            )
            self.connections.append(receive)
            send.close()
        assert ["met", "met"] == [connection.recv() for connection in self.connections]

    def kill(self, *ranks):
        for rank in ranks:
            os.kill(self.children[rank].pid, signal.SIGKILL)

    def outcomes(self):
        """By rank: "killed", "saved" or a sentence; each within the bound."""
        outcomes = []
        for child, connection in zip(self.children, self.connections, strict=True):
            child.join(BOUND)
            assert child.exitcode in (0, -signal.SIGKILL)
            outcomes.append("killed" if child.exitcode else connection.recv())
        return outcomes


def check(root, outcomes, *, before):
    """What is true after each attempt, and after one more save."""
    found = latest(root)
    assert found == before + 1 if outcomes[0] == "saved" else found in (before, before + 1)
    for sentence in set(outcomes) - {"killed", "saved"}:
        assert 1 == sentence.count("another rank of this run is gone or cannot be reached (")
        assert sentence.endswith("end the processes that remain, and start again from the latest one")
        assert (sentence.isascii(), 0) == (True, sentence.count("\n"))
    with CheckpointStore(root, keep_last=1) as store:
        Training(before + 2).save(store)
    assert before + 2 == latest(root)
    assert set() == leftovers(root, checkpoints=[f"step_{before + 2}"])


def save_twice(root):
    with CheckpointStore(root, keep_last=1) as store:
        save(store, 1, None)
        save(store, 2, None)


def test_rank_0_killed_before_any_file_operation():
    told = 0
    with fast_folder() as root:
        num_operations = count_operations(root, lambda: save_twice(root)) // 2
        for attempt, number in enumerate(range(1, num_operations + 1, 2), start=1):
            outcomes = Attempt(root, 3 * attempt, kill_at=number).outcomes()
            told += outcomes[1] not in ("killed", "saved")
            check(root, outcomes, before=3 * attempt)
    print(f"the other rank told of {told} deaths")
    assert told > 20


@pytest.mark.parametrize(("ranks", "worker", "num_kills"), [((1,), None, 15), ((1,), "thread", 15), ((0, 1), None, 10)])
def test_ranks_killed_at_a_random_time(ranks, worker, num_kills):
    moments = random.Random(f"{ranks} {worker}")
    outcomes = []
    with fast_folder() as root:
        both = Attempt(root, 0, worker=worker)
        start = time.perf_counter()
        assert ["saved", "saved"] == both.outcomes()
        seconds = time.perf_counter() - start
        for attempt in range(1, num_kills + 1):
            both = Attempt(root, 3 * attempt, worker=worker)
            time.sleep(moments.uniform(0, seconds / 2))
            both.kill(*ranks)
            outcomes.append(both.outcomes())
            check(root, outcomes[-1], before=3 * attempt)
    told = sum(outcome not in ("killed", "saved") for of_ranks in outcomes for outcome in of_ranks)
    print(f"within {seconds:.3f} s: {told} survivors told of a death")
    assert any("killed" in of_ranks for of_ranks in outcomes)
