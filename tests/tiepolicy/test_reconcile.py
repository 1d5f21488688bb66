"""A checkpoint against a live model: each row of the table is a list of actions or one clear error."""

import dataclasses

import pytest
import torch

import tiepolicy
from models import FlaggedPair, TiedPair
from tiepolicy import Action, ActionKind, Claim, Policy, Resolution, TensorSpec, View, hookimpl, reconcile
from tiepolicy.errors import DtypeMismatchError, MissingTensorError, ObservationError, ShapeMismatchError

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"
SPEC = TensorSpec((12, 4), torch.float32)


def load(saved, name):
    return Action(kind=ActionKind.LOAD, saved=saved, name=name)


def test_the_canonical_name_is_loaded_once_into_a_tie():
    plan = tiepolicy.plan(TiedPair())
    assert [load(EMBED, EMBED)] == reconcile(plan, plan)


def test_an_alias_alone_is_loaded_into_the_tie():
    assert [load(HEAD, EMBED)] == reconcile(tiepolicy.plan(TiedPair()), {HEAD: SPEC})


def test_of_two_stored_names_of_one_live_tensor_one_is_loaded_and_the_other_compared():
    actions = reconcile(tiepolicy.plan(TiedPair()), {EMBED: SPEC, HEAD: SPEC})
    assert [(ActionKind.LOAD, EMBED, EMBED), (ActionKind.COMPARE, HEAD, HEAD)] == [
        (action.kind, action.saved, action.name) for action in actions
    ]


def test_a_tensor_saved_as_a_tie_is_copied_into_both_of_an_untied_model():
    actions = reconcile(tiepolicy.plan(TiedPair(tied=False)), tiepolicy.plan(TiedPair()))
    expected = Action(
        kind=ActionKind.COPY,
        saved=EMBED,
        name=HEAD,
        note="lm_head.weight and embed_tokens.weight were one tensor when saved; each gets its values",
    )
    assert [load(EMBED, EMBED), expected] == actions


def test_a_part_of_a_saved_tensor_is_copied_from_there():
    fused = torch.zeros(6, 2)
    saved = tiepolicy.plan({"qkv": fused, "k": fused[2:4]})
    live = tiepolicy.plan({"qkv": torch.zeros(6, 2), "k": torch.zeros(2, 2)})
    expected = (ActionKind.COPY, "qkv", View(shape=(2, 2), stride=(2, 1), offset=4))
    assert expected == next((a.kind, a.saved, a.view) for a in reconcile(live, saved) if a.name == "k")


def test_without_a_manifest_a_declared_tie_of_equal_shapes_is_assumed_and_said():
    model = FlaggedPair(flag=True, vocab_size=12, draft_vocab_size=12, hidden_size=4)
    actions = reconcile(tiepolicy.plan(model), {EMBED: SPEC})
    assert [(EMBED, EMBED, ""), (EMBED, HEAD, actions[1].note)] == [(a.saved, a.name, a.note) for a in actions]
    assert actions[1].note.startswith("assumed one tensor with embed_tokens.weight when saved, as config.tie_word_")


def test_a_declared_tie_of_two_names_gives_no_third_name_their_values():
    class Declares:
        @tiepolicy.hookimpl
        def tiepolicy_claims(self):
            return [tiepolicy.Claim(names, "declared") for names in ("ab", "cd")]

    plan = tiepolicy.Policy(plugins=[Declares()]).plan({name: torch.zeros(12, 4) for name in "abcd"})
    actions = reconcile(plan, {"a": SPEC, "c": SPEC})
    assert ["a", "a", "c", "c"] == [action.saved for action in actions]
    assert "assumed one tensor with a when saved, as declared claims; both get its values" == actions[1].note
    assert str(plan.refused[0]).endswith("each has its own storage; claimed by declared")
    with pytest.raises(MissingTensorError, match=r"c \(12, 4\) is not in the checkpoint"):
        reconcile(plan, {"a": SPEC})


def test_a_missing_head_whose_claim_was_refused_is_an_error_that_says_why():
    """The load side of the first failure: the head was dropped because of a flag, and nothing can rebuild it."""
    model = FlaggedPair(flag=True, vocab_size=12, draft_vocab_size=8, hidden_size=4)
    with pytest.raises(MissingTensorError) as caught:
        reconcile(tiepolicy.plan(model), {EMBED: SPEC})
    expected = (
        "lm_head.weight (8, 4) is not in the checkpoint, under its own name or an alias. It cannot be derived from "
        "another tensor: lm_head.weight (8, 4) and embed_tokens.weight (12, 4) cannot be one tensor: shapes differ; "
        "claimed by config.tie_word_embeddings. Nothing was loaded. Load a checkpoint that holds it, or initialise it "
        "and load the other names only"
    )
    assert expected == str(caught.value)


def test_a_missing_name_that_nobody_claims_is_an_error():
    with pytest.raises(MissingTensorError, match=r"lm_head.weight \(12, 4\) is not in the checkpoint"):
        reconcile(tiepolicy.plan(TiedPair(tied=False)), {EMBED: SPEC})


@pytest.mark.parametrize(
    ("shape", "cause"),
    [((9, 4), "vocabulary size"), ((12, 5), "another model size"), ((5,), "belongs to another model")],
)
def test_another_shape_is_an_error_with_both_shapes_and_the_likely_cause(shape, cause):
    with pytest.raises(ShapeMismatchError, match=cause) as caught:
        reconcile(tiepolicy.plan(TiedPair()), {EMBED: TensorSpec(shape, torch.float32)})
    assert f"has shape {shape} in the checkpoint, the model expects (12, 4)" in str(caught.value)


def test_a_vector_of_another_length_is_not_said_to_have_other_rows():
    with pytest.raises(ShapeMismatchError, match="the two differ in length, as with another vocabulary or model size"):
        reconcile(
            tiepolicy.plan(torch.nn.LayerNorm(4)),
            {name: TensorSpec((8,), torch.float32) for name in ("weight", "bias")},
        )


def test_another_dtype_is_an_error():
    with pytest.raises(DtypeMismatchError, match="torch.int8 in the checkpoint"):
        reconcile(tiepolicy.plan(TiedPair()), {EMBED: TensorSpec((12, 4), torch.int8)})


def test_a_partial_model_reads_its_half_from_the_canonical_name():
    """The last stage of a pipeline has the head only, the checkpoint only the embedding that it was."""
    last_stage = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(4, 12, bias=False)})
    actions = reconcile(tiepolicy.plan(last_stage), tiepolicy.plan(TiedPair()))
    assert [(ActionKind.COPY, EMBED, HEAD)] == [(action.kind, action.saved, action.name) for action in actions]


@pytest.mark.parametrize("swapped", [False, True])
def test_what_is_no_plan_and_no_list_of_tensors_is_refused(swapped):
    plan = tiepolicy.plan(TiedPair())
    arguments = (TiedPair(), plan) if swapped else (plan, plan.to_manifest())
    kinds = "TiedPair and a TiePlan" if swapped else "TiePlan and a dict"
    with pytest.raises(ObservationError, match=f"reconcile takes a plan, and a plan .*, not a {kinds}"):
        reconcile(*arguments)


class CountedLooks(tuple):
    """Counts the elements that are taken from it."""

    looks = 0

    def __iter__(self):
        for element in super().__iter__():
            CountedLooks.looks += 1
            yield element


@pytest.mark.parametrize("with_manifest", [False, True])
def test_each_refused_claim_is_looked_at_once_however_many_tensors_are_missing(with_manifest):
    class ClaimAll:
        @hookimpl
        def tiepolicy_claims(self, facts):
            return [Claim((EMBED, name), "declared", "a registry") for name in facts if name != EMBED]

        @hookimpl
        def tiepolicy_resolve(self, conflict):
            return Resolution.leave()

    tensors = {EMBED: torch.zeros(12, 4)} | {f"head.{rows}": torch.zeros(rows, 4) for rows in range(20, 70)}
    plan = Policy(plugins=[ClaimAll()]).plan(tensors)
    plan = dataclasses.replace(plan, refused=CountedLooks(plan.refused))
    saved = tiepolicy.plan({EMBED: torch.zeros(12, 4)})
    CountedLooks.looks = 0
    actions = reconcile(plan, saved if with_manifest else saved.tensors)
    assert (50, 50) == (CountedLooks.looks, sum(action.kind is ActionKind.LEAVE for action in actions))
