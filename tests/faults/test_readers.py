"""Readers, writers and saves that overtake each other on one root."""

import multiprocessing

import pytest
from runs import Training, count_operations, fast_folder, forked, latest, leftovers, on_events, read

from tiepolicy_dcp import CheckpointError, CheckpointStore


def overtaken_before(root, number, reference):
    """Read, and just before that file operation let a writer publish the next checkpoint and prune the one read.

    Returns:
        The step that was read, or the sentence that says why none was.
    """
    receive, send = multiprocessing.Pipe(duplex=False)

    def overtaken():
        with CheckpointStore(root, keep_last=1) as writer:
            busy = []

            def publish(count):
                if count == number and not busy:
                    busy.append(count)
                    Training(latest(root) + 1).save(writer)

            before = latest(root)
            on_events(root, publish)
            try:
                send.send(read(root, reference or f"step_{before}"))
            except CheckpointError as error:
                send.send(str(error))

    child = forked(overtaken)
    send.close()
    found = receive.recv()
    child.join()
    return found


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_the_latest_is_read_whole_whenever_a_writer_publishes_and_prunes(every):
    with fast_folder() as root:
        with CheckpointStore(root) as store:
            Training(0).save(store)
        num_operations = count_operations(root, lambda: read(root, "LATEST"))
        steps = []
        for number in range(1, num_operations + 1, every):
            before = latest(root)
            steps.append(overtaken_before(root, number, "LATEST"))
            assert steps[-1] in (before, before + 1)
    print(f"overtaken before each of {len(steps)} file operations")
    assert len(steps) > 1


@pytest.mark.slow
def test_a_checkpoint_that_is_pruned_while_it_is_read_by_name_is_read_whole_or_said_to_be_gone():
    with fast_folder() as root:
        with CheckpointStore(root) as store:
            Training(0).save(store)
        num_operations = count_operations(root, lambda: read(root, "LATEST"))
        outcomes = []
        for number in range(1, num_operations + 1):
            before = latest(root)
            outcomes.append(overtaken_before(root, number, None))
            gone = (
                f"{root / f'step_{before}'} was deleted while it was read, as its writer keeps fewer checkpoints; the "
                "model may be filled in part. Load LATEST, or have the writer keep more"
            )
            never_there = f"there is no checkpoint 'step_{before}': {root} holds step_{before + 1}"
            assert outcomes[-1] in (before, gone, never_there)
    assert {int, str} == {type(outcome) for outcome in outcomes}


@pytest.mark.slow
def test_a_reader_of_the_latest_never_fails_beside_a_writer_that_never_rests():
    with fast_folder() as root:
        with CheckpointStore(root) as store:
            Training(0).save(store)

        def write():
            with CheckpointStore(root, keep_last=1) as store:
                for step in range(1, 150):
                    Training(step).save(store)

        writer = forked(write)
        seen = [0]
        while writer.is_alive():
            seen.append(read(root, "LATEST"))
            assert seen[-2] <= seen[-1]
        assert 149 == latest(root)
    print(f"{len(seen)} loads saw {len(set(seen))} checkpoints")
    assert len(set(seen)) > 2


def test_of_processes_that_begin_to_write_at_one_moment_one_is_let_in():
    with fast_folder() as root:
        barrier = multiprocessing.get_context("fork").Barrier(3)
        receive, send = multiprocessing.Pipe(duplex=False)

        def write(step):
            store = CheckpointStore(root)
            training = Training(step)
            barrier.wait()
            try:
                training.save(store)
                outcome = f"saved step_{step}"
            except CheckpointError as error:
                outcome = str(error)
            barrier.wait()  # nobody gives the root back before all have tried
            send.send(outcome)

        writers = [forked(write, step) for step in range(3)]
        outcomes = sorted(receive.recv() for _ in writers)
        for writer in writers:
            writer.join()
        refused = [outcome for outcome in outcomes if "and two writers would destroy each other's" in outcome]
        assert 2 == len(refused)
        (saved,) = set(outcomes) - set(refused)
        assert f"saved step_{latest(root)}" == saved
        assert set() == leftovers(root, checkpoints=[f"step_{latest(root)}"])


def test_background_saves_that_overtake_each_other_are_published_in_order():
    with fast_folder() as root, CheckpointStore(root, keep_last=2) as store:
        pending = [Training(step).async_save(store, "thread") for step in range(6)]
        assert [True] * 5 == [save.done() for save in pending[:5]]
        assert [root / f"step_{step}" for step in range(6)] == [save.result() for save in pending]
        assert 5 == latest(root)
        assert ["step_4", "step_5"] == store.names()
