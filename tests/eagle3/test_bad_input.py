"""What is wrong with a run's input is one sentence and exit code 2, and nothing half-written is left."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle3.blueprint import read_draft_config
from eagle3.cli import main
from eagle3.config import RunConfig
from eagle3.errors import DraftError
from eagle3.inputs import asked_layers
from eagle3.options import read_settings
from eagle3_targets import make_target, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tokenizer, conversations = make_world(folder, num_conversations=4)
    return make_target(folder / "target", tokenizer, vocab_size=600, tie_word_embeddings=True), conversations


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without_template(target, conversations):
    (target / "chat_template.jinja").unlink()


def too_shallow(target, conversations):
    change_config(target, num_hidden_layers=3)


def unknown_rope(target, conversations):
    change_config(target, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4})


def not_a_number(target, conversations):
    weights = load_file(target / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"].fill_(torch.nan)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def no_config(target, conversations):
    (target / "config.json").unlink()


def null_as_config(target, conversations):
    (target / "config.json").write_text("null")


def null_as_tokenizer(target, conversations):
    (target / "tokenizer_config.json").write_text("null")


def no_weights(target, conversations):
    (target / "model.safetensors").unlink()


def empty_data(target, conversations):
    conversations.write_text("\n")


def nothing_to_learn(target, conversations):
    conversations.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')


def broken_line(target, conversations):
    with conversations.open("a") as file:
        file.write('{"messages": 3}\n')


FAULTS = [
    (without_template, "The target's tokenizer has no chat template of its own"),
    (too_shallow, "The target has 3 layers; a draft reads from three of them, so it needs 4 or more."),
    (unknown_rope, "spiral"),
    (not_a_number, "NaN or infinity"),
    (no_config, "of the target"),
    (null_as_config, "of the target"),
    (null_as_tokenizer, "The tokenizer of the target"),
    (no_weights, "of the target"),
    (empty_data, "holds no conversation. Each line is one object such as"),
    (nothing_to_learn, "None of the 1 conversations has a token of the assistant within the first 40 tokens."),
    (broken_line, "conversations.jsonl:5: `messages` must be a list of at least one message."),
]


def run(command, folder, *options):
    given = ("--out", folder / "run", "--target.model", folder / "target", "--data.train")
    small = (
        "--data.max_length",
        40,
        "--draft.vocab_size",
        96,
        "--unroll.steps",
        2,
        "--target.cache",
        folder / "states",
    )
    small = small if command == "cache" else small[:-2]
    arguments = (command, *given, folder / "conversations.jsonl", *small, *options)
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("command", ["train", "cache"])
@pytest.mark.parametrize(("spoil", "words"), FAULTS, ids=[spoil.__name__ for spoil, _ in FAULTS])
def test_a_spoilt_input_is_one_sentence(world, tmp_path, capfd, command, spoil, words):
    shutil.copytree(world[0], tmp_path / "target")
    shutil.copy(world[1], tmp_path)
    spoil(tmp_path / "target", tmp_path / "conversations.jsonl")
    assert 2 == run(command, tmp_path)
    output = capfd.readouterr().err
    (line,) = [line for line in output.splitlines() if "error: " in line]
    assert line.startswith("eagle3: error: ")
    assert words in line
    assert "Traceback" not in output
    left = [path.name for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "target"]
    assert [] == [name for name in left if name.startswith(("shard", "epoch", "__")) or name.endswith(".partial")]


@pytest.mark.parametrize("command", ["train", "vocab", "estimate"])
def test_a_draft_vocabulary_larger_than_the_targets_is_refused(world, tmp_path, capfd, command):
    shutil.copytree(world[0], tmp_path / "target")
    shutil.copy(world[1], tmp_path)
    assert 2 == run(command, tmp_path, "--draft.vocab_size", 601)
    assert "draft.vocab_size is 601" in capfd.readouterr().err


def test_a_vocabulary_that_covers_too_little_is_refused_by_its_share(world, tmp_path, capfd):
    shutil.copytree(world[0], tmp_path / "target")
    shutil.copy(world[1], tmp_path)
    assert 2 == run("vocab", tmp_path, "--draft.vocab_size", 8, "--draft.min_coverage", 0.9)
    assert "The draft's 8 tokens are only" in capfd.readouterr().err


@pytest.mark.parametrize("content", [b"null", b"{}", b"[]", b"\xff"])
def test_a_config_that_is_no_drafts_is_refused(tmp_path, content):
    (tmp_path / "draft_config.json").write_bytes(content)
    with pytest.raises(DraftError, match=r"draft_config\.json cannot be read"):
        read_draft_config(tmp_path)


def test_a_cache_needs_a_folder(world, tmp_path, capfd):
    given = ["--out", tmp_path / "run", "--target.model", world[0], "--data.train", world[1]]
    assert 2 == main(["cache", *map(str, given)])
    expected = "eagle3: error: --target.cache is required; give the folder that the states are to be written to."
    assert expected == capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("name", "expected"), [("inputs", (1, 2, 3)), ("outputs", (2, 3, 4))])
def test_layers_are_named_by_their_inputs_or_their_outputs(name, expected):
    """The output of layer k is the input of layer k + 1."""
    given = ["--out", "x", "--target.model", "y", "--data.train", "z", "--target.layers", "[1,2,3]"]
    assert expected == asked_layers(read_settings(RunConfig, [*given, "--target.layers_name", name]))
