"""Companions: a head whose rows are told by a map is neither loaded without the map nor into a model without one."""

import json

import pytest
import torch
from torch import nn

import tiepolicy
from models import FlaggedPair
from tiepolicy import Companion, Policy, Resolution, TensorSpec, TiePlan, hookimpl, reconcile
from tiepolicy.errors import ManifestError, MissingTensorError, PluginError

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"


def draft(*maps):
    """A draft of 12 target tokens, 8 of its own, and the maps named."""
    model = FlaggedPair(flag=False, vocab_size=12, draft_vocab_size=8, hidden_size=4)
    if "d2t" in maps:
        model.register_buffer("d2t", torch.zeros(8, dtype=torch.int64))
    if "t2d" in maps:
        model.register_buffer("t2d", torch.zeros(12, dtype=torch.bool))
    return model


def test_the_maps_of_a_draft_vocabulary_are_companions_of_what_has_their_rows():
    expected = (Companion("d2t", (HEAD,)), Companion("t2d", (EMBED,)))
    assert expected == tiepolicy.plan(draft("d2t", "t2d")).companions


def test_the_companions_of_a_part_belong_to_that_part():
    model = nn.ModuleDict({"draft": draft("d2t"), "other": nn.Linear(4, 8)})
    assert (Companion("draft.d2t", ("draft.lm_head.weight",)),) == tiepolicy.plan(model).companions


def test_counters_running_means_and_scratch_buffers_are_no_companions():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    model.register_buffer("positions", torch.arange(8), persistent=False)
    model.register_buffer("mean", torch.zeros(8))
    model.register_buffer("step", torch.tensor(8))
    assert () == tiepolicy.plan(model).companions


def test_a_checkpoint_without_the_map_is_refused_and_the_sentence_says_what_it_is_for():
    stored = {
        EMBED: TensorSpec((12, 4), torch.float32),
        HEAD: TensorSpec((8, 4), torch.float32),
    }
    with pytest.raises(MissingTensorError) as caught:
        reconcile(tiepolicy.plan(draft("d2t")), stored)
    expected = (
        "d2t (8,) is not in the checkpoint, under its own name or an alias. Without it the rows of lm_head.weight "
        "cannot be told. Nothing was loaded. Load a checkpoint that holds it, or initialise it and load the other "
        "names only"
    )
    assert expected == str(caught.value)


def test_a_model_without_a_place_for_the_map_is_refused():
    """Its draft ids would silently be taken for the target's."""
    with pytest.raises(MissingTensorError) as caught:
        reconcile(tiepolicy.plan(draft()), tiepolicy.plan(draft("d2t")))
    expected = (
        "the checkpoint holds d2t (8,), which is needed to use lm_head.weight, and the model has no tensor of that "
        "name. Nothing was loaded. Build the model with it, as a persistent buffer"
    )
    assert (expected, ("d2t", HEAD)) == (str(caught.value), caught.value.names)


def test_a_plugin_may_do_without_a_companion():
    class Without:
        @hookimpl
        def tiepolicy_resolve(self, conflict):
            return Resolution.leave() if conflict.name == "d2t" else None

    actions = reconcile(Policy(plugins=[Without()]).plan(draft()), tiepolicy.plan(draft("d2t")))
    assert [EMBED, HEAD] == [action.name for action in actions]


def test_a_part_of_a_model_needs_the_companions_of_what_it_has_only():
    first_stage = nn.ModuleDict({"embed_tokens": nn.Embedding(12, 4)})
    assert [EMBED] == [action.name for action in reconcile(tiepolicy.plan(first_stage), tiepolicy.plan(draft("d2t")))]


class Declares:
    """A plugin with one companion."""

    def __init__(self, companion):
        self.companion = companion

    @hookimpl
    def tiepolicy_companions(self):
        return [self.companion]


def test_a_plugin_may_declare_companions_beside_the_built_in_ones():
    plan = Policy(plugins=[Declares(Companion("d2t", (EMBED,)))]).plan(draft("d2t"))
    assert (Companion("d2t", (EMBED, HEAD)),) == plan.companions


@pytest.mark.parametrize(
    ("companion", "message"),
    [
        (Companion("nowhere", (HEAD,)), "nowhere is not in the model"),
        (Companion("d2t", ("nowhere",)), "nowhere is not in the model"),
        (Companion("d2t", ()), "it belongs to nothing"),
        ("d2t", "answered tiepolicy_companions with 'd2t', a str; expected a Companion"),
    ],
)
def test_what_is_no_companion_is_an_error_of_the_plugin(companion, message):
    with pytest.raises(PluginError, match=message):
        Policy(plugins=[Declares(companion)]).plan(draft("d2t"))


def test_companions_survive_the_manifest():
    plan = tiepolicy.plan(draft("d2t", "t2d"))
    again = TiePlan.from_manifest(json.dumps(plan.to_manifest()))
    assert (plan, plan.companions, plan.digest) == (again, again.companions, again.digest)
    assert plan != tiepolicy.plan(dict(draft("d2t", "t2d").state_dict()))


def test_the_table_names_companions():
    assert str(tiepolicy.plan(draft("d2t"))).endswith("companions\n  d2t is needed to use lm_head.weight")


@pytest.mark.parametrize(
    ("companions", "message"),
    [
        ([{"name": "x", "of": [HEAD]}], "makes 'x' a companion or gives it one, which is none of its tensors"),
        ([{"name": "d2t", "of": ["x"]}], "makes 'x' a companion or gives it one"),
        ([{"name": "d2t", "of": []}], "has 'd2t' for the companion of no tensor"),
        ([{"name": "d2t", "of": HEAD}], "has 'd2t' for the companion of no tensor"),
        ([{"name": "d2t", "of": [HEAD]}] * 2, "names the companion 'd2t' twice"),
        ([{"name": "d2t"}], "malformed: KeyError: 'of'"),
        ([{"name": ["d2t"], "of": [HEAD]}], "malformed: TypeError"),
    ],
)
def test_a_manifest_with_a_wrong_companion_is_refused(companions, message):
    manifest = tiepolicy.plan(draft("d2t")).to_manifest() | {"companions": companions}
    with pytest.raises(ManifestError, match=message):
        TiePlan.from_manifest(manifest)
