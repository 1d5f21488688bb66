"""What `eagle3 evaluate` finds, and that it adds up."""

import dataclasses
import json

import pytest
import torch

from eagle3.cli import main
from eagle3.commands import EvaluateConfig
from eagle3.config import DraftConfig, read_run_config
from eagle3.conversations import load_conversations
from eagle3.errors import ConfigError, DataError
from eagle3.evaluate import evaluate
from eagle3.finished import open_run
from eagle3_targets import make_run, make_target, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A random target, and a run with a few steps."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer, conversations = make_world(folder, num_conversations=6)
    target = make_target(folder / "target", tokenizer, vocab_size=600, tie_word_embeddings=True)
    make_run(folder / "run", target, conversations, draft=DraftConfig(vocab_size=96))
    return folder


def settings(world, **changes):
    return EvaluateConfig(run=str(world / "run"), **({"num_prompts": 3, "max_new_tokens": 12} | changes))


def test_the_settings_of_a_run_are_read_from_its_folder(world):
    config = read_run_config(world / "run")
    assert (str(world / "target"), 3, 96, None) == (
        config.target.model,
        config.unroll.steps,
        config.draft.vocab_size,
        config.target.layers,
    )


def test_an_evaluation_adds_up(world):
    found = evaluate(open_run(world / "run", checkpoint="LATEST"), settings(world))
    assert (3, 3, 3) == (found.num_prompts, found.num_drafted, found.num_identical)
    assert found.difference is None
    for decoding in (found.greedy, found.sampled):
        assert 0 <= decoding.accept_length <= 3
        assert 1 <= decoding.tokens_per_pass <= 4
        assert 3 == len(decoding.by_depth)
        assert decoding.accept_length == sum(decoding.by_depth)
        assert decoding.speed_up > 0
    assert found.greedy.num_tokens <= 36
    assert found.simulated == pytest.approx(sum(found.simulated_by_depth))


def test_a_draft_that_says_what_the_target_says_is_believed_in_both_columns(world):
    """Without a final norm all logits of both are 0, and each takes the lowest id it has."""
    trained = open_run(world / "run", checkpoint="LATEST")
    with torch.no_grad():
        trained.target.decoder.norm.weight.zero_()
        trained.draft.norm.weight.zero_()
    found = evaluate(trained, settings(world))
    assert (3.0, 3.0) == (found.simulated, found.greedy.accept_length)
    assert (1.0, 1.0, 1.0) == found.greedy.by_depth == found.simulated_by_depth


def test_the_command_prints_both_sides_and_keeps_them_in_the_run(world, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["evaluate", str(world / "run"), "--num_prompts", "2", "--max_new_tokens", "8", "--num_drafted", "2"]
    assert 0 == main(arguments)
    printed = capsys.readouterr().out
    kept = json.loads((world / "run" / "evaluation.json").read_text())
    assert f"{kept['simulated']:.2f}" in printed
    assert f"{kept['greedy']['accept_length']:.2f}" in printed
    rows = [line.split("\u2502")[1].strip() for line in printed.splitlines() if line.startswith("\u2502")]
    assert [
        "accept length, of 2",
        "first stands",
        "first 2 stand",
        "tokens per pass of the target",
        "tokens per second",
        "of the target alone",
        "speed-up",
        "identical to the target's own",
    ] == rows
    assert (2, 2) == (kept["num_identical"], kept["num_prompts"])


def test_an_answer_that_differs_is_named_with_its_place(world, monkeypatch):
    """A draft can never cause this, so the target's own answers are changed here."""
    import eagle3.evaluate

    alone = eagle3.evaluate._Writers.alone_greedy

    def other(self, prompt):
        answer = alone(self, prompt)
        return [*answer[:4], (answer[4] + 1) % 600, *answer[5:]]

    monkeypatch.setattr(eagle3.evaluate._Writers, "alone_greedy", other)
    found = evaluate(open_run(world / "run", checkpoint="LATEST"), settings(world))
    assert 0 == found.num_identical
    assert found.difference.startswith("Answer 0 differs at its token 4: ")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_prompts": 0}, "num_prompts is 0, but must be above 0."),
        ({"temperature": -1.0}, "temperature is -1.0, but must be above 0."),
    ],
)
def test_settings_out_of_range_are_refused(world, changes, sentence):
    with pytest.raises(ConfigError) as caught:
        settings(world, **changes)
    assert sentence == str(caught.value)


def test_conversations_without_an_answer_are_refused(world, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Why?"}]}\n')
    assert 1 == len(load_conversations(path))
    with pytest.raises(DataError, match=r"No conversation in .*questions\.jsonl has an answer behind a question"):
        evaluate(open_run(world / "run", checkpoint="LATEST"), settings(world, data=str(path)))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "The target's tokenizer has no chat template of its own"),
        ("{{ raise_exception('no system') }}", r"conversations\.jsonl:1: the chat template refuses .*no system"),
    ],
)
def test_a_target_that_cannot_read_the_questions_is_refused(world, template, words):
    trained = open_run(world / "run", checkpoint="LATEST")
    trained.target.tokenizer.chat_template = template
    with pytest.raises(DataError, match=words):
        evaluate(trained, settings(world))


def test_a_seed_decides_the_sampled_answers(world):
    def lengths(seed):
        trained = open_run(world / "run", checkpoint="LATEST")
        sampled = evaluate(trained, settings(world, seed=seed, temperature=2.0)).sampled
        fields = {field.name for field in dataclasses.fields(sampled)}
        return [getattr(sampled, name) for name in sorted(fields) if "second" not in name]

    assert lengths(0) == lengths(0)
