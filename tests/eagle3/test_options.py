"""Settings from files and dotted options, and one sentence for what is wrong with them."""

import dataclasses

import pytest

from eagle3.config import RunConfig
from eagle3.errors import ConfigError
from eagle3.options import _OTHER_NAMES, _leaves, read_settings, shipped_configs

GIVEN = ["--out", "run", "--target.model", "folder", "--data.train", "chats.jsonl"]


def refusal(*arguments):
    with pytest.raises(ConfigError) as caught:
        read_settings(RunConfig, list(arguments))
    return str(caught.value)


def test_what_is_not_given_has_its_default():
    settings = read_settings(RunConfig, GIVEN)
    assert "folder" == settings.target.model
    assert RunConfig(out="run", target=settings.target, data=settings.data) == settings


def test_lists_numbers_and_null_are_typed():
    options = ["--target.layers", "[1,2,3]", "--train.lr", "1e-3", "--draft.vocab_size", "null"]
    settings = read_settings(RunConfig, [*GIVEN, *options, "--data.packing=true"])
    assert ((1, 2, 3), 1e-3, None, True) == (
        settings.target.layers,
        settings.train.lr,
        settings.draft.vocab_size,
        settings.data.packing,
    )


def test_what_stands_later_wins(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("train:\n  epochs: 3\n  lr: 1e-3\n")
    after = read_settings(RunConfig, [*GIVEN, "--config", str(config), "--train.epochs", "4"])
    before = read_settings(RunConfig, [*GIVEN, "--train.epochs", "4", f"--config={config}"])
    assert ((4, 1e-3), (3, 1e-3)) == ((after.train.epochs, after.train.lr), (before.train.epochs, before.train.lr))


@pytest.mark.parametrize("name", shipped_configs())
def test_a_config_that_comes_with_the_package_is_found_by_its_name(name):
    settings = read_settings(RunConfig, ["--config", name, "--data.train", "mine.jsonl"])
    assert "mine.jsonl" == settings.data.train


def test_configs_come_for_three_public_targets_and_the_embedded_one():
    assert ["embedded.yaml", "llama-3.1-8b.yaml", "llama-3.2-1b.yaml", "qwen3-8b.yaml"] == shipped_configs()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("train.learning_rat", "train.lr"),
        ("train.learning_rate", "train.lr"),
        ("train.epoch", "train.epochs"),
        ("train.num_epochs", "train.epochs"),
        ("trian.epochs", "train.epochs"),
        ("target.modle", "target.model"),
        ("model_name_or_path", "target.model"),
        ("data.max_len", "data.max_length"),
        ("draft_vocab_size", "draft.vocab_size"),
        ("draft.vocabsize", "draft.vocab_size"),
        ("unroll.ttt-length", "unroll.steps"),
        ("checkpoint.resume", "checkpoint.restore_from"),
        ("output_dir", "out"),
        ("target", "target.model"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_known_one(typed, meant):
    assert f"{typed} is unknown; did you mean {meant}?" == refusal(*GIVEN, f"--{typed}", "3")


def test_an_unknown_key_of_a_file_is_refused_with_the_nearest_known_one(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("out: run\ntrain:\n  learning_rat: 3\n")
    assert f"train.learning_rat is unknown; did you mean train.lr? ({config})" == refusal("--config", str(config))


def test_the_other_names_of_settings_belong_to_settings():
    assert set(_OTHER_NAMES) <= {name for name, _ in _leaves(RunConfig)}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "--out and --target.model and --data.train are required; give them as an option or in the config file."),
        (
            ["--out", "x", "--data.train", "y"],
            "--target.model is required; give it as an option or in the config file.",
        ),
        ([*GIVEN, "--train.epochs", "many"], "train.epochs is many, but must be a whole number."),
        ([*GIVEN, "--train.lr", "fast"], "train.lr is fast, but must be a number."),
        ([*GIVEN, "--draft.vocab_size", "big"], "draft.vocab_size is big, but must be a whole number or null."),
        ([*GIVEN, "--target.dtype", "fp8"], "target.dtype is fp8, but must be one of float32, bfloat16."),
        ([*GIVEN, "--train.step", "fast"], "train.step is fast, but must be one of fused, autograd or null."),
        (
            [*GIVEN, "--target.layers", "[1, 2]"],
            "target.layers is [1, 2], but must be a list of 3 whole numbers or null.",
        ),
        ([*GIVEN, "--data.packing", "perhaps"], "data.packing is perhaps, but must be true or false."),
        ([*GIVEN, "--draft.min_coverage", "2"], "draft.min_coverage is 2.0, but must be from 0 to 1."),
        ([*GIVEN, "--checkpoint.keep_last", "0"], "checkpoint.keep_last is 0, but must be above 0 or null."),
        ([*GIVEN, "--train.epochs", "0"], "train.epochs is 0, but must be above 0."),
        ([*GIVEN, "--out", ""], "out is empty, but must be text."),
        ([*GIVEN, "--data.validation="], "data.validation is empty, but must be text or null."),
        ([*GIVEN, "more"], "more belongs to no setting; settings are given as --NAME VALUE, and --help lists them."),
    ],
)
def test_a_wrong_setting_is_named_as_it_is_typed(options, sentence):
    assert sentence == refusal(*options)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("out: x\n- b", "run.yaml is not YAML in UTF-8: while parsing a block mapping"),
        ("- b", "run.yaml must hold settings such as `train:` with `lr: 1e-4` below it."),
        ("target: 3", "target needs settings below it, such as target.model; or leave it out. ("),
        ("train:\ndraft: {vocab_size: 3}", "train needs settings below it, such as train.epochs; or leave it out. ("),
        ("train:\n  lr:\n", "train.lr is empty, but must be a number."),
    ],
)
def test_a_file_that_holds_no_settings_is_refused(tmp_path, text, sentence):
    config = tmp_path / "run.yaml"
    config.write_text(text)
    assert sentence in refusal(*GIVEN, "--config", str(config))


def test_a_missing_file_is_named_with_those_that_exist():
    expected = (
        "The config file nowhere.yaml cannot be read: No such file or directory. Give a YAML file, or one that comes "
        "with eagle3: embedded.yaml, llama-3.1-8b.yaml, llama-3.2-1b.yaml, qwen3-8b.yaml."
    )
    assert expected == refusal("--config", "nowhere.yaml")


def test_settings_cannot_be_changed():
    settings = read_settings(RunConfig, GIVEN)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.train.lr = 1.0
