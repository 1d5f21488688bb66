"""Whole runs on a GPU learn what they do in float32 under autograd, and that is what the CPU learns."""

import shutil
from dataclasses import replace

import pytest
import torch

from eagle3.export import export
from eagle3.finished import open_run
from eagle3.inputs import write_cache
from eagle3.parallel import Ranks
from eagle3.trainer import train
from eagle3_runs import ALONE, config_of, metrics_of, weights_of
from eagle3_targets import make_target, make_world

pytestmark = pytest.mark.gpu

GPU = Ranks(rank=0, world_size=1, device=torch.device("cuda", 0))
#: Ways to compute a step, and how far their losses may be from those of float32.
WAYS = {
    "as it is": ({}, 2e-2),
    "autograd": ({"step": "autograd"}, 2e-2),
    "deterministic": ({"deterministic": True}, 2e-2),
    "8-bit": ({"fp8": True}, 5e-2),
}
#: What else a run may be asked for.
SETTINGS = {
    "accumulated": {"train": {"accumulate": 2}},
    "packed": {"data": {"packing": True}},
    "prepared by workers": {"data": {"num_workers": 2}},
    "another loss": {"unroll": {"loss": "lk_alpha"}},
    "norms": {"draft": {"fc_norm": True, "norm_output": True}},
    "another width": {"draft": {"hidden_size": 128}},
    "validated": {"train": {"validate_every": 2}},
}


def make_target_of(folder, *, hidden_size):
    tokenizer, conversations = make_world(folder, num_conversations=12)
    target = make_target(
        folder / "target", tokenizer, vocab_size=600, tie_word_embeddings=True, hidden_size=hidden_size
    )
    return target, conversations


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_target_of(tmp_path_factory.mktemp("world"), hidden_size=256)


def changed(config, parts):
    return replace(config, **{part: replace(getattr(config, part), **changes) for part, changes in parts.items()})


def check_losses(expected, actual, *, tolerance):
    expected, actual = metrics_of(expected), metrics_of(actual)
    assert 3 <= len(actual) == len(expected)
    assert [pytest.approx(entry["loss"], rel=tolerance) for entry in expected] == [entry["loss"] for entry in actual]


def check_run(world, folder, *, settings=None, way=None, tolerance=2e-2):
    """Trains with some settings in float32 under autograd and in another way."""
    for name, options in (("exact", {"step": "autograd", "precision": "float32"}), ("other", way or {})):
        config = config_of(world, folder / name, validation=world[1], lr=1e-3)
        train(changed(changed(config, settings or {}), {"train": options}), GPU)
    check_losses(folder / "exact", folder / "other", tolerance=tolerance)


def test_a_gpu_in_float32_learns_what_the_cpu_does(world, tmp_path):
    """From one draft, since each draws other numbers."""
    train(config_of(world, tmp_path / "first", epochs=1), ALONE)
    export(open_run(tmp_path / "first", checkpoint="LATEST"), tmp_path / "draft", kind="plain")
    for name, ranks in (("cpu", ALONE), ("gpu", GPU)):
        config = config_of(world, tmp_path / name, init_from=tmp_path / "draft", lr=1e-3)
        train(changed(config, {"train": {"precision": "float32"}}), ranks)
    check_losses(tmp_path / "cpu", tmp_path / "gpu", tolerance=1e-3)


@pytest.mark.parametrize("case", WAYS)
def test_every_way_to_compute_learns_nearly_the_same(world, tmp_path, case):
    way, tolerance = WAYS[case]
    check_run(world, tmp_path, way=way, tolerance=tolerance)


@pytest.mark.parametrize("case", SETTINGS)
def test_every_setting_does_the_same_in_either_way(world, tmp_path, case):
    check_run(world, tmp_path, settings=SETTINGS[case])


@pytest.mark.parametrize("hidden_size", [144, 1056])
def test_heads_that_no_kernel_takes_are_computed_under_autograd(tmp_path, hidden_size):
    """Their 36 numbers are not a multiple of 8; 264 are too many."""
    check_run(make_target_of(tmp_path, hidden_size=hidden_size), tmp_path)


def test_states_from_a_cache_teach_the_same(world, tmp_path):
    live = config_of(world, tmp_path / "live", dtype="bfloat16")
    cached = changed(
        config_of(world, tmp_path / "cached", dtype="bfloat16"), {"target": {"cache": str(tmp_path / "c")}}
    )
    write_cache(cached, GPU)
    for config in (live, cached):
        train(config, GPU)
    losses = [[entry["loss"] for entry in metrics_of(tmp_path / name)] for name in ("live", "cached")]
    assert pytest.approx(losses[0], rel=2e-2) == losses[1]


@pytest.mark.parametrize("packing", [False, True])
def test_a_deterministic_run_that_was_cut_goes_on_to_the_bit(world, tmp_path, packing):
    def config(name, **options):
        return changed(
            config_of(world, tmp_path / name, batch_size=1, every_steps=2, train={"deterministic": True}, **options),
            {"data": {"packing": packing}},
        )

    train(config("whole"), GPU)
    name = "epoch_1_step_2"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / name, tmp_path / "cut" / "checkpoints" / name)
    shutil.copy(tmp_path / "whole" / "draft_config.json", tmp_path / "cut")
    torch.manual_seed(12345)
    train(config("cut", restore_from=name), GPU)
    assert metrics_of(tmp_path / "whole")[2:] == metrics_of(tmp_path / "cut")
    last = max(
        (tmp_path / "cut" / "checkpoints").glob("epoch_2_step_*"), key=lambda path: int(path.name.split("_")[-1])
    )
    expected, actual = (weights_of(tmp_path / run, last.name) for run in ("whole", "cut"))
    assert [True] * len(expected) == [torch.equal(expected[key], actual[key]) for key in expected]
