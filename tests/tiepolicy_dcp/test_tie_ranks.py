"""Several ranks load what was tied otherwise, as stages of a pipeline, from owners, and in uneven shards."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiepolicy
import tiepolicy_dcp
from models import TiedPair
from torchrun import torchrun

RANKS = Path(__file__).with_name("tie_ranks.py")
pytestmark = pytest.mark.dist


def run(step, folder, num_processes=2):
    result = torchrun(RANKS, step, folder, num_processes=num_processes)
    assert 0 == result.returncode, result.stdout
    return [line for line in result.stdout.splitlines() if "rank " in line]


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """What two ranks said, in one start of them."""
    return run("all_of_two", tmp_path_factory.mktemp("ranks"))


def said(lines, *words):
    """How many ranks said a line with all the words."""
    return sum(all(word in line for word in words) for line in lines)


@pytest.mark.survey("T33")
@pytest.mark.parametrize("make", ["adamw", "momentum"])
def test_the_optimizer_state_of_a_sharded_tie_goes_to_both_of_what_was_untied(lines, make):
    """Plain DCP misses the state of the head, or takes one of two without a word."""
    assert 2 == said(lines, f"{make} saved tied | plain | missing the head")
    assert 2 == said(lines, f"{make} saved tied | ours | nothing raised")
    assert 2 == said(lines, f"{make} saved tied | equal | [True, True]")
    assert 2 == said(lines, f"{make} saved untied | plain | nothing raised")
    sentence = "TieConflictError: lm_head.weight and embed_tokens.weight are one parameter of the optimizer, but their"
    assert 2 == said(lines, f"{make} saved untied | ours | {sentence}")


def test_values_that_differ_on_one_shard_only_stop_every_rank_with_one_sentence(lines):
    """The rank that sees no difference would else go on and wait for the other."""
    sentence = "TieConflictError: lm_head.weight and embed_tokens.weight are one tensor in the model, but their values"
    assert 2 == said(lines, sentence, "first at (5, 3)", "1 of 24 elements in all")
    assert 2 == said(lines, "untouched True")


def test_a_file_that_was_cut_or_is_lost_stops_every_rank_before_anything_is_changed(lines):
    assert 2 == said(lines, "CheckpointError", "__1_0.distcp has", "it was cut or replaced")
    assert 2 == said(lines, "CheckpointError", "__1_0.distcp was cut: model.embed_tokens.weight ends at byte")
    assert 4 == said(lines, "CheckpointError", "__1_0.distcp is missing: a part of the checkpoint was lost")
    assert 2 == said(lines, "unharmed True")


def test_each_stage_reads_its_half_of_a_tie_from_the_stored_name(lines):
    assert 1 == said(lines, "rank 0: equal True load embed_tokens.weight embed_tokens.weight")
    assert 1 == said(lines, "rank 1: equal True copy embed_tokens.weight lm_head.weight")


def test_a_stage_that_nothing_holds_stops_every_stage_with_one_sentence(lines):
    assert 2 == said(lines, "MissingTensorError: lm_head.bias (13,) is not in the checkpoint")


def test_replicas_that_planned_differently_are_refused_at_load(lines):
    assert 2 == said(lines, "PlanMismatchError: rank 0 and rank 1 decided differently", "nothing was loaded")


def test_an_owner_that_changed_on_one_rank_stops_every_rank(lines):
    assert 2 == said(lines, "sharded equal True")
    assert 2 == said(lines, "ExternalOwnerError: embed_tokens.weight (13, 4) belongs to target:embed_tokens.weight")


@pytest.mark.slow
@pytest.mark.parametrize(("saved_on", "loaded_on"), [(2, 3), (3, 2)])
def test_a_vocabulary_that_is_not_divided_evenly_is_resumed_bit_for_bit(tmp_path, saved_on, loaded_on):
    """Weights and optimizer state; ranks with empty shards; once more on one process and with plain tools."""
    folder = tmp_path / "c"
    output = run("save_uneven", folder, num_processes=saved_on)
    assert saved_on - 1 == said(output, "(0,)")
    assert loaded_on == said(run("load_uneven", folder, num_processes=loaded_on), "8 tensors equal True tied True")
    expected = json.loads(folder.with_suffix(".json").read_text())
    model = TiedPair(vocab_size=8193)
    model.scale = torch.nn.Parameter(torch.zeros(1))
    tiepolicy_dcp.load(folder, model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1))
    single = {name: tiepolicy.content_digest(parameter.detach()) for name, parameter in model.named_parameters()}
    assert {name: expected[name] for name in single} == single
    assert expected["embed_tokens.weight"] == tiepolicy.content_digest(
        load_file(folder / "model.safetensors")["embed_tokens.weight"]
    )
