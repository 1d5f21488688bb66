"""The decision: shapes and storage decide, flags only claim."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import tiepolicy
from models import FlaggedPair
from strategies import flagged_pairs, small_sizes, vocab_sizes
from tiepolicy import Reason

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("flag", "draft_vocab_size", "tied", "is_alias", "reason"),
    [
        (True, 8, False, False, Reason.SHAPE_MISMATCH),
        (True, 12, True, True, Reason.SAME_OBJECT),
        (True, 12, False, False, Reason.DECLARED_NOT_TIED),
        (False, 12, True, True, Reason.SAME_OBJECT),
    ],
)
def test_the_four_cases_of_a_flag_and_a_head(flag, draft_vocab_size, tied, is_alias, reason):
    """Flag and unequal shapes; flag and one tensor; flag and two tensors; one tensor without a flag."""
    model = FlaggedPair(flag=flag, vocab_size=12, draft_vocab_size=draft_vocab_size, hidden_size=4, tied=tied)
    verdict = tiepolicy.plan(model).verdict(EMBED, HEAD)
    assert (is_alias, reason) == (verdict.is_alias, verdict.reason)


def test_without_a_flag_and_without_shared_memory_nobody_claims_anything():
    model = FlaggedPair(flag=False, vocab_size=12, draft_vocab_size=8, hidden_size=4)
    plan = tiepolicy.plan(model)
    assert ((), (), None) == (plan.groups, plan.refused, plan.verdict(EMBED, HEAD))


def test_names_of_two_groups_have_no_verdict_together():
    weights = {"a": torch.zeros(2), "b": torch.zeros(2)}
    plan = tiepolicy.plan(weights | {"also_a": weights["a"], "also_b": weights["b"], "alone": torch.zeros(2)})
    assert [None, None, None] == [plan.verdict(*pair) for pair in (("a", "b"), ("also_a", "also_b"), ("alone", "a"))]
    assert plan.verdict("also_a", "a").is_alias


def test_the_refusal_of_the_field_says_what_differs_and_who_claimed_it():
    with torch.device("meta"):
        model = FlaggedPair(flag=True, vocab_size=128256, draft_vocab_size=8192, hidden_size=2048)
    expected = (
        "lm_head.weight (8192, 2048) and embed_tokens.weight (128256, 2048) cannot be one tensor: shapes differ; "
        "claimed by config.tie_word_embeddings"
    )
    assert [expected] == [str(refusal) for refusal in tiepolicy.plan(model).refused]


@example(vocab_size=128256, draft_vocab_size=8192, hidden_size=2, flag=True)
@example(vocab_size=151936, draft_vocab_size=151669, hidden_size=2, flag=True)
@example(vocab_size=128256, draft_vocab_size=32000, hidden_size=2, flag=True)
@given(vocab_size=vocab_sizes(), draft_vocab_size=vocab_sizes(), hidden_size=small_sizes(), flag=st.booleans())
def test_tensors_of_their_own_are_never_aliases_whatever_the_flag_says(vocab_size, draft_vocab_size, hidden_size, flag):
    with torch.device("meta"):
        model = FlaggedPair(
            flag=flag, vocab_size=vocab_size, draft_vocab_size=draft_vocab_size, hidden_size=hidden_size
        )
    plan = tiepolicy.plan(model)
    expected = Reason.SHAPE_MISMATCH if vocab_size != draft_vocab_size else Reason.DECLARED_NOT_TIED
    assert () == plan.groups
    assert ([expected] if flag else []) == [refusal.verdict.reason for refusal in plan.refused]


@given(flagged_pairs(sizes=vocab_sizes(), device="meta"))
def test_the_plan_agrees_with_the_obvious_rule(model):
    """One parameter object under two names, and nothing else, is a tie of two whole weights."""
    expected = {(EMBED, HEAD)} if model.embed_tokens.weight is model.lm_head.weight else set()
    assert expected == {tuple(sorted(group.names)) for group in tiepolicy.plan(model).groups}


def test_two_parameters_on_one_storage_are_one_tensor():
    """A tie made through `.data` gives two parameters; their memory is one."""
    model = FlaggedPair(flag=False, vocab_size=6, draft_vocab_size=6, hidden_size=2)
    model.lm_head.weight = nn.Parameter(model.embed_tokens.weight.data)
    assert Reason.SAME_STORAGE is tiepolicy.plan(model).verdict(EMBED, HEAD).reason


def test_one_storage_read_as_another_dtype_is_stored_twice():
    weight = torch.zeros(4, 4)
    plan = tiepolicy.plan({"float": weight, "bits": weight.view(torch.int32)})
    assert ((), Reason.DTYPE_MISMATCH) == (plan.groups, plan.verdict("float", "bits").reason)


def test_overlapping_tensors_of_which_none_contains_the_other_are_both_stored():
    buffer = torch.arange(10.0)
    state_dict = {"a": buffer[:6], "b": buffer[4:]}
    plan = tiepolicy.plan(state_dict)
    assert ((), Reason.STORAGE_OVERLAP_PARTIAL) == (plan.groups, plan.verdict("a", "b").reason)
    assert {"a", "b"} == set(plan.compact(state_dict))


def test_separate_parts_of_one_storage_claim_nothing():
    buffer = torch.arange(12.0)
    plan = tiepolicy.plan({"q": buffer[:4], "k": buffer[4:8], "v": buffer[8:]})
    assert ((), ()) == (plan.groups, plan.refused)


def test_a_fused_tensor_is_stored_and_its_parts_are_views_of_it():
    fused = torch.arange(12.0).view(6, 2)
    plan = tiepolicy.plan({"q": fused[:2], "k": fused[2:4], "v": fused[4:], "qkv": fused, "t": fused.t()})
    assert [("qkv", "k", "q", "t", "v")] == [group.names for group in plan.groups]


def test_tensors_without_elements_are_evidence_of_nothing():
    storage = torch.zeros(4)
    plan = tiepolicy.plan({"a": storage[:0], "b": storage[:0].clone(), "c": storage[4:]})
    assert () == plan.groups
