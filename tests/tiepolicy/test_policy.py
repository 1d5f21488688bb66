"""Plugins: they claim, decide and choose, and can never make a checkpoint lose a tensor."""

import random

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import tiepolicy
import tiepolicy_hf._plugin
from models import FlaggedPair, TiedPair
from strategies import memory_dicts, view_dicts
from tiepolicy import Claim, Policy, Verdict, hookimpl
from tiepolicy.errors import PluginError, TiePolicyError, UnsafeVerdictError
from tiepolicy.testing import models


class FlagTrusting:
    """The rule of the first failure: what is declared to be tied is tied."""

    @hookimpl
    def tiepolicy_decide(self, claim):
        return Verdict.alias("same-storage", "the config says so") if claim.source == "declared" else None


class RandomAnswers:
    """Claims anything, decides anything, chooses any name."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    @hookimpl
    def tiepolicy_claims(self, facts):
        names = sorted(facts)
        return [Claim(tuple(self.random.sample(names, 2)), "user", "chance")] if len(names) > 1 else None

    @hookimpl
    def tiepolicy_decide(self):
        return self.random.choice([None, Verdict.alias("view-of"), Verdict.independent("storage-disjoint", "chance")])

    @hookimpl
    def tiepolicy_canonical(self, group):
        return self.random.choice([None, *group])


def test_the_flag_trusting_rule_is_stopped_with_the_shapes_in_the_message():
    policy = Policy(plugins=[tiepolicy_hf._plugin, FlagTrusting()])
    model = FlaggedPair(flag=True, vocab_size=12, draft_vocab_size=8, hidden_size=4)
    expected = (
        "the plugin FlagTrusting calls lm_head.weight and embed_tokens.weight one tensor (same-storage; claimed by "
        "config.tie_word_embeddings), but lm_head.weight (8, 4) cannot be rebuilt from embed_tokens.weight (12, 4): "
        "shapes differ. Saving would lose lm_head.weight; nothing was written. Remove the plugin's verdict, or tie the "
        "two first"
    )
    with pytest.raises(UnsafeVerdictError) as caught:
        policy.plan(model)
    assert expected == str(caught.value)


@given(view_dicts(), st.integers())
def test_no_plugin_can_make_compact_lose_a_byte(state_dict, seed):
    try:
        plan = Policy(plugins=[RandomAnswers(seed)]).plan(state_dict)
    except UnsafeVerdictError:
        return
    expanded = plan.expand(plan.compact(state_dict))
    assert set(state_dict) == set(expanded)
    assert all(torch.equal(state_dict[name], expanded[name]) for name in state_dict)


class TrueClaims:
    """Claims at random, and leaves every decision to the facts."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    @hookimpl
    def tiepolicy_claims(self, facts):
        names = sorted(facts)
        pairs = [self.random.sample(names, 2) for _ in range(5)] if len(names) > 1 else []
        return [Claim(tuple(pair), self.random.choice(["declared", "user"]), "chance") for pair in pairs]


@given(memory_dicts(), st.integers())
def test_claims_never_change_what_has_to_be_stored(tensors, seed):
    """They may choose which of equal names; the number of stored tensors is a fact."""
    claimed = Policy(plugins=[TrueClaims(seed)]).plan(tensors)
    assert len(tiepolicy.plan(tensors).stored()) == len(claimed.stored())


class Silent:
    """Is asked about every claim and every group, and leaves it all to the built-in rules."""

    @hookimpl
    def tiepolicy_decide(self):
        return None

    @hookimpl
    def tiepolicy_canonical(self):
        return None


WHOLE = torch.arange(6.0)


@given(memory_dicts() | view_dicts())
@example({"m": WHOLE, "b": (part := WHOLE[:2]), "z": part, "c": WHOLE[4:]})
def test_a_plugin_that_answers_nothing_changes_nothing(tensors):
    """What memory alone settles in one look is what claims and verdicts come to."""
    assert tiepolicy.plan(tensors) == Policy(plugins=[Silent()]).plan(tensors)


@given(models())
def test_a_plugin_that_answers_nothing_changes_the_plan_of_no_model(model):
    assert Policy().plan(model) == Policy(plugins=[Silent()]).plan(model)


def test_a_part_of_two_overlapping_tensors_may_be_claimed_of_both():
    buffer = torch.arange(10.0)

    class Both:
        @hookimpl
        def tiepolicy_claims(self):
            return [Claim(("left", "part"), "user", "me"), Claim(("right", "part"), "user", "me")]

    plan = Policy(plugins=[Both()]).plan({"left": buffer[:6], "right": buffer[4:], "part": buffer[4:6]})
    assert [("right", "part")] == [group.names for group in plan.groups]


def test_claims_on_memory_itself_may_not_connect_what_none_contains():
    buffer = torch.arange(10.0)

    class Both:
        @hookimpl
        def tiepolicy_claims(self):
            return [Claim(("left", "part"), "storage"), Claim(("right", "part"), "storage")]

    with pytest.raises(UnsafeVerdictError, match=r"connect \['left', 'part', 'right'\], but none of them contains all"):
        Policy(plugins=[Both()]).plan({"left": buffer[:6], "right": buffer[4:], "part": buffer[4:6]})


def test_no_plugin_calls_an_absent_name_one_tensor_with_another():
    class ClaimAbsent(FlagTrusting):
        @hookimpl
        def tiepolicy_claims(self):
            return [Claim(("embed_tokens.weight", "gone.weight"), "declared")]

    with pytest.raises(UnsafeVerdictError, match=r"claimed by declared\), but gone.weight is not in the model"):
        Policy(plugins=[ClaimAbsent()]).plan(TiedPair())


def test_a_plugin_may_choose_the_stored_name():
    class StoreHead:
        @hookimpl
        def tiepolicy_canonical(self, group):
            return "lm_head.weight"

    assert [("lm_head.weight", "embed_tokens.weight")] == [
        group.names for group in Policy(plugins=[StoreHead()]).plan(TiedPair()).groups
    ]


def test_reasons_are_about_the_name_that_a_plugin_chose():
    class StoreB:
        @hookimpl
        def tiepolicy_canonical(self):
            return "b"

    a, b = (weight := torch.zeros(4)), weight.view(4)
    (group,) = Policy(plugins=[StoreB()]).plan({"a": a, "b": b, "c": b}).groups
    assert [("a", "same-storage"), ("c", "same-object")] == [(alias.name, alias.reason) for alias in group.aliases]


def test_a_plugin_may_keep_a_real_tie_apart():
    """Then both names are stored: bytes are spent, none is lost."""

    class Apart:
        @hookimpl
        def tiepolicy_decide(self):
            return Verdict.independent("storage-disjoint", "kept apart on purpose")

    plan = Policy(plugins=[Apart()]).plan(TiedPair())
    assert ((), 1) == (plan.groups, len(plan.refused))


def test_a_name_that_cannot_rebuild_the_others_is_no_canonical_name():
    class StorePart:
        @hookimpl
        def tiepolicy_canonical(self):
            return "part"

    whole = torch.zeros(4)
    with pytest.raises(UnsafeVerdictError, match="the names that contain all others are \\['whole'\\]"):
        Policy(plugins=[StorePart()]).plan({"whole": whole, "part": whole[:2]})


def test_a_claim_on_an_absent_name_is_refused_and_kept():
    class ClaimAbsent:
        @hookimpl
        def tiepolicy_claims(self):
            return [Claim(("embed_tokens.weight", "gone.weight"), "declared", "a registry")]

    expected = (
        "gone.weight and embed_tokens.weight (12, 4) cannot be one tensor: gone.weight is not in the model; "
        "claimed by a registry"
    )
    assert [expected] == [str(r) for r in Policy(plugins=[ClaimAbsent()]).plan(TiedPair(tied=False)).refused]


def test_a_claim_of_three_names_is_judged_pair_by_pair():
    class ClaimThree:
        @hookimpl
        def tiepolicy_claims(self):
            return [Claim(("a", "b", "c"), "user", "me")]

    shared = torch.zeros(3)
    plan = Policy(plugins=[ClaimThree()]).plan({"a": shared, "b": shared, "c": torch.zeros(3)})
    assert [("a", "b")] == [group.names for group in plan.groups]
    assert [("a", "c")] == [refusal.claim.names for refusal in plan.refused]


def test_a_plugin_that_raises_is_named():
    class Broken:
        @hookimpl
        def tiepolicy_claims(self):
            raise KeyError("tie_word_embeddings")

    with pytest.raises(PluginError, match="tiepolicy_claims of the plugin Broken raised KeyError"):
        Policy(plugins=[FlagTrusting(), Broken()]).plan(TiedPair())


def test_a_plugin_whose_generator_raises_is_named():
    class Late:
        @hookimpl
        def tiepolicy_claims(self):
            yield Claim(("embed_tokens.weight", "lm_head.weight"), "user")
            raise KeyError("registry")

    with pytest.raises(PluginError, match="tiepolicy_claims of the plugin Late raised KeyError: 'registry'"):
        Policy(plugins=[Late()]).plan(TiedPair())


def test_an_answer_that_holds_no_claims_is_refused():
    class Numeric:
        @hookimpl
        def tiepolicy_claims(self):
            return 7

    with pytest.raises(
        PluginError, match="the plugin Numeric answered tiepolicy_claims with 7, a int; expected a Claim"
    ):
        Policy(plugins=[Numeric()]).plan(TiedPair())


def test_of_two_plugins_one_of_which_answered_wrongly_both_are_named():
    class Wordy:
        @hookimpl
        def tiepolicy_canonical(self):
            return "alias"

    expected = (
        r"^one of the plugins Wordy, Wordy-2 \(TIEPOLICY_TRACE=1 shows which\) wants 'alias' stored for the tied names"
    )
    with pytest.raises(UnsafeVerdictError, match=expected):
        Policy(plugins=[Wordy(), Wordy()]).plan(TiedPair())


@pytest.mark.parametrize(("broken", "name"), [([True, False], "Picky"), ([False, True], "Picky-2")])
def test_of_two_plugins_of_one_class_the_one_that_raises_is_named(broken, name):
    class Picky:
        def __init__(self, is_broken):
            self.is_broken = is_broken

        @hookimpl
        def tiepolicy_claims(self):
            if self.is_broken:
                raise KeyError("registry")

    with pytest.raises(PluginError, match=f"tiepolicy_claims of the plugin {name} raised KeyError"):
        Policy(plugins=[Picky(is_broken) for is_broken in broken]).plan(TiedPair())


class Correct:
    @hookimpl
    def tiepolicy_claims(self):
        return [Claim(("embed.weight", "head.weight"), "declared")]


class Misspelt:
    @hookimpl
    def tiepolicy_claim(self):
        return []


class OtherArguments:
    @hookimpl
    def tiepolicy_claims(self, weights):
        return [weights]


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (Correct, r"the plugin Correct is a class; hand over an object of it, Correct\(\)"),
        (Misspelt(), "the plugin Misspelt cannot be asked: unknown hook 'tiepolicy_claim'"),
        (OtherArguments(), "the plugin OtherArguments cannot be asked: .*'weights'"),
        ("correct", "the plugin str implements no hook; mark its functions with @tiepolicy.hookimpl"),
    ],
)
def test_a_plugin_that_would_never_answer_is_refused_when_it_is_handed_over(plugin, message):
    with pytest.raises(PluginError, match=message):
        Policy(plugins=[plugin])


def test_one_plugin_in_the_place_of_a_list_of_them_is_refused():
    with pytest.raises(PluginError, match="plugins is a Correct; hand over a list of them"):
        Policy(plugins=Correct())


def test_a_source_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(ValueError, match="'config' is no Source; it is one of storage, declared, user"):
        Claim(("embed.weight", "head.weight"), "config")


def test_an_answer_of_the_wrong_type_is_refused():
    class Wordy:
        @hookimpl
        def tiepolicy_decide(self):
            return "alias"

    with pytest.raises(PluginError, match="answered tiepolicy_decide with 'alias', a str; expected a Verdict"):
        Policy(plugins=[Wordy()]).plan(TiedPair())


def test_a_plugin_hears_of_the_finished_plan():
    heard = []

    class Listener:
        @hookimpl
        def tiepolicy_planned(self, plan):
            heard.append(plan)

    assert [Policy(plugins=[Listener()]).plan(TiedPair())] == heard


def test_policies_share_nothing():
    Policy(plugins=[FlagTrusting()])
    model = FlaggedPair(flag=True, vocab_size=12, draft_vocab_size=8, hidden_size=4)
    assert () == Policy().plan(model).refused


@pytest.mark.parametrize("names", [(), ("a",), ("a", "a"), ("a", 2)])
def test_a_claim_needs_two_names(names):
    with pytest.raises(TiePolicyError, match="a claim needs two or more different names"):
        tiepolicy.Claim(names, "user")
