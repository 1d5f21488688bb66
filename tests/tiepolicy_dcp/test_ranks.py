"""Several ranks save and load together, under torchrun with gloo."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiepolicy_dcp
from models import TiedPair, train_steps
from torchrun import torchrun

RANKS = Path(__file__).with_name("ranks.py")
pytestmark = pytest.mark.dist


def run(step, folder, num_processes=2):
    result = torchrun(RANKS, step, folder, num_processes=num_processes)
    assert 0 == result.returncode, result.stdout
    return result.stdout


def test_a_sharded_tie_is_written_once_and_loads_at_any_world_size(tmp_path):
    """Saved by two ranks with uneven shards; read by one process, and by two ranks; trained on with equal losses."""
    folder = tmp_path / "c"
    run("save_sharded", folder)
    model = TiedPair(vocab_size=13)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    torch.manual_seed(0)
    expected = TiedPair(vocab_size=13)
    train_steps(expected, torch.optim.AdamW(expected.parameters(), lr=0.1), num_steps=2)
    tiepolicy_dcp.load(folder, model=model, optimizer=optimizer)
    assert torch.allclose(expected.lm_head.weight, model.lm_head.weight, rtol=0, atol=1e-6)
    assert torch.equal(model.embed_tokens.weight, load_file(folder / "model.safetensors")["embed_tokens.weight"])
    losses = train_steps(model, optimizer, num_steps=2, seed=1)
    output = run("load_sharded", folder)
    shown = [float(loss) for loss in output.split("losses [")[1].split("]")[0].split(",")]
    assert pytest.approx(losses, abs=1e-5) == shown
    assert "step 2 tied True" in output
    plain = run("load_sharded_with_plain_dcp", folder, num_processes=3)
    stored = load_file(folder / "model.safetensors")["embed_tokens.weight"]
    assert f"equal True sum {stored.double().sum().item()}" in plain


def test_ranks_with_different_plans_all_stop_with_one_sentence_before_anything_is_written(tmp_path):
    output = run("save_with_other_plans", tmp_path / "c")
    sentence = "PlanMismatchError: rank 0 and rank 1 decided differently which weights are one tensor"
    assert [True, True] == [f"rank {rank}: {sentence}" in output for rank in (0, 1)]
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        ("save_what_rank_0_cannot_write", "CheckpointError: extra state can hold tensors and what JSON can"),
        ("plan_fails_on_rank_1", "raised RuntimeError: rank 1 has no config"),
    ],
)
def test_what_fails_on_one_rank_fails_on_all_and_leaves_nothing(tmp_path, step, sentence):
    output = run(step, tmp_path / "c")
    assert 2 == output.count(sentence)
    assert [] == list(tmp_path.iterdir())
