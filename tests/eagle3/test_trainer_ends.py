"""How a run ends before its end: asked to, out of finite numbers, or out of disk; and what is left of it."""

import logging
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from trainer_ranks import Killer
from transformers import AutoModelForCausalLM, AutoTokenizer

from eagle3.errors import CheckpointError, NumericsError
from eagle3.loss import StepCounts
from eagle3.parallel import ends_with_parent, stop_on_signals
from eagle3.step import StepResult, Watch
from eagle3.trainer import train
from eagle3_runs import ALONE, config_of, make_run_world, metrics_of, weights_of
from tiepolicy.errors import CheckpointError as StoreError
from tiepolicy_dcp import CheckpointStore


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_run_world(tmp_path_factory.mktemp("world"))


@contextmanager
def killed_at(text, number):
    """A signal to this process as soon as a log line contains the text."""
    logger, killer = logging.getLogger("eagle3"), Killer(text, number)
    logger.addHandler(killer)
    try:
        yield
    finally:
        logger.removeHandler(killer)


def names_of(out):
    return CheckpointStore(out / "checkpoints").names()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_a_checkpoint_to_go_on_from(world, tmp_path, caplog, number):
    train(config_of(world, tmp_path / "whole"), ALONE)
    with killed_at("epoch 1 step 2/10", number):
        train(config_of(world, tmp_path / "cut"), ALONE)
    assert ["epoch_1_step_3"] == names_of(tmp_path / "cut")
    expected = f"Stopped by {number.name} after step 3 of 10. Go on with --checkpoint.restore_from LATEST"
    assert expected == caplog.messages[-1]

    train(config_of(world, tmp_path / "cut", restore_from="LATEST"), ALONE)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "cut")
    whole, cut = weights_of(tmp_path / "whole", "epoch_2_step_10"), weights_of(tmp_path / "cut", "epoch_2_step_10")
    assert [True] * len(whole) == [torch.equal(whole[name], cut[name]) for name in whole]


def test_a_stop_between_two_log_lines_is_saved_and_logged_too(world, tmp_path):
    with killed_at("Training starts", signal.SIGTERM):
        train(config_of(world, tmp_path, log_every=100), ALONE)
    assert (["epoch_1_step_1"], [1]) == (names_of(tmp_path), [entry["step"] for entry in metrics_of(tmp_path)])


def test_a_stop_in_the_last_step_is_no_stop(world, tmp_path, caplog):
    with killed_at("epoch 1 step 4/5", signal.SIGTERM):
        train(config_of(world, tmp_path, epochs=1), ALONE)
    assert ["epoch_1_step_5"] == names_of(tmp_path)
    assert "Stopped" not in caplog.text


def test_a_second_signal_is_not_held_back():
    # A shell starts what runs in the background with this signal ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with stop_on_signals() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert (True, signal.SIGINT) == (request.is_made, request.signal)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.default_int_handler is signal.getsignal(signal.SIGINT)


@pytest.mark.parametrize("stderr", ["open(sys.argv[2], 'w')", "subprocess.PIPE"], ids=["read later", "read by nobody"])
def test_a_process_ends_when_the_one_that_started_it_is_killed(tmp_path, stderr):
    """Through a parent that starts it and is killed; it would otherwise sleep for minutes."""
    child = f"""
        import os, pathlib, time
        from eagle3.parallel import ends_with_parent
        with ends_with_parent(seconds=0.05):
            pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
            time.sleep(120)
    """
    script, errors = tmp_path / "child.py", tmp_path / "errors"
    script.write_text(textwrap.dedent(child))
    parent = f"import subprocess, sys; subprocess.run([sys.executable, sys.argv[1]], stderr={stderr})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen([sys.executable, "-c", parent, script, errors], env=environment) as process:
        wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        process.kill()
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: not is_running(pid))
    if stderr != "subprocess.PIPE":
        assert "eagle3: the process that started this one is gone; stopping without a save\n" == errors.read_text()


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123 - a file of the kernel
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_whose_parent_lives_is_left_alone():
    with ends_with_parent(seconds=0.01):
        time.sleep(0.05)
        assert "parent watch" in [thread.name for thread in threading.enumerate()]
    assert "parent watch" not in [thread.name for thread in threading.enumerate()]


def test_a_loss_that_is_not_finite_ends_the_run_before_anything_of_it_is_saved(world, tmp_path):
    """The first step throws the weights to the end of the world; the second one notices."""
    config = config_of(world, tmp_path, every_steps=2, train={"weight_decay": 1e38, "warmup_ratio": 0.0})
    with pytest.raises(NumericsError, match=r"^The loss of step 2 is (nan|inf), which spoils the draft's weights\."):
        train(config, ALONE)
    assert [] == names_of(tmp_path)


@pytest.mark.parametrize("norm", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_counts_as_well_as_a_loss(norm):
    """Of the last step, no later loss would tell."""
    counts = StepCounts.from_tensor(torch.zeros(4, 1, dtype=torch.int64))
    sums = {"loss_and_weight": torch.ones(2, dtype=torch.float64), "votes": torch.zeros(2, dtype=torch.float64)}
    result = StepResult(lr=0.1, norm=torch.tensor(norm), counts=counts, num_tokens=1, **sums)
    with pytest.raises(NumericsError, match=rf"^The gradient's norm of step 3 is {norm}, which spoils the draft's"):
        Watch().add(3, result)


def test_features_that_are_not_finite_end_the_run_in_their_step(world, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(world[0])
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.inf
    model.save_pretrained(tmp_path / "target")
    AutoTokenizer.from_pretrained(world[0]).save_pretrained(tmp_path / "target")
    with pytest.raises(NumericsError, match=r"^The target's states in step 1 hold NaN or infinity, so nothing can be"):
        train(config_of((tmp_path / "target", world[1]), tmp_path / "run"), ALONE)
    assert [] == names_of(tmp_path / "run")


def test_a_full_disk_ends_the_run_with_one_sentence_and_the_checkpoints_before(world, tmp_path):
    """The kernel refuses files above a size, as a full disk refuses them: the second checkpoint does not fit."""
    train(config_of(world, tmp_path, epochs=1), ALONE)
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    try:
        with pytest.raises(StoreError, match=r"epoch_2_step_10 could not be written: .* Nothing was kept"):
            train(config_of(world, tmp_path, restore_from="LATEST"), ALONE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    assert ["epoch_1_step_5"] == names_of(tmp_path)
    train(config_of(world, tmp_path, restore_from="LATEST"), ALONE)
    assert ["epoch_1_step_5", "epoch_2_step_10"] == names_of(tmp_path)


def test_the_draft_of_another_target_is_noticed(world, tmp_path):
    train(config_of(world, tmp_path / "run", epochs=1), ALONE)
    model = AutoModelForCausalLM.from_pretrained(world[0])
    with torch.no_grad():
        model.model.embed_tokens.weight[0] += 1.0
    model.save_pretrained(tmp_path / "target")
    AutoTokenizer.from_pretrained(world[0]).save_pretrained(tmp_path / "target")
    with pytest.raises(CheckpointError, match=r"holds a draft of another target: the embedding or the"):
        train(config_of((tmp_path / "target", world[1]), tmp_path / "run", restore_from="LATEST"), ALONE)


def test_settings_that_do_not_shape_the_draft_may_change_and_are_told(world, tmp_path, caplog):
    train(config_of(world, tmp_path, epochs=1), ALONE)
    changed = {"train": {"weight_decay": 0.5}, "unroll": {"loss": "lk_lambda"}}
    train(config_of(world, tmp_path, restore_from="LATEST", **changed), ALONE)
    expected = "unroll.loss soft_cross_entropy -> lk_lambda, train.epochs 1 -> 2, train.weight_decay 0.0 -> 0.5"
    assert f"Settings changed since the checkpoint: {expected}" in caplog.messages
