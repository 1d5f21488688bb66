"""What a run can be told to do: accumulate, validate, keep the best, compute in bfloat16, repeat its bits."""

import dataclasses
import logging

import pytest
import torch

from eagle3.errors import ConfigError
from eagle3.trainer import train
from eagle3_runs import ALONE, config_of, make_run_world, metrics_of, weights_of
from tiepolicy_dcp import CheckpointStore


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_run_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def validation(tmp_path_factory, world):
    """Three conversations, which batches of two do not fill."""
    lines = world[1].read_text().splitlines(keepends=True)[:3]
    path = tmp_path_factory.mktemp("validation") / "validation.jsonl"
    path.write_text("".join(lines))
    return path


def losses(out):
    return [entry["loss"] for entry in metrics_of(out)]


@pytest.mark.parametrize("loss", ["soft_cross_entropy", "lk_alpha", "lk_lambda"])
def test_accumulated_batches_are_one_batch(world, tmp_path, loss):
    """Two conversations of unequal length at a time, or four at once: one sum over one count."""
    train(config_of(world, tmp_path / "at once", batch_size=4, epochs=1, unroll={"loss": loss}), ALONE)
    train(config_of(world, tmp_path / "parts", epochs=1, train={"accumulate": 2}, unroll={"loss": loss}), ALONE)
    assert 3 == len(losses(tmp_path / "parts"))
    assert losses(tmp_path / "at once") == pytest.approx(losses(tmp_path / "parts"), rel=1e-5)
    expected, actual = (weights_of(tmp_path / name, "epoch_1_step_3") for name in ("at once", "parts"))
    for name, tensor in expected.items():
        torch.testing.assert_close(tensor, actual[name], rtol=0, atol=1e-4, msg=name)


def test_an_accumulated_run_resumes_to_the_last_bit(world, tmp_path):
    options = {"train": {"accumulate": 2}, "every_steps": 2}
    train(config_of(world, tmp_path, **options), ALONE)
    whole, weights = metrics_of(tmp_path), weights_of(tmp_path, "epoch_2_step_6")
    store = tmp_path / "checkpoints"
    for name in ("epoch_1_step_3", "epoch_2_step_4", "epoch_2_step_6"):
        (store / name).rename(tmp_path / name)
    train(config_of(world, tmp_path, restore_from="epoch_1_step_2", **options), ALONE)
    assert whole == metrics_of(tmp_path)
    again = weights_of(tmp_path, "epoch_2_step_6")
    assert [True] * len(weights) == [torch.equal(weights[name], again[name]) for name in weights]


def test_a_run_that_saves_in_the_background_keeps_the_same_bits(world, tmp_path):
    """Each checkpoint is written while the next steps already move the weights it was copied from."""
    for name, in_background in (("waits", False), ("goes on", True)):
        config = config_of(world, tmp_path / name, every_steps=1, async_save=in_background, save_consolidated=True)
        train(config, ALONE)
    store = CheckpointStore(tmp_path / "goes on" / "checkpoints")
    assert (10, "epoch_2_step_10") == (len(store.names()), store.resolve("LATEST").name)
    for name in store.names():
        expected, actual = weights_of(tmp_path / "waits", name), weights_of(tmp_path / "goes on", name)
        assert [True] * len(expected) == [torch.equal(expected[key], actual[key]) for key in expected]


def test_validation_measures_without_touching_the_run(world, validation, tmp_path):
    train(config_of(world, tmp_path / "without"), ALONE)
    train(config_of(world, tmp_path / "with", validation=validation, train={"validate_every": 2}), ALONE)
    assert metrics_of(tmp_path / "without") == metrics_of(tmp_path / "with")
    looks = metrics_of(tmp_path / "with", "validation.jsonl")
    # At each second step, and at the end of each epoch, which is saved.
    assert [2, 4, 5, 6, 8, 10] == [look["step"] for look in looks]
    assert looks[-1]["loss"] < looks[0]["loss"]


def test_validation_counts_each_conversation_once_whatever_the_batches(world, validation, tmp_path):
    looks = []
    for batch_size in (1, 2):
        out = tmp_path / str(batch_size)
        # Both take steps of two conversations.
        accumulate = {"accumulate": 2 // batch_size}
        train(config_of(world, out, epochs=1, batch_size=batch_size, validation=validation, train=accumulate), ALONE)
        looks.append(metrics_of(out, "validation.jsonl")[0])
    assert looks[0]["accuracy"] == looks[1]["accuracy"]
    assert looks[0]["loss"] == pytest.approx(looks[1]["loss"], rel=1e-4)


def test_the_best_checkpoint_by_validation_is_kept_and_restored(world, validation, tmp_path, caplog):
    options = {"validation": validation, "every_steps": 2, "keep_last": 1, "keep_best": 1}
    train(config_of(world, tmp_path, epochs=4, **options), ALONE)
    looks = {look["step"]: look["accept_length"] for look in metrics_of(tmp_path, "validation.jsonl")}
    best = max(looks, key=lambda step: (looks[step], -step))
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.resolve("BEST").name.endswith(f"_step_{best}")
    assert {store.resolve("BEST").name, "epoch_4_step_20"} == set(store.names())

    whole = metrics_of(tmp_path)
    train(config_of(world, tmp_path, epochs=4, restore_from="BEST", **options), ALONE)
    assert f"Resuming from checkpoint: {store.root}/epoch_{-(-best // 5)}_step_{best}" in caplog.messages
    assert whole == metrics_of(tmp_path)


def test_a_run_that_goes_back_to_an_earlier_checkpoint_loses_none(world, validation, tmp_path, caplog):
    train(config_of(world, tmp_path, epochs=1, every_steps=2), ALONE)
    before = weights_of(tmp_path, "epoch_1_step_4")
    train(
        config_of(world, tmp_path, epochs=1, every_steps=2, restore_from="epoch_1_step_2", unroll={"decay": 0.1}), ALONE
    )
    names = CheckpointStore(tmp_path / "checkpoints").names()
    steps = [f"epoch_1_step_{step}" for step in ("2", "4", "4-2", "5", "5-2")]
    assert steps == names
    assert "epoch_1_step_5-2" == CheckpointStore(tmp_path / "checkpoints").resolve("LATEST").name
    assert torch.equal(before["fc.weight"], weights_of(tmp_path, "epoch_1_step_4")["fc.weight"])
    assert not torch.equal(before["fc.weight"], weights_of(tmp_path, "epoch_1_step_4-2")["fc.weight"])
    assert [1, 2, 3, 4, 5] == [entry["step"] for entry in metrics_of(tmp_path)]


def test_bfloat16_learns_what_float32_does(world, tmp_path):
    """Weights, gradients and optimizer stay float32; sums of products round to 8 bits."""
    train(config_of(world, tmp_path / "exact", epochs=4), ALONE)
    train(config_of(world, tmp_path / "rounded", epochs=4, train={"precision": "bfloat16"}), ALONE)
    exact, rounded = losses(tmp_path / "exact"), losses(tmp_path / "rounded")
    assert exact == pytest.approx(rounded, rel=0.02)
    assert exact != rounded
    weights = weights_of(tmp_path / "rounded", "epoch_4_step_20")
    assert {torch.float32} == {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}


class Looker(logging.Handler):
    """Notes at each log line whether torch is to repeat its bits."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def emit(self, record):
        if "step" in record.getMessage():
            self.seen.add(torch.are_deterministic_algorithms_enabled())


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_mode_is_on_during_the_run_alone(world, tmp_path, deterministic):
    looker, logger = Looker(), logging.getLogger("eagle3")
    logger.addHandler(looker)
    try:
        train(config_of(world, tmp_path, epochs=1, train={"deterministic": deterministic}), ALONE)
    finally:
        logger.removeHandler(looker)
    assert ({deterministic}, False) == (looker.seen, torch.are_deterministic_algorithms_enabled())


@pytest.mark.parametrize("name", ["train.validate_every", "checkpoint.keep_best"])
def test_what_needs_validation_data_says_so(world, tmp_path, name):
    section, option = name.split(".")
    config = config_of(world, tmp_path)
    changed = dataclasses.replace(getattr(config, section), **{option: 2})
    with pytest.raises(ConfigError, match=f"^{name} is 2, but data.validation is not set, so there is nothing to"):
        dataclasses.replace(config, **{section: changed})
