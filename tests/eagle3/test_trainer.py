"""A run: what it writes, and that a stopped one goes on as if it had not been."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file

from eagle3.errors import CheckpointError, DraftError
from eagle3.trainer import train
from eagle3_runs import ALONE, config_of, make_run_world, metrics_of, weights_of
from tiepolicy.errors import ShapeMismatchError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A target and ten conversations."""
    return make_run_world(tmp_path_factory.mktemp("world"))


def test_a_run_stopped_half_way_and_resumed_has_the_losses_and_weights_of_one_that_was_not(world, tmp_path):
    """Stopped within an epoch: the second run starts from a checkpoint of the first and takes the rest of its steps."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(config_of(world, whole, every_steps=3), ALONE)
    shutil.copytree(whole / "checkpoints" / "epoch_1_step_3", cut / "checkpoints" / "epoch_1_step_3")
    shutil.copy(whole / "draft_config.json", cut)
    torch.manual_seed(12345)
    train(config_of(world, cut, every_steps=3, restore_from="epoch_1_step_3"), ALONE)

    assert list(range(1, 11)) == [entry["step"] for entry in metrics_of(whole)]
    assert metrics_of(whole)[3:] == metrics_of(cut)
    expected, actual = weights_of(whole, "epoch_2_step_10"), weights_of(cut, "epoch_2_step_10")
    assert [True] * len(expected) == [torch.equal(expected[name], actual[name]) for name in expected]


@pytest.mark.slow
@pytest.mark.parametrize("save_consolidated", [False, True])
def test_a_run_may_be_cut_after_any_step(world, tmp_path, save_consolidated):
    options = {"every_steps": 1, "save_consolidated": save_consolidated, "train": {"accumulate": 2}, "batch_size": 1}
    whole = tmp_path / "whole"
    train(config_of(world, whole, **options), ALONE)
    expected = weights_of(whole, "epoch_2_step_10")
    for step in range(1, 10):
        name, cut = f"epoch_{-(-step // 5)}_step_{step}", tmp_path / f"cut-{step}"
        shutil.copytree(whole / "checkpoints" / name, cut / "checkpoints" / name)
        shutil.copy(whole / "draft_config.json", cut)
        train(config_of(world, cut, restore_from=name, **options), ALONE)
        assert metrics_of(whole)[step:] == metrics_of(cut)
        actual = weights_of(cut, "epoch_2_step_10")
        assert [True] * len(expected) == [torch.equal(expected[key], actual[key]) for key in expected]


def test_log_lines_of_a_resumed_run_are_those_of_an_uncut_one_also_when_they_span_steps(world, tmp_path):
    """A line's mean never reaches over a checkpoint."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(config_of(world, whole, every_steps=3, log_every=4), ALONE)
    shutil.copytree(whole / "checkpoints" / "epoch_1_step_3", cut / "checkpoints" / "epoch_1_step_3")
    shutil.copy(whole / "draft_config.json", cut)
    train(config_of(world, cut, every_steps=3, log_every=4, restore_from="epoch_1_step_3"), ALONE)
    assert [1, 3, 4, 5, 6, 8, 9, 10] == [entry["step"] for entry in metrics_of(whole)]
    assert metrics_of(whole)[2:] == metrics_of(cut)


def test_training_lowers_the_loss_and_leaves_what_is_frozen_alone(world, tmp_path):
    train(config_of(world, tmp_path / "run", epochs=4), ALONE)
    losses = [entry["loss"] for entry in metrics_of(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    target = load_file(world[0] / "model.safetensors")
    state = weights_of(tmp_path / "run", "epoch_4_step_20")
    assert torch.equal(target["model.embed_tokens.weight"], state["embed_tokens.weight"])


def test_a_run_keeps_the_draft_it_was_started_with(world, tmp_path):
    train(config_of(world, tmp_path / "run", epochs=1), ALONE)
    before = weights_of(tmp_path / "run", "epoch_1_step_5")
    with pytest.raises(CheckpointError, match=r"other settings, which shaped its weights: draft.vocab_size 96 -> 7\."):
        train(config_of(world, tmp_path / "run", epochs=2, restore_from="LATEST", draft_vocab_size=7), ALONE)
    train(config_of(world, tmp_path / "run", epochs=2, restore_from="LATEST"), ALONE)
    after = weights_of(tmp_path / "run", "epoch_2_step_10")
    assert [True, True] == [torch.equal(before[name], after[name]) for name in ("d2t", "t2d")]
    assert 96 == int(after["t2d"].sum())


def test_lines_of_steps_that_are_taken_again_are_replaced(world, tmp_path):
    train(config_of(world, tmp_path / "run", epochs=1, every_steps=2), ALONE)
    before = metrics_of(tmp_path / "run")
    for name in ("epoch_1_step_4", "epoch_1_step_5"):
        (tmp_path / "run" / "checkpoints" / name).rename(tmp_path / name)
    train(config_of(world, tmp_path / "run", epochs=1, every_steps=2, restore_from="epoch_1_step_2"), ALONE)
    assert before == metrics_of(tmp_path / "run")


def test_a_consolidated_checkpoint_holds_the_draft_under_the_names_that_engines_read(world, tmp_path):
    train(config_of(world, tmp_path / "run", epochs=1, save_consolidated=True), ALONE)
    tensors = load_file(tmp_path / "run" / "checkpoints" / "epoch_1_step_5" / "model.safetensors")
    state = weights_of(tmp_path / "run", "epoch_1_step_5")
    assert set(state) == {"embed_tokens.weight", *tensors}
    assert (96, 32) == tuple(tensors["lm_head.weight"].shape)
    assert [True] * len(tensors) == [torch.equal(state[name], tensors[name]) for name in tensors]


def test_a_folder_with_checkpoints_is_not_started_over(world, tmp_path):
    train(config_of(world, tmp_path / "run", epochs=1), ALONE)
    with pytest.raises(
        CheckpointError, match="already holds a run, with the checkpoints epoch_1_step_5. Go on from it"
    ):
        train(config_of(world, tmp_path / "run", epochs=1), ALONE)


def test_other_data_than_the_checkpoint_was_trained_on_is_noticed(world, tmp_path):
    config = config_of(world, tmp_path / "run", epochs=1)
    train(config, ALONE)
    resumed = config_of(world, tmp_path / "run", epochs=2, restore_from="LATEST")
    other = dataclasses.replace(resumed, data=dataclasses.replace(config.data, max_length=40))
    with pytest.raises(CheckpointError, match="was trained on other data than this run has"):
        train(other, ALONE)


def test_the_draft_config_of_another_run_is_noticed(world, tmp_path):
    train(config_of(world, tmp_path / "run", epochs=1), ALONE)
    path = tmp_path / "run" / "draft_config.json"
    path.write_text(path.read_text().replace('"draft_vocab_size": 96', '"draft_vocab_size": 64'))
    with pytest.raises(ShapeMismatchError, match=r"(d2t|lm_head.weight) has shape \(96"):
        train(config_of(world, tmp_path / "run", epochs=2, restore_from="LATEST"), ALONE)
    path.unlink()
    with pytest.raises(DraftError, match="Give the --out of a run"):
        train(config_of(world, tmp_path / "run", epochs=2, restore_from="LATEST"), ALONE)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_a_run_goes_on_behind_the_conversations_it_has_seen_whatever_the_batch_size(world, tmp_path, batch_size):
    """Four of ten were seen; three at a time, the last step has none left to fill it up."""
    config = config_of(world, tmp_path, epochs=1, every_steps=2)
    train(config, ALONE)
    seen = 4
    train(config_of(world, tmp_path, epochs=1, batch_size=batch_size, restore_from="epoch_1_step_2"), ALONE)
    steps = [entry["step"] for entry in metrics_of(tmp_path)]
    last = 2 + -(-(10 - seen) // batch_size)
    assert (list(range(1, last + 1)), last) == (steps, steps[-1])
