"""The command line: settings from files and options, and one sentence for what is wrong with them."""

import pytest

from eagle3.cli import main
from eagle3_targets import make_target, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tokenizer, conversations = make_world(folder, num_conversations=4)
    return make_target(folder / "target", tokenizer, vocab_size=600, tie_word_embeddings=True), conversations


def train_arguments(world, out, *options):
    target, conversations = world
    given = ("train", "--out", out, "--target.model", target, "--data.train", conversations, *options)
    return [str(argument) for argument in given]


def test_options_win_over_the_file(world, tmp_path, capfd):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"out: {tmp_path / 'run'}\ntarget:\n  model: {world[0]}\ndata:\n  train: {world[1]}\n  max_length: 40\n"
        "draft:\n  vocab_size: 64\nunroll:\n  steps: 2\ntrain:\n  epochs: 3\n"
    )
    assert 0 == main(["train", "--config", str(config), "--train.epochs", "1", "--draft.vocab_size", "96"])
    output = capfd.readouterr().err
    assert "Draft vocabulary: 96 of 600 tokens" in output
    assert "Training starts: epochs 1," in output


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--target.model", "nowhere"],
            "There is no target nowhere: no folder /",
        ),
        (["--data.train", "nowhere.jsonl"], "nowhere.jsonl cannot be read: No such file or directory"),
        (["--draft.vocab_size", "601"], "draft.vocab_size is 601, but it must be at least"),
        (["--draft.vocab_size", "0"], "draft.vocab_size is 0, but must be above 0"),
        (["--target.layers", "[3,2,1]"], "target.layers is [3, 2, 1], but it must be three ascending ids"),
        (["--train.warmup_ratio", "1.5"], "train.warmup_ratio is 1.5, but must be at least 0 and below 1"),
        (["--data.max_length", "1"], "data.max_length is 1, but must be at least 2"),
        (
            ["--checkpoint.restore_from", "LATEST"],
            "run/config.json cannot be read (No such file or directory). Give the --out of",
        ),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(world, tmp_path, capfd, options, sentence):
    assert 2 == main(train_arguments(world, tmp_path / "run", *options))
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("eagle3: error: ")
    assert sentence in last
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_missing_validation_data_is_met_before_the_training_data_is_read(world, tmp_path, capfd):
    assert 2 == main(train_arguments(world, tmp_path / "run", "--data.validation", "nowhere.jsonl"))
    output = capfd.readouterr().err
    assert ("nowhere.jsonl cannot be read: No such file" in output, "Tokenizing" in output) == (True, False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--train.epoch", "3"], "train.epoch"),
        (["--train.epochs", "many"], "train.epochs"),
        (["--checkpoint.save_consolidated", "perhaps"], "checkpoint.save_consolidated"),
    ],
)
def test_unknown_and_mistyped_settings_are_refused(world, tmp_path, capfd, options, words):
    assert 2 == main(train_arguments(world, tmp_path / "run", *options))
    assert words in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], "eagle3: error: trian is not a command; did you mean train?"),
        (["train", "--train.lr"], "eagle3: error: --train.lr needs a value behind it: a number."),
        (["train", "b"], "eagle3: error: b belongs to no setting; settings are given as --NAME VALUE, and --help"),
        (["report", "--runs", "b"], "eagle3: error: runs is b, but must be a list."),
        ([], "eagle3: error: the following arguments are required: COMMAND (see eagle3 --help)"),
        (["train", "--config"], "eagle3: error: --config needs the path of a YAML file behind it."),
        (["train"], "eagle3: error: --out and --target.model and --data.train are required"),
        (
            ["train", "--train.learning_rat", "3"],
            "eagle3: error: train.learning_rat is unknown; did you mean train.lr?",
        ),
    ],
)
def test_a_command_line_that_cannot_be_understood_is_one_sentence(capfd, arguments, sentence):
    assert 2 == main(arguments)
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith(sentence)


@pytest.mark.parametrize(("arguments", "words"), [(["--help"], "train"), (["train", "--help"], "--train.lr")])
def test_help_lists_commands_and_settings(capfd, arguments, words):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert (0, True) == (caught.value.code, words in capfd.readouterr().out)
