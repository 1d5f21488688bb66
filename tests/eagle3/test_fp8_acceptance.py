"""Drafts of the embedded target, trained with and without FP8 on the same data from the same seed."""

# Expected values stand on the left.

import json

import pytest

from eagle3.config import DataConfig, DraftConfig, LogConfig, RunConfig, TargetConfig, TrainConfig, UnrollConfig
from eagle3.embedded import write_embedded_conversations, write_embedded_target
from eagle3.trainer import train
from eagle3_runs import ALONE


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A target that has learnt something, conversations, and others to measure on."""
    folder = tmp_path_factory.mktemp("world")
    for name, seed, number in (("train", 0, 200), ("validation", 1, 64)):
        write_embedded_conversations(folder / f"{name}.jsonl", num_conversations=number, seed=seed)
    write_embedded_target(
        folder / "target", folder / "train.jsonl", seed=0, num_steps=160, vocab_size=512, max_length=128
    )
    return folder


def measured(world, out, *, fp8):
    """The validation loss and accept length of a run of a hundred steps."""
    config = RunConfig(
        out=str(out),
        target=TargetConfig(model=str(world / "target")),
        data=DataConfig(
            train=str(world / "train.jsonl"),
            validation=str(world / "validation.jsonl"),
            max_length=128,
            packing=True,
        ),
        draft=DraftConfig(vocab_size=256),
        unroll=UnrollConfig(steps=4),
        train=TrainConfig(epochs=2, batch_size=4, lr=4e-3, step="fused", fp8=fp8),
        log=LogConfig(tensorboard=False),
    )
    train(config, ALONE)
    last = json.loads((out / "validation.jsonl").read_text().splitlines()[-1])
    return last["loss"], last["accept_length"]


@pytest.mark.slow
def test_fp8_learns_as_fast_as_float32(world, tmp_path):
    """Accept lengths of so short runs differ by some percent from seed to seed; losses do not."""
    loss, accept_length = measured(world, tmp_path / "exact", fp8=False)
    loss_fp8, accept_length_fp8 = measured(world, tmp_path / "fp8", fp8=True)
    assert loss == pytest.approx(loss_fp8, rel=5e-3)
    assert 0.95 * accept_length <= accept_length_fp8
    assert 0.5 < accept_length
