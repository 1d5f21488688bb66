"""A disk that is full, or fails, while a run saves: what is kept, what is said, and when training goes on."""

import json
import logging
import resource
import signal
import subprocess
from contextlib import contextmanager

import pytest

from eagle3.trainer import train
from eagle3_runs import ALONE, config_of, make_run_world, metrics_of, weights_of
from tiepolicy.errors import CheckpointError as StoreError
from tiepolicy_dcp import CheckpointStore
from torchrun import read_until, started

SETTINGS = (
    *("--data.max_length", "48", "--draft.vocab_size", "96", "--unroll.steps", "3", "--train.lr", "0.01"),
    *("--train.log_every", "1", "--checkpoint.every_steps", "2", "--checkpoint.keep_last", "1"),
    *("--train.epochs", "400"),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_run_world(tmp_path_factory.mktemp("world"))


def store_of(out):
    return CheckpointStore(out / "checkpoints")


class Lifting(logging.Handler):
    """Gives files their size back as soon as training went on without a checkpoint."""

    def emit(self, record):
        if "Training goes on" in record.getMessage():
            limit_files(resource.RLIM_INFINITY)


def limit_files(num_bytes):
    """The kernel refuses larger files of this process from now on, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextmanager
def small_files():
    logger, handler = logging.getLogger("eagle3"), Lifting()
    logger.addHandler(handler)
    limit_files(64 * 1024)
    try:
        yield
    finally:
        limit_files(resource.RLIM_INFINITY)
        logger.removeHandler(handler)


@pytest.mark.parametrize("in_background", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_goes_on_without_a_checkpoint_if_the_config_says_so(world, tmp_path, caplog, in_background):
    """It takes the same steps as a run on a good disk; the next checkpoint that is due is saved again."""
    train(config_of(world, tmp_path / "good"), ALONE)
    options = {"every_steps": 2, "async_save": in_background, "on_error": "continue"}
    with small_files():
        train(config_of(world, tmp_path / "bad", **options), ALONE)
    names = ["epoch_1_step_4", "epoch_1_step_5", "epoch_2_step_10", "epoch_2_step_6", "epoch_2_step_8"]
    assert names == store_of(tmp_path / "bad").names()
    (warning,) = [message for message in caplog.messages if "Training goes on" in message]
    assert "epoch_1_step_2 could not be written: " in warning
    assert "Nothing was kept. Training goes on, as checkpoint.on_error is continue" in warning
    assert metrics_of(tmp_path / "good") == metrics_of(tmp_path / "bad")
    expected, actual = (weights_of(tmp_path / name, "epoch_2_step_10")["fc.weight"] for name in ("good", "bad"))
    assert expected.tolist() == actual.tolist()


@pytest.mark.parametrize("in_background", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_last_checkpoint_that_cannot_be_written_is_an_error_whatever_the_config_says(world, tmp_path, in_background):
    config = config_of(world, tmp_path, epochs=1, on_error="continue", async_save=in_background)
    limit_files(64 * 1024)
    try:
        with pytest.raises(StoreError, match=r"epoch_1_step_5 could not be written: "):
            train(config, ALONE)
    finally:
        limit_files(resource.RLIM_INFINITY)
    assert [] == store_of(tmp_path).names()


@contextmanager
def disk(folder, *, megabytes):
    """A small disk of its own."""
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
    mounted = subprocess.run(options, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(folder):
    """A file that takes all the room that a disk has left."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return path


def eagle3(command, world, out, *options):
    """A command as a person starts it."""
    given = ("--out", out, "--target.model", world[0], "--data.train", world[1], *SETTINGS, *options)
    return started("eagle3", command, *given)


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_with_one_sentence_and_the_checkpoint_before(world, tmp_path):
    with disk(tmp_path / "disk", megabytes=4) as folder:
        with eagle3("train", world, folder / "run") as process:
            read_until(process, "Saved checkpoint to")
            filler = fill(folder)
            output = process.stdout.read()
        assert 2 == process.wait()
        (sentence,) = [line for line in output.splitlines() if line.startswith("eagle3: error: ")]
        assert "No space left on device" in sentence
        assert "Traceback" not in output
        name = store_of(folder / "run").resolve("LATEST").name
        filler.unlink()
        step = int(name.rpartition("_")[2])
        more = ("--train.epochs", str(step // 10 + 1), "--checkpoint.restore_from", "LATEST")
        with eagle3("train", world, folder / "run", *more) as process:
            output = process.stdout.read()
        assert 0 == process.wait(), output
        assert f"Resuming from checkpoint: {folder}/run/checkpoints/{name}\n" in output
        steps = [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps))


@pytest.mark.slow
def test_a_run_outlives_a_full_disk_if_the_config_says_so(world, tmp_path):
    """Also the lines of its metrics find no room meanwhile; each that is there is whole."""
    with disk(tmp_path / "disk", megabytes=4) as folder:
        with eagle3("train", world, folder / "run", "--checkpoint.on_error", "continue") as process:
            read_until(process, "Saved checkpoint to")
            filler = fill(folder)
            output = read_until(process, "Training goes on, as checkpoint.on_error is continue")
            before = store_of(folder / "run").resolve("LATEST").name
            output += read_until(process, "cannot be written to")
            filler.unlink()
            output += read_until(process, "Saved checkpoint to")
            process.send_signal(signal.SIGTERM)
            output += process.stdout.read()
        assert 0 == process.wait(), output
        assert "The numbers of step" in output
        assert "No space left on device" in output
        assert "Traceback" not in output
        stopped = int(output.split("Stopped by SIGTERM after step ")[1].split()[0])
        assert store_of(folder / "run").resolve("LATEST").name.endswith(f"_step_{stopped}")
        assert before not in store_of(folder / "run").names()
        steps = [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        assert stopped == steps[-1]
        assert steps == sorted(set(steps))


@pytest.mark.slow
def test_a_disk_too_small_for_a_cache_is_one_sentence_and_nothing_half_written(world, tmp_path):
    with disk(tmp_path / "disk", megabytes=1) as folder:
        fill(folder)
        with eagle3("cache", world, tmp_path / "run", "--target.cache", folder / "states") as process:
            output = process.stdout.read()
        assert 2 == process.wait()
        (sentence,) = [line for line in output.splitlines() if line.startswith("eagle3: error: ")]
        assert "The states cannot be written to" in sentence
        assert "No space left on device" in sentence
        assert "Traceback" not in output
        left = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 0]
        assert ["filler"] == [path.name for path in left]
        assert [] == list(folder.rglob("*.partial"))
