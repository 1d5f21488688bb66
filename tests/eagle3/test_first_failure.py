"""The run that failed, through the real command line: a shrunken head under an inherited flag is saved and resumed."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from eagle3.cli import main
from eagle3_runs import weights_of
from eagle3_targets import make_target, make_world
from torchrun import torchrun

pytestmark = pytest.mark.dist

VOCAB_SIZE = 128256
SETTINGS = (
    *("--data.max_length", 256, "--unroll.steps", 2, "--train.epochs", 1),
    *("--checkpoint.save_consolidated", "false"),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Four conversations: two steps of one epoch in two processes."""
    return make_world(tmp_path_factory.mktemp("world"), num_conversations=4)


def eagle3(target, world, out, *options):
    result = torchrun(
        *("-m", "eagle3", "train", "--out", out, "--target.model", target, "--data.train", world[1]),
        *(*SETTINGS, *options),
        num_processes=2,
    )
    assert 0 == result.returncode, result.stdout
    return result.stdout


def eagle3_alone(target, world, out, *options):
    """The same in one process, this one: its exit code."""
    given = ("--out", out, "--target.model", target, "--data.train", world[1], *SETTINGS, *options)
    return main(["train", *map(str, given)])


def saved_head(out):
    """The head as a fresh draft reads it from the checkpoint."""
    return weights_of(out, "epoch_1_step_2")["lm_head.weight"]


def lines_of(output, *patterns):
    """For each pattern, whether a line of the output has it."""
    return [re.search(pattern, output) is not None for pattern in patterns]


@pytest.mark.parametrize(
    ("tied", "draft_vocab_size", "consolidated"),
    [
        pytest.param(True, 8192, "false", id="tied"),
        pytest.param(True, 8192, "true", id="consolidated", marks=pytest.mark.slow),
        pytest.param(False, 8192, "false", id="untied", marks=pytest.mark.slow),
        pytest.param(True, None, "false", id="whole vocabulary", marks=pytest.mark.slow),
    ],
)
def test_a_draft_is_trained_saved_and_resumed(world, tmp_path, capfd, tied, draft_vocab_size, consolidated):
    target = make_target(tmp_path / "target", world[0], vocab_size=VOCAB_SIZE, tie_word_embeddings=tied)
    assert tied is json.loads((target / "config.json").read_text())["tie_word_embeddings"]
    assert tied is ("lm_head.weight" not in load_file(target / "model.safetensors"))
    out = tmp_path / "run"
    size = "null" if draft_vocab_size is None else str(draft_vocab_size)
    options = ("--draft.vocab_size", size, "--checkpoint.save_consolidated", consolidated)

    output = eagle3(target, world, out, *options)
    assert [True] * 5 == lines_of(
        output,
        "Training starts: epochs 1, batches per epoch 2, steps 2, warm-up steps 1, peak learning rate 0.0001",
        r"epoch 1 step 1/2: loss \d+\.\d{4}, accuracy \d\.\d{3} \d\.\d{3}, accept length",
        r"epoch 1 step 2/2: loss",
        rf"Saved checkpoint to {out}/checkpoints/epoch_1_step_2\n",
        rf"Draft vocabulary: {draft_vocab_size or VOCAB_SIZE} of {VOCAB_SIZE} tokens",
    )
    head = saved_head(out)
    assert (draft_vocab_size or VOCAB_SIZE, 32) == tuple(head.shape)
    consolidated_file = out / "checkpoints" / "epoch_1_step_2" / "model.safetensors"
    assert (consolidated == "true") is consolidated_file.exists()
    assert consolidated == "false" or torch.equal(head, load_file(consolidated_file)["lm_head.weight"])

    output = eagle3(target, world, out, *options, "--checkpoint.restore_from", "LATEST")
    assert [True] * 2 == lines_of(
        output,
        rf"Resuming from checkpoint: {out}/checkpoints/epoch_1_step_2\n",
        r"All 1 epochs already completed; nothing to do\.",
    )
    assert torch.equal(head, saved_head(out))

    capfd.readouterr()
    for reference in ("LATEST", "epoch_1_step_2", out / "checkpoints" / "epoch_1_step_2"):
        assert 0 == eagle3_alone(target, world, out, *options, "--checkpoint.restore_from", reference)
        assert [True] * 2 == lines_of(
            capfd.readouterr().err,
            rf"Resuming from checkpoint: {out}/checkpoints/epoch_1_step_2\n",
            r"All 1 epochs already completed; nothing to do\.",
        )
    embedding = AutoModelForCausalLM.from_pretrained(target).get_input_embeddings().weight
    assert not torch.equal(head, embedding[: len(head)])


def test_a_flag_forced_back_to_true_is_refused_for_the_shapes_and_the_head_is_kept(world, tmp_path):
    target = make_target(tmp_path / "target", world[0], vocab_size=VOCAB_SIZE, tie_word_embeddings=True)
    out = tmp_path / "run"
    eagle3(target, world, out, "--draft.vocab_size", "8192")
    head = saved_head(out)
    config = json.loads((out / "draft_config.json").read_text())
    assert config["tie_word_embeddings"] is False
    (out / "draft_config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))

    output = eagle3(
        target, world, out, "--draft.vocab_size", "8192", "--train.epochs", 2, "--checkpoint.restore_from", "LATEST"
    )
    assert [True] * 4 == lines_of(
        output,
        rf"Resuming from checkpoint: {out}/checkpoints/epoch_1_step_2\n",
        r"lm_head.weight \(8192, 32\) and embed_tokens.weight \(128256, 32\) cannot be one tensor: shapes differ; "
        r"claimed by config.tie_word_embeddings",
        "epoch 2 step 4/4: loss",
        rf"Saved checkpoint to {out}/checkpoints/epoch_2_step_4\n",
    )
    assert torch.equal(head, saved_head(out))
    trained = weights_of(out, "epoch_2_step_4")["lm_head.weight"]
    assert (8192, 32) == tuple(trained.shape)
    assert not torch.equal(head, trained)
