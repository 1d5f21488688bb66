"""The manifest: JSON, versioned, and trusted only where it makes sense."""

import json

import pytest
from hypothesis import given

import tiepolicy
from models import FlaggedPair, TiedPair
from strategies import view_dicts
from tiepolicy import TiePlan
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


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({}, "its format is not 'tiepolicy'"),
        (edited(version=2), "has version 2, this library reads version 1: update tiepolicy"),
        (edited(groups=[{}]), "malformed: KeyError: 'canonical'"),
        (edited(groups=[GROUP, GROUP]), "ties 'embed_tokens.weight' twice"),
        (edited(groups=[GROUP | {"canonical": "gone"}]), "ties 'gone', which is none of its tensors"),
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
