"""What is measured, where it is written, and how it is shown."""

import io
import json
import resource

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eagle3.config import DataConfig, LogConfig, RunConfig, TargetConfig
from eagle3.errors import ConfigError
from eagle3.loss import StepCounts
from eagle3.metrics import Display, Measurement, MetricsLog, Sums
from eagle3_runs import ALONE

MEASUREMENT = Measurement(loss=2.5, accuracy=[0.5, 0.25], accepted=[0.5, 0.125], accept_length=0.625)


def config_of(out, **log):
    return RunConfig(out=str(out), target=TargetConfig(model="t"), data=DataConfig(train="d"), log=LogConfig(**log))


def opened(out, *, step=0, **log):
    metrics = MetricsLog(config_of(out, **log), ALONE)
    metrics.open(step=step)
    return metrics


def counts(supervised, hits):
    return StepCounts.count(torch.tensor(supervised, dtype=torch.bool), torch.tensor(hits, dtype=torch.bool))


def test_means_are_made_of_sums_and_never_of_means():
    """One batch has a single row, the other three: the mean of their shares would be 0.5 and not 0.25."""
    sums = Sums(1, ALONE)
    sums.add(torch.tensor([6.0, 2.0]), counts([[1]], [[1]]), 5)
    sums.add(torch.tensor([2.0, 6.0]), counts([[1, 1, 1]], [[0, 0, 0]]), 7)
    measurement = sums.measure(loss_is_global=True)
    assert (1.0, [0.25], 0.25) == (measurement.loss, measurement.accuracy, measurement.accept_length)
    assert 12 == sums.num_tokens


def test_without_anything_supervised_all_means_are_zero():
    expected = Measurement(loss=0.0, accuracy=[0.0, 0.0], accepted=[0.0, 0.0], accept_length=0.0)
    assert expected == Sums(2, ALONE).measure(loss_is_global=False)


def test_a_line_of_json_per_measurement(tmp_path):
    metrics = opened(tmp_path, tensorboard=False)
    metrics.log_training(MEASUREMENT, step=1, epoch=1, lr=0.5)
    metrics.log_validation(MEASUREMENT, step=1, epoch=1)
    metrics.close()
    numbers = {"loss": 2.5, "accuracy": [0.5, 0.25], "accepted": [0.5, 0.125], "accept_length": 0.625}
    expected = {"step": 1, "epoch": 1, **numbers}
    assert expected | {"lr": 0.5} == json.loads((tmp_path / "metrics.jsonl").read_text())
    assert expected == json.loads((tmp_path / "validation.jsonl").read_text())
    assert not (tmp_path / "tensorboard").exists()


def test_a_resumed_run_replaces_what_was_written_of_the_steps_it_takes_again(tmp_path):
    first = opened(tmp_path)
    for step in (1, 2, 3):
        first.log_training(MEASUREMENT, step=step, epoch=1, lr=0.5)
    first.close()
    second = opened(tmp_path, step=1)
    second.log_training(MEASUREMENT, step=2, epoch=1, lr=0.25)
    second.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(1, 0.5), (2, 0.25)] == [(line["step"], line["lr"]) for line in lines]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(1, 0.5), (2, 0.25)] == [(event.step, event.value) for event in events.Scalars("train/lr")]


def test_tensorboard_has_every_number_under_its_own_name(tmp_path):
    metrics = opened(tmp_path)
    metrics.log_training(MEASUREMENT, step=4, epoch=1, lr=0.5)
    metrics.log_validation(MEASUREMENT, step=4, epoch=1)
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = ["loss", "accuracy/1", "accuracy/2", "accepted/1", "accepted/2", "accept_length"]
    expected = {f"{part}/{name}" for part in ("train", "validation") for name in names} | {"train/lr"}
    assert expected == set(events.Tags()["scalars"])
    assert [(4, 0.125)] == [(event.step, event.value) for event in events.Scalars("validation/accepted/2")]


def test_an_event_that_finds_no_room_is_left_out_whole_and_the_next_one_is_written(tmp_path, caplog):
    metrics = opened(tmp_path)
    metrics.log_training(MEASUREMENT, step=1, epoch=1)
    (file,) = (tmp_path / "tensorboard").iterdir()
    size, (_, hard) = file.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, hard))
    try:
        metrics.log_training(MEASUREMENT, step=2, epoch=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert size == file.stat().st_size
    assert [f"The numbers of step 2 cannot be written to {tmp_path}: No space left on device"] == caplog.messages
    metrics.log_training(MEASUREMENT, step=3, epoch=1)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [1, 3] == [event.step for event in events.Scalars("train/loss")]


def test_wandb_without_its_package_is_one_sentence(tmp_path):
    """It is not among the dependencies, so the tests' environment lacks it."""
    with pytest.raises(ConfigError, match="package wandb is not installed. Install it with `pip install wandb`, or"):
        MetricsLog(config_of(tmp_path, wandb="drafts"), ALONE)
    assert [] == list(tmp_path.iterdir())


def show(console):
    with Display(ALONE, depth=2, console=console) as display:
        display.advance(step=3, num_steps=12)
        display.show_training(MEASUREMENT, epoch=1, step=3, num_steps=12, lr=0.5, speed=1234.5)


def test_a_terminal_shows_a_bar_with_the_numbers(caplog):
    screen = io.StringIO()
    show(Console(file=screen, force_terminal=True, width=160))
    last = screen.getvalue()
    assert all(part in last for part in ("epoch 1", "3/12", "loss 2.5000", "accept length 0.62 of 2", "1,234 tokens/s"))
    assert "" == caplog.text


def test_elsewhere_each_measurement_is_one_line(caplog):
    file = io.StringIO()
    show(Console(file=file, force_terminal=False))
    line = "loss 2.5000, accuracy 0.500 0.250, accept length 0.62 of 2, learning rate 0.5, 1234 tokens/s"
    assert [f"epoch 1 step 3/12: {line}"] == caplog.messages
    assert "" == file.getvalue()
