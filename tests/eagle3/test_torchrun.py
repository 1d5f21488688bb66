"""What torchrun does to a run, and a run to torchrun: errors, signals, kills, and several machines."""

import json
import re
import signal
import socket

import pytest

from eagle3_runs import make_run_world, metrics_of
from tiepolicy_dcp import CheckpointStore
from torchrun import read_until, started, torchrun

pytestmark = pytest.mark.dist

TWO_PROCESSES = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
SETTINGS = (
    *("--data.max_length", "48", "--draft.vocab_size", "96", "--unroll.steps", "3", "--train.lr", "0.01"),
    *("--train.log_every", "1", "--log.tensorboard", "false"),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_run_world(tmp_path_factory.mktemp("world"))


def arguments(world, out, *options):
    given = ("--out", out, "--target.model", world[0], "--data.train", world[1], *SETTINGS, *options)
    return ["-m", "eagle3", "train", *map(str, given)]


def latest_of(out):
    return CheckpointStore(out / "checkpoints").resolve("LATEST").name


def test_an_input_error_is_said_once_and_stands_in_the_report_of_torchrun(world, tmp_path):
    result = torchrun(*arguments((world[0], "nowhere.jsonl"), tmp_path / "run"), num_processes=2)
    sentence = "nowhere.jsonl cannot be read: No such file or directory. Give the path of a JSONL or Parquet file."
    assert 1 == result.returncode  # torchrun's own, for whatever its processes end with
    assert [f"eagle3: error: {sentence}"] == re.findall("eagle3: error: .*", result.stdout)
    assert 2 == len(re.findall(r"exitcode  : 2 ", result.stdout))
    assert 2 == result.stdout.count(f"traceback : {sentence}")
    assert 'Traceback (most recent call last):\n  File "<frozen runpy>' in result.stdout  # torchrun's, and no other
    assert 1 == result.stdout.count("Traceback")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_a_mistyped_setting_is_said_once(world, tmp_path):
    result = torchrun(*arguments(world, tmp_path / "run", "--train.epoch", "3"), num_processes=2)
    sentence = "eagle3: error: train.epoch is unknown; did you mean train.epochs?"
    assert [sentence] == re.findall("eagle3: error: .*", result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_ends_in_a_checkpoint_from_which_the_run_goes_on(world, tmp_path, number):
    options = ("--train.epochs", "40", "--train.batch_size", "5")
    with started(
        "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments(world, tmp_path, *options)
    ) as process:
        read_until(process, "epoch 1 step 1/40")
        process.send_signal(number)
        rest = process.stdout.read()
        process.wait(60)
    (stop,) = re.findall(
        rf"Stopped by {number.name} after step (\d+) of 40\. Go on with --checkpoint.restore_from", rest
    )
    assert f"epoch_{stop}_step_{stop}" == latest_of(tmp_path)
    further = ("--train.epochs", str(int(stop) + 2), "--train.batch_size", "5", "--checkpoint.restore_from", "LATEST")
    result = torchrun(*arguments(world, tmp_path, *further), num_processes=2)
    assert 0 == result.returncode, result.stdout
    assert list(range(1, int(stop) + 3)) == [entry["step"] for entry in metrics_of(tmp_path)]


@pytest.mark.slow
def test_processes_of_a_killed_torchrun_end_and_the_run_goes_on(world, tmp_path):
    options = ("--train.epochs", "400", "--train.batch_size", "5", "--checkpoint.every_steps", "1")
    with started(
        "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments(world, tmp_path, *options)
    ) as process:
        read_until(process, "Saved checkpoint to")
        process.kill()
        # The processes hold the pipe: it ends when both have ended.
        rest = process.stdout.read()
    assert "eagle3: the process that started this one is gone; stopping without a save" in rest
    step = int(latest_of(tmp_path).rpartition("_")[2])
    further = ("--train.epochs", str(step + 1), "--train.batch_size", "5", "--checkpoint.restore_from", "LATEST")
    result = torchrun(*arguments(world, tmp_path, *further), num_processes=2)
    assert 0 == result.returncode, result.stdout
    assert list(range(1, step + 2)) == [entry["step"] for entry in metrics_of(tmp_path)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["data", "hybrid"])
def test_two_machines_learn_what_one_process_does(world, tmp_path, kind):
    """Two agents on one machine, as two machines would have them; `hybrid` shards within each of them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = ("--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}")
    options = ("--train.batch_size", "1", "--parallel.kind", kind)
    run = [
        "torch.distributed.run",
        *launch,
        "--rdzv-id=run",
        "--local-addr=localhost",
        *arguments(world, tmp_path / "two", *options),
    ]
    with started(*run) as first, started(*run) as second:
        outputs = [process.communicate(timeout=200)[0] for process in (first, second)]
    assert [0, 0] == [first.returncode, second.returncode], outputs
    assert 1 == sum("processes 4" in output for output in outputs)
    result = torchrun(*arguments(world, tmp_path / "one", "--train.batch_size", "4"), num_processes=1)
    assert 0 == result.returncode, result.stdout
    expected, actual = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert [pytest.approx(entry["loss"], rel=1e-4) for entry in expected] == [entry["loss"] for entry in actual]
    extra = json.loads((tmp_path / "two" / "checkpoints" / "epoch_1_step_3" / "extra.json").read_text())
    assert (4, kind) == (len(extra["rng"]), extra["config"]["parallel"]["kind"])
