"""Tests for `eagle3.fused_scorer` and the flat optimizer: runs of the trainer on the step by hand."""

# Expected values stand on the left.

import dataclasses
import shutil

import pytest
import torch

from eagle3.errors import ConfigError
from eagle3.trainer import train
from eagle3_runs import ALONE, config_of, make_run_world, metrics_of, weights_of


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A target and ten conversations."""
    return make_run_world(tmp_path_factory.mktemp("world"))


def check_close(expected, actual):
    """Where a gradient is next to nothing, AdamW goes by its sign, so single elements may differ by a step."""
    for name, weight in expected.items():
        assert (weight.float() - actual[name].float()).norm() <= 1e-2 * weight.float().norm(), name


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"weight_decay": 0.1}])
def test_it_learns_as_autograd_does(world, tmp_path, options):
    for step in ("autograd", "fused"):
        train(config_of(world, tmp_path / step, train={"step": step, **options}), ALONE)
    expected, actual = metrics_of(tmp_path / "autograd"), metrics_of(tmp_path / "fused")
    for one, other in zip(expected, actual, strict=True):
        assert one["lr"] == other["lr"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    name = max(path.name for path in (tmp_path / "fused" / "checkpoints").iterdir() if path.is_dir())
    check_close(*(weights_of(tmp_path / step, name) for step in ("autograd", "fused")))


@pytest.mark.parametrize("other", ["fused", "autograd"])
def test_a_run_stopped_half_way_goes_on_by_either_step(world, tmp_path, other):
    """By the same one to the last bit."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(config_of(world, whole, every_steps=3, train={"step": "fused"}), ALONE)
    shutil.copytree(whole / "checkpoints" / "epoch_1_step_3", cut / "checkpoints" / "epoch_1_step_3")
    shutil.copy(whole / "draft_config.json", cut)
    torch.manual_seed(12345)
    train(config_of(world, cut, every_steps=3, restore_from="epoch_1_step_3", train={"step": other}), ALONE)
    expected, actual = weights_of(whole, "epoch_2_step_10"), weights_of(cut, "epoch_2_step_10")
    if other == "fused":
        assert metrics_of(whole)[3:] == metrics_of(cut)
        assert [True] * len(expected) == [torch.equal(expected[name], actual[name]) for name in expected]
    else:
        check_close(expected, actual)


def test_what_it_cannot_do_is_said(world, tmp_path):
    with pytest.raises(
        ConfigError, match=r"^train\.step is fused, but unroll\.loss is lk_alpha\. Leave out train\.step"
    ):
        train(config_of(world, tmp_path, train={"step": "fused"}, unroll={"loss": "lk_alpha"}), ALONE)


def test_worker_processes_prepare_the_same_rows_and_pairs(world, tmp_path):
    for number in (0, 2):
        config = config_of(world, tmp_path / str(number), epochs=1, train={"step": "fused"})
        train(dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=number)), ALONE)
    assert metrics_of(tmp_path / "0") == metrics_of(tmp_path / "2")
