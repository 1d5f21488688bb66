"""Failures of the field in loading and converting models: what torch alone does today, and what happens here.

A test whose name says `today` pins the behaviour of a tool; when it fails, the tool was fixed.
"""

import copy
import io

import pytest
import torch
from torch import nn

import tiepolicy
from models import FlaggedPair, HeadFirst, TiedPair
from tiepolicy import ActionKind, TensorSpec, reconcile
from tiepolicy.errors import BrokenTieError, MissingTensorError, TieConflictError

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"


def two_values():
    return {EMBED: torch.full((12, 4), 1.0), HEAD: torch.full((12, 4), 2.0)}


def specs(state_dict):
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in state_dict.items()}


def draft():
    return FlaggedPair(flag=False, vocab_size=96, draft_vocab_size=32, hidden_size=4)


# 1. Loading


@pytest.mark.parametrize(("model", "winner"), [(TiedPair, 2.0), (HeadFirst, 1.0)])
def test_today_the_order_of_registration_decides_which_of_two_values_survives(model, winner):
    model = model()
    assert "<All keys matched successfully>" == str(model.load_state_dict(two_values()))
    assert {winner} == set(model.lm_head.weight.flatten().tolist())


@pytest.mark.survey("T13")
@pytest.mark.parametrize("model", [TiedPair, HeadFirst])
def test_two_values_for_one_tensor_are_compared_in_any_order_of_registration(model):
    plan = tiepolicy.plan(model())
    kinds = [action.kind for action in reconcile(plan, specs(two_values()))]
    assert [ActionKind.LOAD, ActionKind.COMPARE] == kinds
    with pytest.raises(TieConflictError, match=r"first at \(0, 0\), 1.0 and 2.0"):
        plan.expand(two_values())


def test_today_assigning_unties_even_what_is_one_tensor_in_the_state_dict():
    model = TiedPair()
    model.load_state_dict(model.state_dict(), assign=True)
    assert model.lm_head.weight is not model.embed_tokens.weight


@pytest.mark.survey("T19")
def test_what_assigning_untied_is_found_and_tied_again():
    model = TiedPair()
    plan = tiepolicy.plan(model)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    with pytest.raises(BrokenTieError, match="were one tensor before assign"):
        plan.verify(model, after="assign")
    plan.retie(model)
    plan.verify(model)


def test_today_the_wish_to_assign_stays_in_the_state_dict():
    model = TiedPair()
    state_dict = model.state_dict()
    model.load_state_dict(state_dict, assign=True)
    assert any(entry.get("assign_to_params_buffers") for entry in state_dict._metadata.values())
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    resumed = TiedPair()
    resumed.load_state_dict(torch.load(file))
    assert resumed.lm_head.weight is not resumed.embed_tokens.weight


@pytest.mark.survey("T75")
def test_an_expanded_state_dict_wishes_nothing():
    model = TiedPair()
    plan = tiepolicy.plan(model)
    state_dict = model.state_dict()
    copy.deepcopy(model).load_state_dict(state_dict, assign=True)
    model.load_state_dict(plan.expand(plan.compact(state_dict)))
    plan.verify(model)
    assert model.lm_head.weight is model.embed_tokens.weight


def test_today_assigning_one_of_two_names_leaves_the_other_stale():
    model = TiedPair()
    model.load_state_dict({EMBED: torch.full((12, 4), 5.0)}, strict=False, assign=True)
    assert not torch.equal(model.embed_tokens.weight, model.lm_head.weight)


@pytest.mark.parametrize("name", [EMBED, HEAD])
def test_one_of_two_names_in_a_checkpoint_is_enough_for_a_tie(name):
    plan = tiepolicy.plan(TiedPair())
    assert [(name, EMBED)] == [
        (action.saved, action.name) for action in reconcile(plan, {name: TensorSpec((12, 4), torch.float32)})
    ]


@pytest.mark.parametrize("vocab_size", [8192, 128256, 151936])
def test_the_last_stage_of_a_pipeline_takes_its_head_from_the_embedding(vocab_size):
    with torch.device("meta"):
        whole = TiedPair(vocab_size=vocab_size, hidden_size=2)
        last_stage = nn.ModuleDict({"lm_head": nn.Linear(2, vocab_size, bias=False)})
    (action,) = reconcile(tiepolicy.plan(last_stage), tiepolicy.plan(whole))
    assert (ActionKind.COPY, EMBED, HEAD) == (action.kind, action.saved, action.name)


def test_missing_but_tied_is_told_apart_from_missing():
    """`load_state_dict(strict=False)` lists the same missing key for a healthy tie and for a lost one."""
    stored = {EMBED: TensorSpec((12, 4), torch.float32)}
    tied, lost = TiedPair(), TiedPair(tied=False)
    weights = {EMBED: torch.zeros(12, 4)}
    assert tied.load_state_dict(weights, strict=False) == lost.load_state_dict(weights, strict=False)
    assert 1 == len(reconcile(tiepolicy.plan(tied), stored))
    with pytest.raises(MissingTensorError):
        reconcile(tiepolicy.plan(lost), stored)


def test_a_draft_without_its_vocabulary_map_is_refused():
    """With `strict=False` the draft's ids would silently map to themselves."""
    model = draft()
    model.register_buffer("d2t", torch.zeros(32, dtype=torch.int64))
    stored = specs(draft().state_dict())
    with pytest.raises(MissingTensorError, match=r"d2t \(32,\) is not in the checkpoint"):
        reconcile(tiepolicy.plan(model), stored)


# 2. Materialising and converting


def test_today_to_empty_unties_plain_modules():
    with torch.device("meta"):
        model = TiedPair()
    model.to_empty(device="cpu")
    assert model.lm_head.weight is not model.embed_tokens.weight


def test_today_to_meta_unties():
    model = TiedPair().to("meta")
    assert model.lm_head.weight is not model.embed_tokens.weight


@pytest.mark.survey("T38")
@pytest.mark.parametrize("steps", [["meta"], ["meta", "to_empty"]])
def test_a_conversion_that_unties_is_found_and_undone(steps):
    model = TiedPair()
    plan = tiepolicy.plan(model)
    model.to("meta")
    if "to_empty" in steps:
        model.to_empty(device="cpu")
    with pytest.raises(BrokenTieError):
        plan.verify(model)
    plan.retie(model, keep="canonical")
    plan.verify(model)


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.double, copy.deepcopy, nn.Module.share_memory])
def test_a_conversion_that_keeps_the_tie_is_let_pass(convert):
    model = TiedPair()
    plan = tiepolicy.plan(model)
    converted = convert(model)
    plan.verify(converted)
    assert converted.lm_head.weight is converted.embed_tokens.weight


@pytest.mark.survey("T64")
def test_shared_buffers_are_tied_untied_by_to_empty_and_tied_again():
    model = nn.ModuleDict({"a": nn.BatchNorm1d(2), "b": nn.BatchNorm1d(2)})
    model["b"].running_mean = model["a"].running_mean
    plan = tiepolicy.plan(model)
    assert [("a.running_mean", "b.running_mean")] == [group.names for group in plan.groups]
    model.to_empty(device="cpu")
    assert model["b"].running_mean is not model["a"].running_mean
    plan.retie(model, keep="canonical")
    assert model["b"].running_mean is model["a"].running_mean
