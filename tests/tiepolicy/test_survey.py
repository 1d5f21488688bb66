"""Failures of the field that the core alone decides: what a tool does today, where torch alone shows it, and ours.

A test whose name says `today` pins the behaviour of a tool; when it fails, the tool was fixed.
"""

import copy
import io

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load as load_bytes
from safetensors.torch import load_model, save_model
from safetensors.torch import save as save_bytes
from torch import nn

import tiepolicy
from models import FlaggedPair, HeadFirst, TiedPair, train_steps
from strategies import small_sizes, vocab_sizes
from tiepolicy import ActionKind, Reason, TensorSpec, View, reconcile
from tiepolicy.errors import BrokenTieError, MissingTensorError, TieConflictError

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"


def flagged(vocab_size=96, draft_vocab_size=32, hidden_size=4, *, flag=True, tied=False):
    return FlaggedPair(
        flag=flag, vocab_size=vocab_size, draft_vocab_size=draft_vocab_size, hidden_size=hidden_size, tied=tied
    )


def two_values():
    return {EMBED: torch.full((12, 4), 1.0), HEAD: torch.full((12, 4), 2.0)}


def specs(state_dict):
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in state_dict.items()}


# 1. A head of other rows than the embedding


@pytest.mark.survey("T05")
@example(vocab_size=128256, draft_vocab_size=8192)
@example(vocab_size=128256, draft_vocab_size=32000)
@example(vocab_size=151936, draft_vocab_size=151669)  # padded to a multiple of 128
@example(vocab_size=32000, draft_vocab_size=16000)  # one of two tensor-parallel shards
@given(vocab_size=vocab_sizes(), draft_vocab_size=vocab_sizes())
def test_a_head_of_its_own_rows_is_stored_whatever_flag_was_inherited(vocab_size, draft_vocab_size):
    with torch.device("meta"):
        model = flagged(vocab_size, draft_vocab_size, 1)
    assert {EMBED: (vocab_size, 1), HEAD: (draft_vocab_size, 1)} == {
        name: spec.shape for name, spec in tiepolicy.plan(model).stored().items()
    }


@given(small_sizes(), small_sizes())
def test_a_draft_keeps_its_head_through_a_round_trip(vocab_size, draft_vocab_size):
    model = flagged(vocab_size, draft_vocab_size)
    plan = tiepolicy.plan(model)
    stored = load_bytes(save_bytes(plan.compact(model.state_dict())))
    again = flagged(vocab_size, draft_vocab_size)
    again.load_state_dict(plan.expand(stored))
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)


def test_a_head_that_trained_apart_is_not_clobbered_by_tying_later():
    model = flagged(12, 12)
    head = model.lm_head.weight.detach().clone()
    with pytest.raises(TieConflictError, match="are declared to be one tensor, but their values differ"):
        tiepolicy.tie(model)
    assert torch.equal(head, model.lm_head.weight.detach())


def test_a_declared_tie_whose_weights_diverged_is_stored_twice():
    model = flagged(12, 12)
    assert {EMBED, HEAD} == set(tiepolicy.plan(model).compact(model.state_dict()))


@pytest.mark.survey("T06")
def test_a_head_that_cannot_come_from_the_embedding_is_named_with_both_shapes():
    with pytest.raises(MissingTensorError, match=r"lm_head.weight \(32, 4\) and embed_tokens.weight \(96, 4\) cannot"):
        reconcile(tiepolicy.plan(flagged()), {EMBED: TensorSpec((96, 4), torch.float32)})


# 2. Loading


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
    model = flagged(flag=False)
    model.register_buffer("d2t", torch.zeros(32, dtype=torch.int64))
    stored = specs(flagged(flag=False).state_dict())
    with pytest.raises(MissingTensorError, match=r"d2t \(32,\) is not in the checkpoint"):
        reconcile(tiepolicy.plan(model), stored)


# 3. Materialising and converting


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


# 4. Files


@pytest.mark.survey("T39")
def test_today_safetensors_refuses_an_alias_and_takes_what_compact_leaves():
    model = TiedPair()
    with pytest.raises(RuntimeError, match="Some tensors share memory"):
        save_bytes(model.state_dict())
    stored = save_bytes(tiepolicy.plan(model).compact(model.state_dict()))
    assert len(stored) < 1.5 * model.lm_head.weight.nbytes


def views(**tensors):
    """A module with the tensors as parameters."""
    module = nn.Module()
    for name, tensor in tensors.items():
        setattr(module, name, nn.Parameter(tensor))
    return module


BASE = torch.arange(24.0).view(6, 4)


@pytest.mark.survey("T41", "T42")
@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"whole": BASE, "turned": BASE.t()}, "view size is not compatible"),
        ({"qkv": BASE, "q": BASE[:2], "k": BASE[2:4], "v": BASE[4:]}, "None is covering the entire storage"),
        ({"a": BASE.view(-1)[:12], "b": BASE.view(-1)[8:]}, "None is covering the entire storage"),
        ({"q": BASE[:2], "k": BASE[2:4], "v": BASE[4:]}, "None is covering the entire storage"),
    ],
)
def test_today_safetensors_cannot_save_views_and_compact_makes_them_savable(tensors, message, tmp_path):
    with pytest.raises(RuntimeError, match=message):
        save_model(views(**tensors), str(tmp_path / "model.safetensors"))
    plan = tiepolicy.plan(tensors)
    own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in plan.compact(tensors).items()}
    full = plan.expand(load_bytes(save_bytes(own)))
    assert all(torch.equal(tensors[name], full[name]) for name in tensors)


@pytest.mark.survey("T43")
def test_a_slice_of_a_padded_embedding_is_recorded_with_its_place(tmp_path):
    """Today it is noted as the whole of it, and is missing from a model that has the two apart."""
    padded = torch.arange(160.0).view(20, 8)
    tensors = {"embed": padded, "head": padded[2:18]}
    save_model(views(**tensors), str(tmp_path / "model.safetensors"))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert (["embed"], {"head": "embed"}) == (list(file.keys()), file.metadata())
    with pytest.raises(RuntimeError, match='Missing key.* "head"'):
        load_model(views(embed=torch.zeros(20, 8), head=torch.zeros(16, 8)), tmp_path / "model.safetensors")
    plan = tiepolicy.plan(tensors)
    assert View(shape=(16, 8), stride=(8, 1), offset=16) == plan.groups[0].aliases[0].view
    assert torch.equal(padded[2:18], plan.expand(load_bytes(save_bytes(plan.compact(tensors))))["head"])


def test_the_stored_name_is_the_source_of_the_declaration_and_not_the_first_letter():
    """Tools that look for the embedding find it, although the head comes first in the alphabet."""

    class Declares:
        @tiepolicy.hookimpl
        def tiepolicy_claims(self):
            return [tiepolicy.Claim(("wte.weight", "head.weight"), "declared", "a registry")]

    weight = torch.zeros(5, 2)
    plan = tiepolicy.Policy(plugins=[Declares()]).plan({"head.weight": weight, "wte.weight": weight})
    assert ["wte.weight"] == list(plan.stored())


def test_four_names_of_one_tensor_are_stored_once_and_all_given_back():
    weight = torch.zeros(5, 2)
    names = ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]
    plan = tiepolicy.plan(dict.fromkeys(names, weight))
    assert 1 == len(plan.compact(dict.fromkeys(names, weight)))
    assert set(names) == set(plan.expand(plan.compact(dict.fromkeys(names, weight))))


def test_a_tie_that_nobody_declared_is_found_in_the_storage():
    assert Reason.SAME_OBJECT is tiepolicy.plan(flagged(6, 6, flag=False, tied=True)).verdict(EMBED, HEAD).reason


def test_a_quantized_head_is_no_tie_of_a_float_embedding():
    model = flagged(6, 6)
    del model.lm_head.weight
    model.lm_head.register_buffer("weight", torch.zeros(6, 4, dtype=torch.int8))
    (refusal,) = tiepolicy.Policy(plugins=[DeclaresHead()]).plan(model).refused
    assert Reason.DTYPE_MISMATCH is refusal.verdict.reason


def test_a_head_of_another_dtype_is_no_tie():
    model = flagged(6, 6)
    model.lm_head.to(torch.bfloat16)
    (refusal,) = tiepolicy.plan(model).refused
    message = (
        "lm_head.weight (6, 4) and embed_tokens.weight (6, 4) cannot be one tensor: dtypes differ (torch.bfloat16 and "
        "torch.float32); claimed by config.tie_word_embeddings"
    )
    assert message == str(refusal)


class DeclaresHead:
    @tiepolicy.hookimpl
    def tiepolicy_claims(self):
        return [tiepolicy.Claim((EMBED, HEAD), "declared", "config.tie_word_embeddings")]


# 5. Optimizers


def test_today_two_parameters_on_one_storage_decay_twice():
    model = TiedPair(tied=False)
    model.lm_head.weight = nn.Parameter(model.embed_tokens.weight.data)
    nn.init.ones_(model.embed_tokens.weight)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1).step()
    assert 0.95**2 == pytest.approx(model.embed_tokens.weight[0, 0].item())
    assert Reason.SAME_STORAGE is tiepolicy.plan(model).verdict(EMBED, HEAD).reason


@pytest.mark.parametrize("model", [TiedPair, HeadFirst])
def test_the_name_of_a_tied_tensor_does_not_depend_on_the_order_of_registration(model):
    """Optimizer states and decay groups that use it can be resumed in another order."""
    plan = tiepolicy.plan(model())
    assert {EMBED} == {plan.canonical(name) for name in (EMBED, HEAD)}


def test_copies_that_drift_apart_are_found():
    model = TiedPair()
    plan = tiepolicy.plan(model)
    model.lm_head.weight = nn.Parameter(model.embed_tokens.weight.detach().clone())
    train_steps(model, torch.optim.SGD(model.parameters(), lr=0.1), num_steps=2)
    with pytest.raises(BrokenTieError, match="training would let them drift apart"):
        plan.verify(model)
    with pytest.raises(TieConflictError):
        plan.compact(model.state_dict())


# 6. Whose tensor it is


@pytest.mark.parametrize(("vocab_size", "draft_vocab_size"), [(128256, 8192), (151936, 32000)])
def test_the_frozen_table_of_the_target_is_the_targets(vocab_size, draft_vocab_size):
    with torch.device("meta"):
        target = flagged(vocab_size, vocab_size, flag=False, tied=True)
        draft = flagged(vocab_size, draft_vocab_size, flag=False)
    draft.embed_tokens = target.embed_tokens
    (tie,) = tiepolicy.plan(draft, external={"target": target}).external
    assert (EMBED, "target:embed_tokens.weight", (vocab_size, 4)) == (tie.name, tie.source, tie.shape)


@given(st.booleans())
def test_a_prefix_on_one_of_two_names_hides_no_tie(compiled):
    model = TiedPair()
    if compiled:
        model.embed_tokens = torch.compile(model.embed_tokens)
    assert [(EMBED, HEAD)] == [group.names for group in tiepolicy.plan(model).groups]


# 7. Where memory proves nothing


def one_group_by_address(model):
    """What a rule that trusts addresses makes of a model."""
    return {parameter.data_ptr() for parameter in model.parameters()}


@pytest.mark.survey("T63")
@pytest.mark.parametrize("without_memory", ["meta", "partitioned"])
def test_addresses_would_tie_everything_where_there_is_no_memory_and_identity_does_not(without_memory):
    """`partitioned` is how ZeRO-3 leaves parameters: real, and empty."""
    if without_memory == "meta":
        with torch.device("meta"):
            model = nn.ModuleDict({"tied": TiedPair(), "apart": TiedPair(tied=False)})
    else:
        model = nn.ModuleDict({"tied": TiedPair(), "apart": TiedPair(tied=False)})
        for parameter in model.parameters():
            parameter.data = torch.empty(0)
    assert {0} == one_group_by_address(model)
    assert [(f"tied.{EMBED}", f"tied.{HEAD}")] == [group.names for group in tiepolicy.plan(model).groups]


@pytest.mark.survey("T68")
def test_parameters_without_elements_are_tied_by_object_and_stored():
    empty = torch.zeros(0, 4)
    model = views(a=empty, b=torch.zeros(0, 4))
    model.c = model.a
    plan = tiepolicy.plan(model)
    assert [("a", "c")] == [group.names for group in plan.groups]
    assert {"a", "b"} == set(load_bytes(save_bytes(plan.compact(model.state_dict()))))
