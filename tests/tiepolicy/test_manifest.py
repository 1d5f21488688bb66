"""The manifest: JSON, versioned, and trusted only where it makes sense."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiepolicy
from models import FlaggedPair, TiedPair
from strategies import view_dicts
from tiepolicy import Claim, Policy, TiePlan, Verdict, hookimpl
from tiepolicy.errors import ManifestError


@given(view_dicts())
def test_any_plan_survives_json(state_dict):
    plan = tiepolicy.plan(state_dict)
    assert plan == TiePlan.from_manifest(json.loads(json.dumps(plan.to_manifest())))


def test_a_refused_claim_survives_json():
    plan = tiepolicy.plan(FlaggedPair(flag=True, vocab_size=12, draft_vocab_size=8, hidden_size=4))
    again = TiePlan.from_manifest(json.loads(json.dumps(plan.to_manifest())))
    assert (1, plan, str(plan.refused[0])) == (len(again.refused), again, str(again.refused[0]))


def edited(**changes):
    manifest = json.loads(json.dumps(tiepolicy.plan(TiedPair()).to_manifest()))
    return manifest | changes


GROUP = {
    "canonical": "embed_tokens.weight",
    "aliases": [{"name": "lm_head.weight", "reason": "same-object", "view": None}],
}


REFUSED = {
    "names": ["a", "b"],
    "source": "declared",
    "claimed_by": "a flag",
    "reason": "shape-mismatch",
    "detail": "shapes differ",
    "shapes": [[1], [2]],
}


def alias_with(**changes):
    return edited(groups=[GROUP | {"aliases": [GROUP["aliases"][0] | changes]}])


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({}, "its format is not 'tiepolicy'"),
        (edited(version=2), "has version 2, this library reads version 1: update tiepolicy"),
        (edited(version=True), "has version True, this library reads version 1"),
        (edited(version="1"), "has version '1', this library reads version 1"),
        (edited(groups=[{}]), "malformed: KeyError: 'canonical'"),
        (edited(groups=None), "malformed: TypeError"),
        (edited(path="/etc"), "holds 'path', which version 1 does not know"),
        (edited(groups=[GROUP | {"code": "x"}]), "holds 'code', which version 1 does not know"),
        (edited(groups=[GROUP | {"aliases": []}]), "has a group of 'embed_tokens.weight' alone"),
        (edited(tensors={"../a": [[2], "float32"]}), "'../a' holds a path separator or a control character"),
        (edited(tensors={"a\\b": [[2], "float32"]}), "holds a path separator or a control character"),
        (edited(tensors={"a\n": [[2], "float32"]}), "holds a path separator or a control character"),
        (edited(tensors={"": [[2], "float32"]}), "'' is no name of 1 to 4096 characters"),
        (edited(tensors={"a" * 5000: [[2], "float32"]}), "is no name of 1 to 4096 characters"),
        (edited(tensors={"a": [[2] * 65, "float32"]}), "is no list of at most 64 sizes"),
        (edited(tensors={"a": [[2**63], "float32"]}), "9223372036854775808 is no size"),
        (edited(tensors={"a": [[2], "__doc__"]}), "names a dtype '__doc__'"),
        (edited(refused=[REFUSED | {"names": ["a", "b", "c"]}]), "refuses a claim of 3 names and 2 shapes"),
        (edited(refused=[REFUSED | {"detail": "x" * 5000}]), "is no text of at most 4096 characters"),
        (alias_with(reason="shape-mismatch"), "an alias for the reason 'shape-mismatch'"),
        (alias_with(reason="view-of"), "an alias for the reason 'view-of'"),
        (alias_with(reason="view-of", view=[[12, 4], [4], 0]), r"a view of shape \(12, 4\) with the strides \(4,\)"),
        (edited(groups=[GROUP, GROUP]), "ties 'embed_tokens.weight' twice"),
        (edited(groups=[GROUP | {"canonical": "gone"}]), "ties 'gone', which is none of its tensors"),
        (edited(groups=[GROUP | {"canonical": ["gone"]}]), "malformed: TypeError"),
        (edited(tensors={"a": [[2], "float33"]}), "names a dtype 'float33'"),
        (edited(tensors={"a": [[-2], "float32"]}), "-2 is no size"),
        (edited(tensors={"a": [2]}), "malformed"),
        (
            edited(tensors={"embed_tokens.weight": [[12, 4], "float32"], "lm_head.weight": [[8, 4], "float32"]}),
            r"calls lm_head.weight \(8, 4\) an alias of embed_tokens.weight \(12, 4\), but it cannot be rebuilt",
        ),
        (
            edited(
                groups=[
                    GROUP | {"aliases": [{"name": "lm_head.weight", "reason": "view-of", "view": [[12, 4], [4, 1], 8]}]}
                ]
            ),
            "cannot be rebuilt from it: the manifest was damaged or edited",
        ),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(manifest, message):
    with pytest.raises(ManifestError, match=message):
        TiePlan.from_manifest(manifest)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_anything_else_is_refused_with_a_manifest_error(value):
    for key in ("tensors", "groups", "refused", "external"):
        try:
            TiePlan.from_manifest(edited(**{key: value}))
        except ManifestError:
            continue
        assert not value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the manifest is damaged: Expecting property name"),
        ("[]", "the manifest is damaged: it holds a list, expected an object"),
        ("[" * 100_000, "the manifest is damaged: maximum recursion depth"),
        ('{"\ud800": 3}', "surrogates not allowed"),
        ('{"format": NaN}', "the manifest is damaged: NaN is not JSON"),
        ('{"format": "tiepolicy", "format": "tiepolicy"}', "the key 'format' occurs twice"),
    ],
)
def test_text_that_is_no_manifest_is_refused(text, message):
    with pytest.raises(ManifestError, match=message):
        TiePlan.from_manifest(text)


def test_a_name_that_cannot_stand_in_a_manifest_has_a_plan_but_no_manifest():
    plan = tiepolicy.plan({"decoder/kernel": torch.zeros(1)})
    assert 64 == len(plan.digest)
    with pytest.raises(ManifestError, match="'decoder/kernel' holds a path separator .*; give it another"):
        plan.to_manifest()


def test_a_manifest_of_more_tensors_than_any_model_has_is_refused(monkeypatch):
    monkeypatch.setattr(tiepolicy._manifest, "MAX_TENSORS", 1)
    with pytest.raises(ManifestError, match="lists more than 1 tensors"):
        TiePlan.from_manifest(edited())


class Claims:
    """A plugin with one claim and one verdict on it."""

    def __init__(self, names, detail, sentence):
        self.claim, self.sentence = Claim(names, "declared", detail), sentence

    @hookimpl
    def tiepolicy_claims(self):
        return [self.claim]

    @hookimpl
    def tiepolicy_decide(self):
        return Verdict.independent("declared-not-tied", self.sentence)


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (Claims(("a", "decoder/kernel"), "", ""), "the name 'decoder/kernel' holds a path separator"),
        (Claims(("a", "b"), "x" * 5000, ""), "'xxx.*' is no text of at most 4096 characters"),
        (Claims(("a", "b"), "", 3), "'3' is no text of at most 4096 characters"),
    ],
)
def test_what_a_manifest_could_not_say_again_is_refused_before_it_is_written(plugin, message):
    """A checkpoint with such a manifest could never be loaded."""
    plan = Policy(plugins=[plugin]).plan({"a": torch.zeros(1)})
    with pytest.raises(ManifestError, match=message):
        plan.to_manifest()


def test_an_owner_is_called_what_a_manifest_can_say():
    shared = torch.zeros(1)
    plan = tiepolicy.plan({"a": shared}, external={"org/target": {"a": shared}}, digests=True)
    with pytest.raises(ManifestError, match="the name 'org/target' holds a path separator .*; give it another"):
        plan.to_manifest()
