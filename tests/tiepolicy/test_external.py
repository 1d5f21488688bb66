"""Tensors of another model: recognised, left out once their content is on record, and taken back from their owner."""

import functools
import json

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import tiepolicy
from models import TiedPair
from strategies import small_sizes
from tiepolicy import ActionKind, Facts, Reason, TensorSpec, TiePlan, View, observe, reconcile
from tiepolicy._values import fingerprint
from tiepolicy.errors import (
    ExternalOwnerError,
    ManifestError,
    MissingTensorError,
    ObservationError,
    ShapeMismatchError,
    TiePolicyError,
)
from tiepolicy.testing import external_models

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"


class Draft(nn.Module):
    """A draft that looks words up in its target's embedding and has a head of its own."""

    def __init__(self, target, *, draft_vocab_size=5):
        super().__init__()
        self.embed_tokens = target.embed_tokens
        self.lm_head = nn.Linear(target.embed_tokens.embedding_dim, draft_vocab_size, bias=False)


def bound(**sizes):
    target = TiedPair(**sizes)
    draft = Draft(target)
    return target, draft, tiepolicy.plan(draft, external={"target": target}, digests=True)


@given(external_models())
def test_a_draft_is_complete_again_whatever_its_target_owns_of_it(models):
    """Every bit comes back: what is stored from the checkpoint, what is not from its owner."""
    draft, owners = models
    plan = tiepolicy.plan(draft, external=owners, digests=True)
    owned = {EMBED} if draft.embed_tokens is owners["target"].embed_tokens else set()
    assert owned == {tie.name for tie in plan.external}
    small = plan.compact(draft.state_dict())
    full = plan.expand(small, external=owners)
    assert owned.isdisjoint(small)
    assert set(draft.state_dict()) == set(full)
    assert [True] * len(full) == [torch.equal(tensor, full[name]) for name, tensor in draft.state_dict().items()]


@given(small_sizes(), small_sizes())
def test_what_the_target_owns_is_left_out_and_taken_back(vocab_size, hidden_size):
    target, draft, plan = bound(vocab_size=vocab_size, hidden_size=hidden_size)
    state_dict = draft.state_dict()
    small = plan.compact(state_dict)
    full = plan.expand(small, external={"target": target})
    assert {HEAD} == set(small) == set(plan.stored())
    assert set(state_dict) == set(full)
    assert full[EMBED] is target.embed_tokens.weight


def test_without_a_digest_the_tensor_is_recognised_and_stored():
    """Nothing could tell later whether the target still has it."""
    target = TiedPair()
    draft = Draft(target)
    plan = tiepolicy.plan(draft, external={"target": target})
    (tie,) = plan.external
    assert (EMBED, "target", EMBED, (12, 4), None) == (tie.name, tie.owner, tie.owner_name, tie.shape, tie.digest)
    assert {EMBED, HEAD} == set(plan.compact(draft.state_dict())) == set(plan.stored())


def test_a_model_that_shares_nothing_owns_nothing():
    assert () == tiepolicy.plan(TiedPair(), external={"target": TiedPair()}).external


def test_of_two_owners_of_one_tensor_the_first_by_name_has_it():
    target = TiedPair()
    plans = [tiepolicy.plan(target, external=dict.fromkeys(names, target)) for names in ("ab", "ba")]
    assert ["a", "a"] == [plan.external[0].owner for plan in plans]


def test_a_part_of_a_tensor_of_the_target_is_a_view_of_it():
    target = {"qkv": torch.arange(12.0).view(6, 2)}
    plan = tiepolicy.plan({"k": target["qkv"][2:4]}, external={"target": target}, digests=True)
    assert View(shape=(2, 2), stride=(2, 1), offset=4) == plan.external[0].view
    assert torch.equal(
        target["qkv"][2:4], plan.expand(plan.compact({"k": target["qkv"][2:4]}), external={"target": target})["k"]
    )


def test_a_tensor_that_only_overlaps_the_target_is_stored():
    buffer = torch.arange(10.0)
    assert () == tiepolicy.plan({"a": buffer[:6]}, external={"target": {"b": buffer[4:]}}).external


def test_a_whole_group_that_the_target_owns_is_left_out_and_given_back():
    target = TiedPair()
    plan = tiepolicy.plan(target.state_dict(), external={"target": target}, digests=True)
    assert [EMBED] == [tie.name for tie in plan.external]
    assert {} == plan.compact(target.state_dict())
    assert {EMBED, HEAD} == set(plan.expand({}, external={"target": target}))


def test_the_verdict_names_the_owner():
    _, _, plan = bound()
    assert Reason.EXTERNAL_OWNER is plan.verdict(EMBED, f"target:{EMBED}").reason


def test_the_digest_is_of_the_content():
    """Not of the object: the target may be loaded anew before the draft is."""
    target, draft, plan = bound()
    again = TiedPair()
    again.load_state_dict(target.state_dict())
    for known in (plan, TiePlan.from_manifest(plan.to_manifest())):
        assert torch.equal(draft.embed_tokens.weight, known.expand({}, external={"target": again})[EMBED])


def test_a_target_with_other_values_is_refused():
    _, _, plan = bound()
    message = f"{EMBED} \\(12, 4\\) belongs to target:{EMBED}, but its elements are not those of the plan"
    with pytest.raises(ExternalOwnerError, match=message):
        plan.expand({}, external={"target": TiedPair()})


def test_a_table_that_was_trained_since_is_not_dropped():
    """Saving would lose what the draft learned."""
    _, draft, plan = bound()
    with torch.no_grad():
        draft.embed_tokens.weight[3, 1] += 1
    with pytest.raises(ExternalOwnerError, match="plan anew if it was trained since"):
        plan.compact(draft.state_dict())


def test_a_digest_is_made_once_and_what_changes_later_is_noticed_all_the_same(monkeypatch):
    """Also behind torch's back, where no version counter moves."""
    _, draft, plan = bound()
    digests = []
    monkeypatch.setattr("tiepolicy._external.content_digest", lambda tensor: digests.append(tensor) or "another")
    for _ in range(3):
        assert {HEAD} == set(plan.compact(draft.state_dict()))
    assert [] == digests
    draft.embed_tokens.weight.data.numpy()[3, 1] += 1
    with pytest.raises(ExternalOwnerError, match="its elements are not those of the plan"):
        plan.compact(draft.state_dict())


@given(st.integers(0, 200_003), st.integers(0, 7), st.data())
@example(8 * (1 << 16) + 3, 1, None)
def test_a_fingerprint_depends_on_every_bit_and_on_nothing_else(num_bytes, offset, data):
    """Of memory that may begin anywhere; its end may fill no whole word."""
    memory = torch.arange(num_bytes + offset).to(torch.uint8)
    tensor = memory[offset:]
    before = fingerprint(tensor)
    assert before == fingerprint(tensor.clone())
    if num_bytes:
        position = num_bytes - 1 if data is None else data.draw(st.integers(0, num_bytes - 1))
        tensor[position] ^= 1 << position % 8
        assert before != fingerprint(tensor)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.arange(200_001, dtype=torch.int32), -3193696405742773140),
        (torch.arange(5, dtype=torch.float32), 3811388591463853956),
        (torch.empty(0), 0),
    ],
)
def test_a_fingerprint_stays_what_it_is_from_one_version_to_the_next(tensor, expected):
    with torch.inference_mode():
        assert expected == fingerprint(tensor)
    assert expected == fingerprint(tensor)


def test_the_factors_of_a_fingerprint_are_drawn_once(monkeypatch):
    first = fingerprint(torch.ones(3))
    monkeypatch.delattr(torch, "randint")
    assert first == fingerprint(torch.ones(3))


def test_a_fingerprint_is_of_the_elements_in_their_order():
    tensor = torch.randn(6, 40)
    assert fingerprint(tensor) == fingerprint(tensor.t().contiguous().t())
    assert fingerprint(tensor) != fingerprint(tensor.flip(0))
    assert fingerprint(tensor) != fingerprint(torch.cat((tensor, torch.zeros(6, 40))))


@pytest.mark.parametrize(
    ("external", "error", "message"),
    [
        ({}, MissingTensorError, "belongs to the model 'target' .*; give that model: external={'target': ...}"),
        ({"target": {}}, MissingTensorError, "has no embed_tokens.weight"),
        (
            {"target": {EMBED: torch.zeros(9, 4)}},
            ShapeMismatchError,
            r"was \(12, 4\) torch.float32 and is \(9, 4\) torch.float32",
        ),
    ],
)
def test_a_target_that_is_absent_or_another_is_an_error(external, error, message):
    _, _, plan = bound()
    with pytest.raises(error, match=message):
        plan.expand({}, external=external)


def test_a_digest_of_a_model_without_data_is_refused():
    with torch.device("meta"):
        target = TiedPair()
        draft = Draft(target)
    assert [EMBED] == [tie.name for tie in tiepolicy.plan(draft, external={"target": target}).external]
    with pytest.raises(TiePolicyError, match="on the meta device has no data to make a digest of"):
        tiepolicy.plan(draft, external={"target": target}, digests=True)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "pack",
    [
        torch.Tensor.to_sparse,
        torch.Tensor.to_sparse_csr,
        lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        lambda tensor: TwoTensor(tensor, tensor),
        torch._subclasses.FakeTensorMode().from_tensor,
    ],
)
def test_a_digest_of_more_than_elements_is_refused(pack):
    """Two quantized tensors of equal elements may have different scales."""
    packed = pack(torch.ones(2, 2))
    external = {"target": {"b": packed}}
    assert ["a"] == [tie.name for tie in tiepolicy.plan({"a": packed}, external=external).external]
    with pytest.raises(TiePolicyError, match="no elements to make a digest of; give it as it was before"):
        tiepolicy.plan({"a": packed}, external=external, digests=True)


def test_the_manifest_carries_owner_and_digest():
    _, _, plan = bound()
    again = TiePlan.from_manifest(json.dumps(plan.to_manifest()))
    assert (plan, plan.digest, str(plan), [HEAD]) == (again, again.digest, str(again), list(again.stored()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "gone"}, "gives 'gone' to target:embed_tokens.weight, which is none of its stored tensors"),
        ({"sha256": "f"}, "has 'f' for the SHA-256 of embed_tokens.weight"),
        ({"shape": [3, 4]}, r"a tensor of target:embed_tokens.weight \(3, 4\), but it cannot be rebuilt"),
        ({"owner": "../target"}, "holds a path separator"),
        ({"path": "/etc"}, "holds 'path', which version 1 does not know"),
    ],
)
def test_an_edited_owner_is_refused(change, message):
    _, _, plan = bound()
    manifest = plan.to_manifest()
    manifest["external"][0] |= change
    with pytest.raises(ManifestError, match=message):
        TiePlan.from_manifest(manifest)


def test_the_table_shows_what_belongs_to_whom():
    target = TiedPair()
    expected = """\
2 tensors, 0 tied groups (0 B saved), 0 claims refused

belongs to                  name here            shape    dtype    digest
target:embed_tokens.weight  embed_tokens.weight  (12, 4)  float32  none, so stored"""
    assert expected == str(tiepolicy.plan(Draft(target), external={"target": target}))


def test_the_table_says_that_what_other_models_own_saves_bytes_too():
    _, _, plan = bound()
    expected = "2 tensors, 0 tied groups and 1 tensor of other models left out (192 B saved), 0 claims refused"
    assert expected == str(plan).splitlines()[0]


def test_a_saved_external_tensor_is_taken_from_its_owner():
    _, draft, saved = bound()
    actions = reconcile(tiepolicy.plan(draft), saved)
    assert [(ActionKind.EXTERNAL, EMBED), (ActionKind.LOAD, HEAD)] == [(action.kind, action.name) for action in actions]
    assert saved.external[0] == actions[0].external


def test_what_is_stored_of_a_tensor_of_the_target_is_compared_and_never_loaded():
    """Loading it would overwrite the target through the memory they share."""
    _, _, live = bound()
    actions = reconcile(live, {EMBED: TensorSpec((12, 4), torch.float32), HEAD: TensorSpec((5, 4), torch.float32)})
    assert [(ActionKind.EXTERNAL, EMBED), (ActionKind.COMPARE, EMBED), (ActionKind.LOAD, HEAD)] == [
        (action.kind, action.name) for action in actions
    ]


def test_a_checkpoint_made_with_another_target_is_refused():
    _, _, live = bound()
    torch.manual_seed(1)
    _, _, saved = bound()
    with pytest.raises(ExternalOwnerError, match="are not the same tensor: SHA-256 .* Nothing was loaded"):
        reconcile(live, saved)


@pytest.mark.parametrize("external", [TiedPair(), {3: TiedPair()}])
def test_other_models_have_names(external):
    _, draft, plan = bound()
    for ask in (functools.partial(tiepolicy.plan, draft), functools.partial(plan.expand, {})):
        with pytest.raises(ObservationError, match="external is a .* of no named models; hand over each by its name"):
            ask(external=external)


def test_another_model_is_looked_at_once_however_many_tensors_it_owns(monkeypatch):
    target = {f"layer{number}": torch.tensor([number]) for number in range(3)}
    plan = tiepolicy.plan(dict(target), external={"target": target}, digests=True)
    observed = []
    monkeypatch.setattr(tiepolicy._external, "observe", lambda source: observed.append(source) or observe(source))
    assert sorted(target) == sorted(plan.expand({}, external={"target": target}))
    assert [target] == [source for source in observed if not isinstance(source, Facts)]
