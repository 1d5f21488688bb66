"""A run that is cut again and again, at random places, ends with the losses and the bits of one that was not."""

import os
import random
import signal
import subprocess
import sys
import time

import cut_runs
import pytest

from eagle3_runs import make_run_world, metrics_of
from tiepolicy_dcp import CheckpointStore
from torchrun import torchrun

pytestmark = [pytest.mark.slow, pytest.mark.dist]

NUM_CUTS = 20
NUM_STEPS = 80
SETTINGS = (
    *("--data.max_length", "48", "--draft.vocab_size", "96", "--unroll.steps", "3", "--train.lr", "0.01"),
    *("--train.log_every", "1", "--train.epochs", "16", "--checkpoint.every_steps", "2", "--checkpoint.keep_last", "2"),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Ten conversations: a process of batches of two takes five steps per epoch, and so do two of one."""
    return make_run_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def for_one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))


def run_uncut(arguments, *, num_processes):
    """As a person starts it: `python -m eagle3`, or torchrun for several processes."""
    if num_processes > 1:
        result = torchrun("-m", "eagle3", *arguments, num_processes=num_processes)
    else:
        command = [sys.executable, "-m", "eagle3", *arguments]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert 0 == result.returncode, result.stdout


def steps_logged(out):
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def cut(arguments, out, chance, *, at, num_processes):
    """Start the run, and send a signal to one or all of its processes soon after it has logged a step.

    Returns:
        Whether the run was still under way when the signal was sent.
    """
    number = chance.choice([signal.SIGTERM, signal.SIGKILL])
    victims = chance.choice([[rank] for rank in range(num_processes)] + [list(range(num_processes))])
    seconds = chance.uniform(0, 0.05)
    with cut_runs.started(arguments, num_processes=num_processes, log=out.with_suffix(".log")) as run:
        first = None
        while not run.is_over:
            logged = steps_logged(out)
            # What a killed run logged is dropped when the next one starts.
            first = logged if first is None else min(first, logged)
            if logged >= max(at, first + 1):
                break
            time.sleep(0.002)
        time.sleep(seconds)
        was_running = not run.is_over
        run.send(number, to=victims)
        codes = run.wait()
    print(f"{number.name} to {victims} {seconds:.3f} s after step {logged}: exit codes {codes}")
    assert None not in codes, "a process went on without the others"
    output = run.log.read_text()
    if number is signal.SIGTERM:
        assert {0} == set(codes), output
    else:
        # Who is left says in one sentence that another one is gone.
        assert [-signal.SIGKILL if rank in victims else 2 for rank in range(num_processes)] == codes, output
    assert "Traceback" not in output
    return was_running


def files_of(out):
    """The bytes of every tensor of the last checkpoint: weights and optimizer of all ranks."""
    folder = CheckpointStore(out / "checkpoints").resolve("LATEST")
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.distcp"))}


@pytest.mark.parametrize(
    ("num_processes", "cached", "options"),
    [
        (1, False, ()),
        (1, True, ("--checkpoint.async_save",)),
        (2, False, ()),
        (2, True, ("--parallel.kind", "shard", "--checkpoint.async_save")),
    ],
    ids=["one online", "one cached", "two online", "two cached"],
)
def test_twenty_cuts_leave_no_trace_in_losses_and_weights(world, tmp_path, num_processes, cached, options):
    batch_size = str(2 // num_processes)
    given = ("--target.model", world[0], "--data.train", world[1], *SETTINGS, "--train.batch_size", batch_size)
    if cached:
        given = (*given, "--target.cache", tmp_path / "states")
        run_uncut(["cache", "--out", str(tmp_path / "whole"), *map(str, given)], num_processes=1)
    arguments = ["train", *map(str, (*given, *options)), "--out"]
    run_uncut([*arguments, str(tmp_path / "whole")], num_processes=num_processes)

    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance, out = random.Random(seed), tmp_path / "cut"
    for at in sorted(chance.sample(range(1, NUM_STEPS - NUM_CUTS), NUM_CUTS)):
        begun = (out / "checkpoints" / "LATEST").exists()
        again = ("--checkpoint.restore_from", "LATEST") if begun else ()
        assert cut([*arguments, str(out), *again], out, chance, at=at, num_processes=num_processes)
    run_uncut([*arguments, str(out), "--checkpoint.restore_from", "LATEST"], num_processes=num_processes)

    assert NUM_STEPS == len(metrics_of(out))
    assert metrics_of(tmp_path / "whole") == metrics_of(out)
    expected, actual = files_of(tmp_path / "whole"), files_of(out)
    assert num_processes == len(expected)
    assert list(expected) == list(actual)
    assert [True] * len(expected) == [expected[name] == actual[name] for name in expected]
