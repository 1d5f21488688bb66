"""Two values for one tensor: an error, unless a plugin chooses a way out."""

import pytest
import torch

import tiepolicy
from models import TiedPair
from tiepolicy import Conflict, Moment, Policy, Resolution, hookimpl
from tiepolicy.errors import PluginError, TieConflictError

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
        (Resolution.keep("norm.weight"), "wants to keep 'norm.weight' where lm_head.weight and embed_tokens.weight"),
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
