"""Failures of the field that the core alone decides: what a tool does today, where torch alone shows it, and ours.

A test whose name says `today` pins the behaviour of a tool; when it fails, the tool was fixed.
"""

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
from tiepolicy import Reason, TensorSpec, View, reconcile
from tiepolicy.errors import BrokenTieError, MissingTensorError, TieConflictError

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"


def flagged(vocab_size=96, draft_vocab_size=32, hidden_size=4, *, flag=True, tied=False):
    return FlaggedPair(
        flag=flag, vocab_size=vocab_size, draft_vocab_size=draft_vocab_size, hidden_size=hidden_size, tied=tied
    )


# 1. A head of other rows than the embedding


@pytest.mark.survey("T05")
@example(vocab_size=128256, draft_vocab_size=8192)
@example(vocab_size=128256, draft_vocab_size=32000)
@example(vocab_size=151936, draft_vocab_size=151669)  # padded to a multiple of 128
@example(vocab_size=32000, draft_vocab_size=16000)  # one of two tensor-parallel shards
@given(vocab_size=vocab_sizes(), draft_vocab_size=vocab_sizes())
def test_a_head_of_its_own_rows_is_stored_whatever_flag_was_inherited(vocab_size, draft_vocab_size):
    """NeMo left it out; `tiepolicy_hf/test_survey_automodel.py` shows that it no longer does."""
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


def test_a_head_that_cannot_come_from_the_embedding_is_named_with_both_shapes():
    with pytest.raises(MissingTensorError, match=r"lm_head.weight \(32, 4\) and embed_tokens.weight \(96, 4\) cannot"):
        reconcile(tiepolicy.plan(flagged()), {EMBED: TensorSpec((96, 4), torch.float32)})


# 2. Files


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


# 3. Optimizers


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


# 4. Whose tensor it is


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


# 5. Where memory proves nothing


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
