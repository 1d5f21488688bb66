"""Making names one tensor: again, where a tie was lost, and for the first time, where it is only declared."""

import copy

import pytest
import torch
from accelerate import init_empty_weights
from hypothesis import given
from torch import nn

import tiepolicy
from models import FlaggedPair, TiedPair, tiny_llama
from strategies import small_sizes, tied_modules
from tiepolicy import Claim, Policy, Reason, hookimpl
from tiepolicy.errors import MissingTensorError, PluginError, TieConflictError, TiePolicyError

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"


def untied_copy(model):
    """The same values and names, each name with memory of its own."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))
    return model


def declared(**sizes):
    return FlaggedPair(flag=True, **({"vocab_size": 12, "draft_vocab_size": 12, "hidden_size": 4} | sizes))


def values(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@given(tied_modules())
def test_retie_restores_every_tie_and_changes_no_value(model):
    plan = tiepolicy.plan(model)
    untied = untied_copy(model)
    expected = values(untied)
    plan.retie(untied)
    plan.verify(untied)
    assert plan == tiepolicy.plan(untied)
    assert all(torch.equal(expected[name], tensor) for name, tensor in untied.state_dict().items())


def test_retie_restores_the_object_after_to_empty():
    with torch.device("meta"):
        model = tiny_llama(tie_word_embeddings=True)
    plan = tiepolicy.plan(model)
    model.to_empty(device="cpu")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    plan.retie(model, keep="canonical")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert 1 == sum(parameter.shape == (96, 16) for parameter in model.parameters())


def test_retie_restores_the_object_after_assign():
    model = TiedPair()
    plan = tiepolicy.plan(model)
    model.load_state_dict(values(model), assign=True)
    assert model.lm_head.weight is not model.embed_tokens.weight
    plan.retie(model)
    assert model.lm_head.weight is model.embed_tokens.weight


def test_a_tensor_without_data_gives_way_to_one_with_data():
    """Only the embedding was assigned; the head is still on the meta device."""
    with torch.device("meta"):
        model = TiedPair()
    plan = tiepolicy.plan(model)
    weight = torch.ones(12, 4)
    model.load_state_dict({HEAD: weight}, strict=False, assign=True)
    plan.retie(model)
    assert model.embed_tokens.weight is model.lm_head.weight
    assert torch.equal(weight, model.embed_tokens.weight.detach())


def test_retie_never_chooses_between_two_values_by_itself():
    model = TiedPair()
    plan = tiepolicy.plan(model)
    untied = untied_copy(model)
    nn.init.ones_(untied.lm_head.weight)
    expected = values(untied)
    message = (
        "lm_head.weight and embed_tokens.weight were one tensor when the plan was made, but their values differ: .* "
        'Keep the value of embed_tokens.weight with keep="canonical"'
    )
    with pytest.raises(TieConflictError, match=message):
        plan.retie(untied)
    assert untied.lm_head.weight is not untied.embed_tokens.weight
    assert all(torch.equal(expected[name], tensor) for name, tensor in untied.state_dict().items())


def test_retie_does_nothing_where_a_later_group_conflicts():
    model = nn.Sequential(TiedPair(), TiedPair())
    plan = tiepolicy.plan(model)
    untied = untied_copy(model)
    nn.init.ones_(untied[1].lm_head.weight)
    with pytest.raises(TieConflictError, match="1.lm_head.weight and 1.embed_tokens.weight"):
        plan.retie(untied)
    assert untied[0].lm_head.weight is not untied[0].embed_tokens.weight


def test_a_frozen_name_and_a_trained_one_are_no_tie_without_a_choice():
    model = TiedPair()
    plan = tiepolicy.plan(model)
    untied = untied_copy(model)
    untied.embed_tokens.weight.requires_grad_(False)
    with pytest.raises(TieConflictError, match="one is frozen"):
        plan.retie(untied)


def test_retie_makes_buffers_and_views_share_memory_again():
    model = nn.Module()
    model.qkv = nn.Parameter(torch.arange(12.0).view(6, 2))
    model.k = nn.Parameter(model.qkv.detach()[2:4])
    model.register_buffer("shadow", model.qkv.detach())
    plan = tiepolicy.plan(model)
    lost = untied_copy(model)
    lost.shadow = lost.shadow.clone()
    with pytest.raises(tiepolicy.errors.BrokenTieError):
        plan.verify(lost)
    plan.retie(lost)
    plan.verify(lost)
    assert isinstance(lost.k, nn.Parameter)
    with torch.no_grad():
        lost.qkv[2, 0] = 99
    assert (99, 99) == (lost.k[0, 0].item(), lost.shadow[2, 0].item())


def test_retie_reaches_modules_behind_wrappers():
    model = TiedPair()
    plan = tiepolicy.plan(model)
    compiled = torch.compile(untied_copy(model))
    plan.retie(compiled)
    plan.verify(compiled)
    assert compiled._orig_mod.lm_head.weight is compiled._orig_mod.embed_tokens.weight


def test_retie_says_when_the_model_is_only_a_part():
    with pytest.raises(MissingTensorError, match="lm_head.weight of the tied .* or a part of it; plan the part"):
        tiepolicy.plan(TiedPair()).retie(nn.ModuleDict({"embed_tokens": nn.Embedding(12, 4)}))


def test_retie_gives_no_name_another_shape():
    model = TiedPair()
    plan = tiepolicy.plan(model)
    model.lm_head.weight = nn.Parameter(torch.zeros(8, 4))
    with pytest.raises(TiePolicyError, match="no longer have one shape and cannot be tied"):
        plan.retie(model, keep="canonical")
    assert (8, 4) == model.lm_head.weight.shape


def test_keep_has_two_values():
    with pytest.raises(ValueError, match="keep is \"last\"|keep is 'last'"):
        tiepolicy.plan(TiedPair()).retie(TiedPair(), keep="last")


def test_a_declared_tie_of_equal_values_is_made_real():
    model = declared()
    with torch.no_grad():
        model.lm_head.weight.copy_(model.embed_tokens.weight)
    plan = tiepolicy.tie(model)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert [(EMBED, HEAD)] == [group.names for group in plan.groups]


def test_a_declared_tie_of_different_values_needs_a_choice():
    model = declared()
    message = "lm_head.weight and embed_tokens.weight are declared to be one tensor, but their values differ"
    with pytest.raises(TieConflictError, match=message):
        tiepolicy.tie(model)
    expected = model.embed_tokens.weight.detach().clone()
    tiepolicy.tie(model, keep="canonical")
    assert model.lm_head.weight is model.embed_tokens.weight
    assert torch.equal(expected, model.lm_head.weight.detach())


def test_a_model_without_data_is_tied_without_a_choice():
    with torch.device("meta"):
        model = declared(vocab_size=128256, draft_vocab_size=128256, hidden_size=2048)
    assert 1 == len(tiepolicy.tie(model).groups)


@given(small_sizes(), small_sizes())
def test_tie_leaves_alone_what_cannot_be_one_tensor(vocab_size, draft_vocab_size):
    """The head of a draft keeps its rows, whatever the flag says."""
    model = declared(vocab_size=vocab_size, draft_vocab_size=draft_vocab_size)
    head = model.lm_head.weight
    tiepolicy.tie(model, keep="canonical")
    assert (head is model.lm_head.weight) is (vocab_size != draft_vocab_size)
    assert (draft_vocab_size, 4) == model.lm_head.weight.shape


def test_tie_honours_a_plugin_that_keeps_two_names_apart():
    class Apart:
        @hookimpl
        def tiepolicy_claims(self):
            return [Claim((EMBED, HEAD), "declared", "a flag")]

        @hookimpl
        def tiepolicy_decide(self):
            return tiepolicy.Verdict.independent("storage-disjoint", "trained apart")

    model = TiedPair(tied=False)
    Policy(plugins=[Apart()]).tie(model, keep="canonical")
    assert model.lm_head.weight is not model.embed_tokens.weight


def test_tie_keeps_no_name_that_is_none_of_a_group():
    class Declares:
        @hookimpl
        def tiepolicy_claims(self):
            return [Claim((EMBED, HEAD), "declared", "a flag")]

        @hookimpl
        def tiepolicy_canonical(self):
            return "norm.weight"

    with pytest.raises(PluginError, match=r"wants 'norm.weight' kept for \['embed_tokens.weight', 'lm_head.weight'\]"):
        Policy(plugins=[Declares()]).tie(TiedPair(tied=False))


def test_tie_joins_all_that_declarations_connect():
    class Chain:
        @hookimpl
        def tiepolicy_claims(self):
            return [Claim(("shared", "decoder"), "declared", "T5"), Claim(("encoder", "shared"), "declared", "T5")]

    model = nn.Module()
    for name in ("decoder", "encoder", "shared"):
        setattr(model, name, nn.Parameter(torch.zeros(3)))
    plan = Policy(plugins=[Chain()]).tie(model)
    assert [("encoder", "decoder", "shared")] == [group.names for group in plan.groups]
    assert model.encoder is model.decoder is model.shared


def test_tie_refuses_a_name_that_is_a_part_of_a_third_tensor():
    class ClaimK:
        @hookimpl
        def tiepolicy_claims(self):
            return [Claim(("k", "other"), "declared", "a registry")]

    model = nn.Module()
    model.qkv = nn.Parameter(torch.zeros(6, 2))
    model.k = nn.Parameter(model.qkv.detach()[2:4])
    model.other = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(TiePolicyError, match="some are views of a part of another"):
        Policy(plugins=[ClaimK()]).tie(model)


def test_tie_makes_parameters_over_one_memory_one_object_without_a_declaration():
    model = TiedPair(tied=False)
    model.lm_head.weight = nn.Parameter(model.embed_tokens.weight.data)
    expected = model.embed_tokens.weight
    tiepolicy.tie(model)
    assert expected is model.lm_head.weight is model.embed_tokens.weight


def test_tie_leaves_a_frozen_double_that_nobody_declared_alone():
    """The head reads the embedding and is not to train it."""
    model = TiedPair(tied=False)
    model.lm_head.weight = nn.Parameter(model.embed_tokens.weight.data, requires_grad=False)
    plan = tiepolicy.tie(model)
    assert model.lm_head.weight is not model.embed_tokens.weight
    plan.verify(model)


def test_a_frozen_part_keeps_no_two_whole_parameters_apart():
    model = TiedPair(tied=False)
    model.lm_head.weight = nn.Parameter(model.embed_tokens.weight.data)
    model.part = nn.Parameter(model.embed_tokens.weight.data[2:4], requires_grad=False)
    tiepolicy.tie(model)
    assert model.lm_head.weight is model.embed_tokens.weight


def test_tie_and_retie_mend_what_init_empty_weights_left_as_two_parameters_without_data():
    whole = TiedPair()
    plan = tiepolicy.plan(whole)
    for mend in (tiepolicy.tie, plan.retie):
        with init_empty_weights():
            model = TiedPair()
        assert model.lm_head.weight is not model.embed_tokens.weight
        mend(model)
        plan.verify(model)
        assert model.lm_head.weight is model.embed_tokens.weight
        assert model.lm_head.weight.is_meta


def test_parameters_that_share_the_memory_of_a_buffer_become_one_parameter():
    model = nn.Module()
    model.register_buffer("a", torch.zeros(3))
    model.b = nn.Parameter(model.a)
    model.c = nn.Parameter(model.a)
    tiepolicy.plan(model).retie(model)
    assert model.b is model.c
    assert model.a.data_ptr() == model.b.data_ptr()


def test_a_declared_tie_that_is_not_there_is_recorded_as_such():
    assert [Reason.DECLARED_NOT_TIED] == [refusal.verdict.reason for refusal in tiepolicy.plan(declared()).refused]
