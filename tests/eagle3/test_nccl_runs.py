"""Two processes under NCCL learn what one with a GPU does. `test_trainer_ranks.py` asks for more, under gloo."""

from pathlib import Path

import pytest
import torch
from nccl_runs import RUNS

from eagle3.parallel import Ranks
from eagle3.trainer import train
from eagle3_runs import config_of, metrics_of, weights_of
from eagle3_targets import make_target, make_world
from torchrun import torchrun

pytestmark = [pytest.mark.gpu, pytest.mark.dist]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs of `nccl_runs.py` and, beside each, what one process makes of the same conversations."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer, conversations = make_world(folder, num_conversations=12)
    target = make_target(folder / "target", tokenizer, vocab_size=600, tie_word_embeddings=True, hidden_size=256)
    one = Ranks(rank=0, world_size=1, device=torch.device("cuda", 0))
    for name, options in RUNS.items():
        unspread = {key: value for key, value in options.items() if key not in ("kind", "shard_size")}
        train(config_of((target, conversations), folder / f"{name}-alone", epochs=1, batch_size=2, **unspread), one)
    result = torchrun(Path(__file__).with_name("nccl_runs.py"), folder, num_processes=2, on_gpus=True)
    assert 0 == result.returncode, result.stdout
    return folder


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_learn_what_one_does(folder, run):
    """Only the order of additions differs, which bfloat16 rounds and AdamW's quotients magnify."""
    tolerance = 2e-2 if "fused" in run else 1e-4
    expected, actual = metrics_of(folder / f"{run}-alone"), metrics_of(folder / run)
    assert 3 <= len(actual) == len(expected)
    for key in ("loss", "grad_norm"):
        assert [pytest.approx(entry[key], rel=tolerance) for entry in expected] == [entry[key] for entry in actual]
    last = f"epoch_1_step_{len(actual)}"
    alone, two = weights_of(folder / f"{run}-alone", last), weights_of(folder / run, last)
    assert alone.keys() == two.keys()
    for name, weight in alone.items():
        difference = two[name].double() - weight.double()
        assert difference.norm() <= 10 * tolerance * weight.double().norm(), name
