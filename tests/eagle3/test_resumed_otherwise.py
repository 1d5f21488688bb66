"""A run that is resumed with other settings, data or files: refused where they shaped it, told elsewhere."""

import dataclasses
import json
import multiprocessing
import re
import shutil
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from eagle3.blueprint import read_draft_config
from eagle3.cli import main
from eagle3.errors import CheckpointError, DraftError
from eagle3.trainer import train
from eagle3_runs import ALONE, config_of, make_run_world, metrics_of

REFUSED = [
    (
        "target",
        "dtype",
        "bfloat16",
        r"beside a target of another target\.dtype or shape than .* in bfloat16: .* torch\.float32",
    ),
    ("target", "layers", (0, 1, 2), r"has eagle_aux_hidden_state_layer_ids \[1, 2, 3\], not \[0, 1, 2\], as the"),
    (
        "draft",
        "vocab_size",
        64,
        r"which shaped its weights: draft\.vocab_size 96 -> 64\. Resume with the first of each",
    ),
    ("draft", "vocab_size", None, r"which shaped its weights: draft\.vocab_size 96 -> None\."),
    ("draft", "norm_output", True, r"which shaped its weights: draft\.norm_output False -> True\."),
    (
        "data",
        "packing",
        True,
        r"was trained on other data than this run has \(data\.train, data\.max_length, data\.pack",
    ),
]
TOLD = [
    ("train", "precision", "bfloat16", "train.precision None -> bfloat16"),
    pytest.param("train", "seed", 3, "train.seed 0 -> 3", marks=pytest.mark.slow),
    pytest.param("unroll", "steps", 2, "unroll.steps 3 -> 2", marks=pytest.mark.slow),
    pytest.param("parallel", "kind", "shard", "parallel.kind data -> shard", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_run_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def begun(world, tmp_path_factory):
    """A run that was cut in its first epoch."""
    out = tmp_path_factory.mktemp("run")
    train(config_of(world, out, epochs=1, every_steps=2), ALONE)
    return out


@pytest.fixture
def resume(world, begun, tmp_path):
    """Goes on with a copy of that run, one section of its settings changed."""
    out = tmp_path / "run"
    shutil.copytree(begun, out, symlinks=True)
    config = config_of(world, out, epochs=1, every_steps=2, restore_from="epoch_1_step_2")

    def go(section, **changes):
        train(dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)}), ALONE)

    return go


@pytest.mark.parametrize(("section", "name", "value", "words"), REFUSED)
def test_what_shaped_the_run_cannot_be_another_now(resume, begun, tmp_path, section, name, value, words):
    with pytest.raises((CheckpointError, DraftError), match=words) as error:
        resume(section, **{name: value})
    assert "\n" not in str(error.value)
    assert metrics_of(begun) == metrics_of(tmp_path / "run")


def test_the_same_conversations_in_another_order_are_other_data(resume, world, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(reversed(world[1].read_text().splitlines(keepends=True))))
    with pytest.raises(CheckpointError, match=r"was trained on other data than this run has .* or start a new run\."):
        resume("data", train=str(other))


def test_the_same_conversations_in_another_file_are_the_same_data(resume, world, begun, tmp_path):
    shutil.copy(world[1], tmp_path / "moved.jsonl")
    resume("data", train=str(tmp_path / "moved.jsonl"))
    assert metrics_of(begun) == metrics_of(tmp_path / "run")


@pytest.mark.parametrize(("section", "name", "value", "words"), TOLD)
def test_what_may_change_is_told(resume, caplog, section, name, value, words):
    resume(section, **{name: value})
    assert f"Settings changed since the checkpoint: {words}" in caplog.messages


def test_two_runs_cannot_train_in_one_folder(world, tmp_path, monkeypatch):
    """The second changes nothing, whether it starts anew or resumes; the folder is free when the first has ended."""
    monkeypatch.setattr("eagle3.trainer._PATIENCE", 0.05)
    out = tmp_path / "run"
    first = multiprocessing.get_context("fork").Process(target=train, args=(config_of(world, out, epochs=400), ALONE))
    first.start()
    while not (out / "metrics.jsonl").exists():
        assert first.is_alive()
        time.sleep(0.01)
    sentence = f"Another run trains in {re.escape(str(out))} right now, and both would destroy each other's checkpoints"
    for options in ({}, {"restore_from": "LATEST"}):
        with pytest.raises(CheckpointError, match=sentence):
            train(config_of(world, out, draft_vocab_size=64, **options), ALONE)
    first.terminate()
    first.join()
    assert 0 == first.exitcode
    logged = [entry["step"] for entry in metrics_of(out)]
    assert list(range(1, len(logged) + 1)) == logged
    assert 96 == read_draft_config(out).draft_vocab_size
    more = -(-len(logged) // 5)
    train(config_of(world, out, epochs=more, restore_from="LATEST"), ALONE)
    assert 5 * more == metrics_of(out)[-1]["step"]


def test_a_checkpoint_of_another_draft_is_one_sentence(world, begun, tmp_path, capfd):
    """Given by its path, to a run whose draft has another vocabulary."""
    other = tmp_path / "other"
    train(config_of(world, other, epochs=1, draft_vocab_size=64), ALONE)
    before = metrics_of(other)
    reference = begun / "checkpoints" / "epoch_1_step_2"
    sentence = error_of("train", "--out", other, *given(world, 64), "--checkpoint.restore_from", reference, capfd=capfd)
    assert "d2t has shape (96,) in the checkpoint, the model expects (64,)" in sentence
    assert before == metrics_of(other)


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_the_settings_of_another_run_are_one_sentence(world, begun, tmp_path, capfd, command):
    """Its target has the same vocabulary, and other weights."""
    out, other = tmp_path / "run", tmp_path / "target"
    shutil.copytree(begun, out, symlinks=True)
    shutil.copytree(world[0], other)
    model = AutoModelForCausalLM.from_pretrained(world[0])
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(other)
    settings = json.loads((out / "run_config.json").read_text())
    settings["target"]["model"] = str(other)
    (out / "run_config.json").write_text(json.dumps(settings))
    options = ("--out", tmp_path / "export") if command == "export" else ()
    sentence = error_of(command, out, *options, capfd=capfd)
    assert "epoch_1_step_5 holds a draft of another target: the embedding or the head differs." in sentence
    assert not (tmp_path / "export").exists()


def given(world, draft_vocab_size):
    small = ("--data.max_length", 48, "--unroll.steps", 3, "--draft.vocab_size", draft_vocab_size)
    return ("--target.model", world[0], "--data.train", world[1], *small)


def error_of(*arguments, capfd):
    """The one sentence of a command that ends with exit code 2."""
    assert 2 == main([str(argument) for argument in arguments])
    output = capfd.readouterr().err
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("eagle3: error: ")]
    return line
