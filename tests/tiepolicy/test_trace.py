"""TIEPOLICY_TRACE: what each plugin is asked and answers, and that listening changes nothing."""

import pluggy
import pytest
from hypothesis import given

import tiepolicy_hf._plugin
from models import FlaggedPair, TiedPair
from tiepolicy import Claim, Policy, Resolution, Verdict, hookimpl
from tiepolicy.errors import PluginError
from tiepolicy.testing import models


class Loom:
    """Answers some questions, with a generator where it may."""

    @hookimpl
    def tiepolicy_claims(self, model):
        yield Claim(("embed_tokens.weight", "lm_head.weight"), "user")

    @hookimpl
    def tiepolicy_decide(self, claim):
        return None if claim.source == "storage" else Verdict.alias("same-object")

    @hookimpl
    def tiepolicy_resolve(self, conflict):
        return Resolution.keep(conflict.canonical)

    @hookimpl
    def tiepolicy_planned(self, plan):
        pass


@pytest.fixture
def traced(monkeypatch):
    monkeypatch.setenv("TIEPOLICY_TRACE", "1")


def test_every_claim_and_verdict_is_said_with_the_plugin_that_gave_it(traced, capsys):
    plan = Policy(plugins=[Loom()]).plan(TiedPair())
    expected = """\
tiepolicy: tiepolicy_claims of Loom: embed_tokens.weight and lm_head.weight (user)
tiepolicy: tiepolicy_decide of Loom: embed_tokens.weight and lm_head.weight (storage, the storage of their \
data): nothing
tiepolicy: tiepolicy_decide of built-in rules: embed_tokens.weight and lm_head.weight (storage, the storage of their \
data): alias, same-object, they are one object
tiepolicy: tiepolicy_decide of Loom: embed_tokens.weight and lm_head.weight (user): alias, same-object
tiepolicy: tiepolicy_canonical of built-in rules: embed_tokens.weight and lm_head.weight: embed_tokens.weight
tiepolicy: tiepolicy_planned of Loom: 2 tensors, 1 tied group (192 B saved), 0 claims refused: nothing
"""
    captured = capsys.readouterr()
    assert (expected, "") == (captured.err, captured.out)
    model = TiedPair(tied=False)
    plan.retie(model)
    line = "tiepolicy: tiepolicy_resolve of Loom: embed_tokens.weight and lm_head.weight (retie, "
    assert line == capsys.readouterr().err[: len(line)]


def test_a_refused_claim_is_said_though_only_the_built_in_rules_decide(traced, capsys):
    Policy(plugins=[tiepolicy_hf._plugin]).plan(FlaggedPair(flag=True, vocab_size=6, draft_vocab_size=4, hidden_size=2))
    claim = "embed_tokens.weight and lm_head.weight (declared, config.tie_word_embeddings)"
    assert [
        f"tiepolicy: tiepolicy_claims of tiepolicy_hf._plugin: {claim}",
        f"tiepolicy: tiepolicy_decide of built-in rules: {claim}: independent, shape-mismatch, shapes differ",
    ] == capsys.readouterr().err.splitlines()


def test_a_plugin_that_raises_is_traced_and_still_named_in_the_error(traced, capsys):
    class Broken:
        @hookimpl
        def tiepolicy_claims(self):
            raise KeyError("registry")

    with pytest.raises(PluginError, match="tiepolicy_claims of the plugin Broken raised KeyError"):
        Policy(plugins=[Broken()]).plan(TiedPair())
    assert "tiepolicy: tiepolicy_claims of Broken: raised KeyError: 'registry'\n" == capsys.readouterr().err


@given(model=models())
def test_listening_changes_no_plan(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TIEPOLICY_TRACE", raising=False)
        silent = Policy(plugins=[tiepolicy_hf._plugin]).plan(model)
        patch.setenv("TIEPOLICY_TRACE", "1")
        traced = Policy(plugins=[tiepolicy_hf._plugin]).plan(model)
    assert silent.to_manifest() == traced.to_manifest()


@pytest.mark.parametrize("value", [None, "", "0"])
def test_without_the_variable_nothing_stands_between_pluggy_and_the_plugins(value, monkeypatch, capsys):
    if value is None:
        monkeypatch.delenv("TIEPOLICY_TRACE", raising=False)
    else:
        monkeypatch.setenv("TIEPOLICY_TRACE", value)
    policy = Policy(plugins=[Loom()])
    policy.plan(TiedPair())
    assert "" == capsys.readouterr().err
    assert pluggy.PluginManager("tiepolicy")._inner_hookexec is policy._plugins.manager._inner_hookexec
