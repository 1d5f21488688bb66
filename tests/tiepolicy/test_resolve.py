"""Two values for one tensor: an error, unless a plugin chooses a way out."""

import pytest
import torch

import tiepolicy
from models import FlaggedPair, TiedPair
from tiepolicy import Action, ActionKind, Conflict, Missing, Moment, Policy, Resolution, TensorSpec, hookimpl, reconcile
from tiepolicy.errors import DtypeMismatchError, PluginError, ShapeMismatchError, TieConflictError

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"


class Answer:
    """Always gives one answer, and remembers what it was asked."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = []

    @hookimpl
    def tiepolicy_resolve(self, conflict):
        self.asked.append(conflict)
        return self.answer


def two_values():
    return {EMBED: torch.zeros(12, 4), HEAD: torch.ones(12, 4)}


def planned(answer):
    return Policy(plugins=[Answer(answer)]).plan(TiedPair())


def test_a_plugin_hears_what_differs_and_when():
    plugin = Answer(Resolution.keep(EMBED))
    Policy(plugins=[plugin]).plan(TiedPair()).compact(two_values())
    expected = Conflict(
        canonical=EMBED,
        alias=HEAD,
        difference="first at (0, 0), 0.0 and 1.0, 48 of 48 elements in all",
        moment=Moment.COMPACT,
    )
    assert [expected] == plugin.asked


@pytest.mark.parametrize(("name", "value"), [(EMBED, 0), (HEAD, 1)])
def test_the_value_of_the_name_that_is_kept_is_stored(name, value):
    plan = planned(Resolution.keep(name))
    small = plan.compact(two_values())
    assert ([EMBED], {value}) == (list(small), set(small[EMBED].flatten().tolist()))


@pytest.mark.parametrize(("name", "value"), [(EMBED, 0), (HEAD, 1)])
def test_both_names_get_the_value_that_is_kept_on_expansion(name, value):
    full = planned(Resolution.keep(name)).expand(two_values())
    assert full[EMBED] is full[HEAD]
    assert {value} == set(full[HEAD].flatten().tolist())


def test_untied_names_keep_their_values_through_the_round_trip():
    plan = planned(Resolution.untie())
    full = plan.expand(plan.compact(two_values()))
    assert all(torch.equal(two_values()[name], full[name]) for name in (EMBED, HEAD))


def test_equal_values_ask_nobody():
    plugin = Answer(Resolution.untie())
    Policy(plugins=[plugin]).plan(TiedPair()).compact({EMBED: torch.zeros(12, 4), HEAD: torch.zeros(12, 4)})
    assert [] == plugin.asked


def test_without_an_answer_the_conflict_is_an_error():
    with pytest.raises(TieConflictError, match="lm_head.weight and embed_tokens.weight are one tensor in the plan"):
        planned(None).compact(two_values())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Resolution.take(EMBED), "answers take 'embed_tokens.weight' where lm_head.weight and embed_tokens.weight"),
        (Resolution.leave(), "answers leave where lm_head.weight and embed_tokens.weight differ; it may keep embed"),
        (Resolution.keep("norm.weight"), "answers keep 'norm.weight' where lm_head.weight and embed_tokens.weight"),
        ("lm_head.weight", "answered tiepolicy_resolve with 'lm_head.weight', a str; expected a Resolution"),
    ],
)
def test_an_answer_that_is_none_is_refused(answer, message):
    with pytest.raises(PluginError, match=message):
        planned(answer).compact(two_values())


def test_a_part_cannot_be_kept_for_the_whole():
    whole = torch.zeros(4)
    plan = Policy(plugins=[Answer(Resolution.keep("part"))]).plan({"whole": whole, "part": whole[:2]})
    with pytest.raises(PluginError, match="it may keep whole, or untie them"):
        plan.compact({"whole": torch.zeros(4), "part": torch.ones(2)})


def test_a_plugin_may_choose_while_names_are_tied_again():
    model = TiedPair()
    plan = planned(Resolution.keep(HEAD))
    model.lm_head.weight = torch.nn.Parameter(torch.ones(12, 4))
    plan.retie(model)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert {1.0} == set(model.lm_head.weight.flatten().tolist())


def test_a_plugin_may_leave_names_untied():
    model = TiedPair()
    plan = planned(Resolution.untie())
    model.lm_head.weight = torch.nn.Parameter(torch.ones(12, 4))
    plan.retie(model)
    assert model.lm_head.weight is not model.embed_tokens.weight


def test_loaders_ask_through_the_plan_they_have():
    conflict = Conflict(canonical=EMBED, alias=HEAD, difference="first at (0, 0)", moment=Moment.LOAD)
    assert HEAD == tiepolicy.settle(conflict, planned(Resolution.keep(HEAD)).resolver)
    with pytest.raises(TieConflictError, match="Nothing was loaded. Untie the model to keep both"):
        tiepolicy.settle(conflict, tiepolicy.plan(TiedPair()).resolver)


SPEC = TensorSpec((12, 4), torch.float32)
STORED = {EMBED: SPEC, "old_head.weight": SPEC, "wide.weight": TensorSpec((12, 5), torch.float32)}


def reconciled(answer, stored, model=None):
    return reconcile(Policy(plugins=[Answer(answer)]).plan(model or TiedPair(tied=False)), stored)


def test_a_plugin_hears_which_name_is_missing_and_what_is_stored():
    plugin = Answer(Resolution.leave())
    reconcile(Policy(plugins=[plugin]).plan(TiedPair(tied=False)), STORED)
    assert [Missing(name=HEAD, spec=SPEC, stored=STORED)] == plugin.asked


def test_a_plugin_hears_which_claim_about_a_missing_name_was_refused():
    class Claims:
        @hookimpl
        def tiepolicy_claims(self):
            return [tiepolicy.Claim((EMBED, HEAD), "declared", "the flag")]

    plugin = Answer(Resolution.leave())
    model = FlaggedPair(flag=True, vocab_size=12, draft_vocab_size=8, hidden_size=4)
    reconcile(Policy(plugins=[plugin, Claims()]).plan(model), STORED)
    expected = (
        "lm_head.weight (8, 4) and embed_tokens.weight (12, 4) cannot be one tensor: shapes differ; claimed by the flag"
    )
    assert [(HEAD, (expected,))] == [(missing.name, missing.refused) for missing in plugin.asked]


def test_a_missing_tensor_may_be_taken_from_another_of_its_shape():
    expected = Action(
        kind=ActionKind.COPY,
        saved="old_head.weight",
        name=HEAD,
        note="it is not in the checkpoint, and a plugin takes the values of old_head.weight",
    )
    assert expected in reconciled(Resolution.take("old_head.weight"), STORED)


def test_a_missing_tensor_may_be_left_as_it_is_and_that_is_said():
    expected = Action(
        kind=ActionKind.LEAVE,
        saved=HEAD,
        name=HEAD,
        note="it is not in the checkpoint, and a plugin leaves it as it is",
    )
    assert expected in reconciled(Resolution.leave(), STORED)


def test_a_missing_tensor_is_never_taken_from_another_shape_or_dtype():
    with pytest.raises(ShapeMismatchError, match=r"wide.weight, which stands for lm_head.weight, has shape \(12, 5\)"):
        reconciled(Resolution.take("wide.weight"), STORED)
    with pytest.raises(DtypeMismatchError, match="old_head.weight is torch.int8 in the checkpoint"):
        reconciled(Resolution.take("old_head.weight"), STORED | {"old_head.weight": TensorSpec((12, 4), torch.int8)})


@pytest.mark.parametrize("answer", [Resolution.take("nowhere"), Resolution.keep(EMBED), Resolution.untie()])
def test_another_answer_about_a_missing_tensor_is_refused(answer):
    with pytest.raises(PluginError) as caught:
        reconciled(answer, STORED)
    expected = (
        f"tiepolicy_resolve answers {answer} for lm_head.weight (12, 4), which is not in the checkpoint; it may take "
        "the values of a name that is stored, or leave the tensor as it is. Nothing was loaded"
    )
    assert expected == str(caught.value)


def test_a_tensor_of_which_a_part_is_stored_cannot_be_left():
    whole = torch.zeros(4)
    plan = Policy(plugins=[Answer(Resolution.leave())]).plan({"whole": whole, "part": whole[:2]})
    with pytest.raises(PluginError, match="leaves whole as it is, but the checkpoint holds part, which is a part"):
        reconcile(plan, {"part": TensorSpec((2,), torch.float32)})


def test_nobody_is_asked_about_what_another_name_holds():
    plugin = Answer(Resolution.leave())
    reconcile(Policy(plugins=[plugin]).plan(TiedPair()), {HEAD: SPEC})
    assert [] == plugin.asked
