"""The kit for plugin authors: good plugins pass, and each law is broken by a plugin that is named with its model."""

import itertools
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import Phase, given
from hypothesis import strategies as st

import tiepolicy
import tiepolicy_hf._plugin
from tiepolicy import Claim, Policy, Verdict, hookimpl, testing
from tiepolicy._laws import LAWS
from tiepolicy.testing import BrokenLawError, check_plugin


class Claims:
    """Claims the first two names, present or not."""

    @hookimpl
    def tiepolicy_claims(self, facts):
        names = sorted(facts)
        return [Claim((names[0], "head.weight"), "declared", "a registry")]


class Cautious:
    """Keeps all apart."""

    @hookimpl
    def tiepolicy_decide(self):
        return Verdict.independent("storage-disjoint", "kept apart on purpose")


class LastName:
    """Stores the last name of a group."""

    @hookimpl
    def tiepolicy_canonical(self, group):
        return group[-1]


@pytest.mark.parametrize("plugin", [tiepolicy_hf._plugin, Claims(), Cautious(), LastName()])
def test_a_good_plugin_keeps_all_laws(plugin):
    check_plugin(plugin, max_examples=25)


class Hookless:
    pass


class Misspelt:
    @hookimpl
    def tiepolicy_claim(self, facts):
        return []


class OtherArguments:
    @hookimpl
    def tiepolicy_claims(self, weights):
        return []


class Raises:
    @hookimpl
    def tiepolicy_claims(self, model):
        return model.config.no_such_flag


class ClaimsText:
    @hookimpl
    def tiepolicy_claims(self):
        return ["embed_tokens.weight"]


class ClaimsNumber:
    @hookimpl
    def tiepolicy_claims(self):
        return 3


class ClaimsNoStrings:
    @hookimpl
    def tiepolicy_claims(self):
        return [Claim((1, 2), "user")]


class DecidesText:
    @hookimpl
    def tiepolicy_decide(self):
        return "alias"


class StoresNumber:
    @hookimpl
    def tiepolicy_canonical(self):
        return 0


class Zeroes:
    @hookimpl
    def tiepolicy_claims(self, model):
        if model is not None:
            for parameter in model.parameters():
                parameter.data.zero_()


class Frees:
    """Changes the flag of the model that it is asked about."""

    @hookimpl
    def tiepolicy_claims(self, model):
        if model is not None and hasattr(model, "config"):
            model.config.tie_word_embeddings = not model.config.tie_word_embeddings


class ChangesPlan:
    @hookimpl
    def tiepolicy_planned(self, plan):
        object.__setattr__(plan, "groups", ())


class TiesAbsent:
    @hookimpl
    def tiepolicy_decide(self, claim, facts):
        return None if all(name in facts for name in claim.names) else Verdict.alias("same-object")


class FlagTrusting:
    """The rule of the first failure: what is declared to be tied is tied."""

    @hookimpl
    def tiepolicy_decide(self, claim, facts):
        declared = claim.source == "declared" and all(name in facts for name in claim.names)
        return Verdict.alias("same-storage", "the config says so") if declared else None


class ShapeTrusting:
    """What has one shape is one tensor."""

    @hookimpl
    def tiepolicy_decide(self, claim, facts):
        shapes = {facts[name].shape if name in facts else None for name in claim.names}
        return Verdict.alias("same-storage") if len(shapes) == 1 and None not in shapes else None


class FirstSeen:
    """Stores the name that was registered first."""

    @hookimpl
    def tiepolicy_canonical(self, group, facts):
        return next(name for name in facts if name in group)


class Alternates:
    """Decides each time the other way."""

    def __init__(self):
        self.turns = itertools.cycle([None, Verdict.independent("storage-disjoint", "chance")])

    @hookimpl
    def tiepolicy_decide(self):
        return next(self.turns)


class StoresOther:
    @hookimpl
    def tiepolicy_canonical(self):
        return "lm_head.weight"


IMPLEMENTS, TYPES, CHANGES, ABSENT, SHAPES, EVIDENCE, BYTES, ORDER = (law for law, _ in LAWS)


@pytest.mark.parametrize(
    ("plugin", "law", "problem"),
    [
        (Hookless, IMPLEMENTS, "the plugin Hookless implements no hook; mark its functions with @tiepolicy.hookimpl"),
        (Misspelt, IMPLEMENTS, "unknown hook 'tiepolicy_claim'"),
        (OtherArguments, IMPLEMENTS, "'weights'"),
        (Raises, TYPES, "tiepolicy_claims of the plugin Raises raised AttributeError"),
        (ClaimsText, TYPES, "answered tiepolicy_claims with 'embed_tokens.weight', a str; expected a Claim"),
        (ClaimsNumber, TYPES, "answered tiepolicy_claims with 3, a int; expected a Claim"),
        (ClaimsNoStrings, TYPES, "raised TiePolicyError: a claim needs two or more different names"),
        (DecidesText, TYPES, "answered tiepolicy_decide with 'alias', a str; expected a Verdict"),
        (StoresNumber, TYPES, "answered tiepolicy_canonical with 0, a int; expected a str"),
        (Zeroes, CHANGES, "a hook changed .*weight of the model"),
        (Frees, CHANGES, "a hook changed the config of the model"),
        (ChangesPlan, CHANGES, "tiepolicy_planned changed the plan"),
        (TiesAbsent, ABSENT, "absent.weight is not there"),
        (FlagTrusting, SHAPES, "and their shapes differ"),
        (ShapeTrusting, EVIDENCE, "and neither can be rebuilt"),
        (FirstSeen, ORDER, "with the names in another order the plan is another"),
        (Alternates, ORDER, "planning one model twice gave two plans|another order"),
        (StoresOther, BYTES, "wants 'lm_head.weight' stored"),
    ],
)
def test_each_law_is_broken_by_some_plugin_which_is_named(plugin, law, problem):
    with pytest.raises(BrokenLawError, match=problem) as caught:
        check_plugin(plugin(), max_examples=30)
    assert law == caught.value.law
    assert str(caught.value).startswith(f"the plugin {plugin.__name__} breaks the law that {law}: ")
    assert "the smallest model found is" in str(caught.value)


def test_the_model_in_the_report_is_small():
    with pytest.raises(BrokenLawError) as caught:
        check_plugin(FlagTrusting())
    expected = """\
the plugin FlagTrusting breaks the law that tensors of unequal shapes in separate storages are never one: \
tiepolicy_decide calls lm_head.weight (2, 1) and embed_tokens.weight (1, 1) one tensor (same-storage), and their \
shapes differ
the smallest model found is FlaggedPair:
  embed_tokens.weight (1, 1) torch.float32
  lm_head.weight (2, 1) torch.float32
with the claims of others:
  embed_tokens.weight and lm_head.weight (declared)"""
    assert expected == str(caught.value)


def test_claims_that_the_law_is_broken_without_are_not_in_the_report(monkeypatch):
    """Whether or not Hypothesis makes examples small."""
    monkeypatch.setattr("tiepolicy.testing.Phase", SimpleNamespace(generate=Phase.generate, shrink=Phase.generate))
    with pytest.raises(BrokenLawError) as caught:
        check_plugin(FlagTrusting())
    _, claimed = str(caught.value).split("with the claims of others:\n")
    assert 1 == len(claimed.splitlines())


def test_models_of_the_plugins_own_framework_are_tried():
    class Registry(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = torch.nn.Linear(1, 1)

    class OnlyRegistry:
        @hookimpl
        def tiepolicy_claims(self, model):
            return 3 if isinstance(model, Registry) else None

    check_plugin(OnlyRegistry(), max_examples=10)
    with pytest.raises(BrokenLawError, match="the smallest model found is Registry"):
        check_plugin(OnlyRegistry(), models=st.builds(Registry))


def test_the_laws_hold_for_a_plugin_of_another_module_that_fails_an_assertion():
    """A report is an assertion, so that test runners show it as a failure and not as an error."""
    assert issubclass(BrokenLawError, AssertionError)


KINDS = {
    "tied_models": (True, False),
    "untied_models": (False, False),
    "flagged_models": (False, True),
    "view_tied_models": (True, False),
    "chain_tied_models": (True, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_strategy_builds_what_its_name_says(kind):
    tied, refused = KINDS[kind]

    @given(getattr(testing, kind)())
    def check(model):
        plan = Policy(plugins=[tiepolicy_hf._plugin]).plan(model)
        assert (tied, refused) == (bool(plan.groups), bool(plan.refused))
        assert all(len(group.names) >= (3 if kind.startswith("chain") else 2) for group in plan.groups)

    check()


@given(testing.meta_models())
def test_meta_models_have_no_data(model):
    assert {True} == {tensor.is_meta for tensor in model.state_dict().values()}


@given(st.data())
def test_claims_are_about_the_given_names_or_an_absent_one(data):
    claim = data.draw(testing.claims(names=["a", "b"]))
    assert set(claim.names) <= {"a", "b", "absent.weight"}
    tiepolicy.plan({"a": torch.zeros(1)})


def test_hypothesis_is_imported_by_the_kit_only():
    code = "import sys, tiepolicy._cli; print('hypothesis' in sys.modules); import tiepolicy.testing"
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "False" == result.stdout.strip()
