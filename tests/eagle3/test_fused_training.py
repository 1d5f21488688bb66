"""Tests for `eagle3.fused_scorer` and the flat optimizer: runs of the trainer on the step by hand."""

# Expected values stand on the left.

import dataclasses
import shutil

import pytest
import torch

from eagle3.errors import ConfigError
from eagle3.fused_scorer import obstacle
from eagle3.kernels import fp8
from eagle3.trainer import train
from eagle3_runs import ALONE, config_of, make_run_world, metrics_of, weights_of
from eagle3_steps import make_draft


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


@pytest.mark.parametrize("precision", ["float32", "bfloat16", None])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_float32_keeps_a_gpu_alone_from_the_fused_step(tmp_path, device, precision):
    config = config_of((tmp_path, tmp_path), tmp_path, train={"precision": precision})
    found = obstacle(config, make_draft(head_dim=8), torch.device(device))
    expected = "train.precision is float32, in which a GPU's attention does not compute"
    assert found == (expected if (device, precision) == ("cuda", "float32") else None)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_heads_of_an_odd_size_keep_a_gpu_alone_from_the_fused_step(tmp_path, device):
    config = config_of((tmp_path, tmp_path), tmp_path)
    found = obstacle(config, make_draft(head_dim=36), torch.device(device))
    assert found == ("the draft's head_dim is 36, not a multiple of 8" if device == "cuda" else None)


@pytest.mark.parametrize(
    ("train_options", "other", "reason"),
    [
        ({}, {}, "only the fused step has it, and train.step is autograd, or null on the CPU. Leave out train.fp8."),
        (
            {"step": None},
            {"unroll": {"loss": "lk_alpha"}},
            "only the fused step has it, and unroll.loss is lk_alpha. Leave out train.fp8.",
        ),
        (
            {"step": "fused"},
            {"draft_vocab_size": 100},
            "draft.vocab_size is 100, not a multiple of 16. Leave out train.fp8, or change that.",
        ),
    ],
)
def test_where_fp8_cannot_be_is_said(world, tmp_path, train_options, other, reason):
    config = config_of(world, tmp_path, train={"fp8": True, **train_options}, **other)
    with pytest.raises(ConfigError) as caught:
        train(config, ALONE)
    assert f"train.fp8 is set, but {reason}" == str(caught.value)


def test_a_gpu_without_fp8_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    assert fp8.obstacle(torch.device("cuda")) == "NVIDIA A100 has no FP8"


def test_a_run_in_fp8_learns_nearly_the_same_and_resumes_to_the_bit(world, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(config_of(world, tmp_path / "exact", train={"step": "fused"}), ALONE)
    train(config_of(world, whole, every_steps=3, train={"step": "fused", "fp8": True}), ALONE)
    for exact, rounded in zip(metrics_of(tmp_path / "exact"), metrics_of(whole), strict=True):
        assert exact["loss"] == pytest.approx(rounded["loss"], rel=2e-2)
    shutil.copytree(whole / "checkpoints" / "epoch_1_step_3", cut / "checkpoints" / "epoch_1_step_3")
    shutil.copy(whole / "draft_config.json", cut)
    resumed = config_of(world, cut, every_steps=3, restore_from="epoch_1_step_3", train={"step": "fused", "fp8": True})
    train(resumed, ALONE)
    expected, actual = weights_of(whole, "epoch_2_step_10"), weights_of(cut, "epoch_2_step_10")
    assert metrics_of(whole)[3:] == metrics_of(cut)
    assert [True] * len(expected) == [torch.equal(expected[name], actual[name]) for name in expected]


def test_worker_processes_prepare_the_same_rows_and_pairs(world, tmp_path):
    for number in (0, 2):
        config = config_of(world, tmp_path / str(number), epochs=1, train={"step": "fused"})
        train(dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=number)), ALONE)
    assert metrics_of(tmp_path / "0") == metrics_of(tmp_path / "2")
