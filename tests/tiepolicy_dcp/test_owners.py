"""Tensors of another model: left out of a checkpoint with owner and digest, and taken from there again, or refused."""

import pytest
import torch
import torch.distributed.checkpoint as dcp

import tiepolicy
import tiepolicy_dcp
from models import FlaggedPair, TiedPair
from tiepolicy import ActionKind, TiePlan
from tiepolicy.errors import ExternalOwnerError, MissingTensorError, ShapeMismatchError, TieConflictError
from tiepolicy_dcp import CheckpointStore, ModelState

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"


def draft_of(target=None):
    draft = FlaggedPair(flag=False, vocab_size=12, draft_vocab_size=5, hidden_size=4)
    if target is not None:
        draft.embed_tokens = target.embed_tokens
    return draft


@pytest.fixture
def saved(tmp_path):
    """A target, its draft, and a checkpoint of the draft."""
    target = TiedPair()
    draft = draft_of(target)
    folder = tiepolicy_dcp.save(tmp_path / "draft", model=draft, external={"target": target})
    return target, draft, folder


def test_the_manifest_names_the_owner_and_the_digest_of_what_is_not_there(saved):
    target, _, folder = saved
    (tie,) = TiePlan.from_manifest((folder / "manifest.json").read_text()).external
    digest = tiepolicy.content_digest(target.embed_tokens.weight)
    assert (EMBED, f"target:{EMBED}", (12, 4), digest) == (tie.name, tie.source, tie.shape, tie.digest)
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    assert [f"model.{HEAD}"] == list(stored)


def test_a_draft_built_alone_gets_a_copy_of_what_its_target_owns(saved):
    target, draft, folder = saved
    fresh = draft_of()
    restored = tiepolicy_dcp.load(folder, model=fresh, external={"target": target})
    assert torch.equal(target.embed_tokens.weight, fresh.embed_tokens.weight)
    assert fresh.embed_tokens.weight.data_ptr() != target.embed_tokens.weight.data_ptr()
    assert torch.equal(draft.lm_head.weight, fresh.lm_head.weight)
    kinds = {action.name: (action.kind, action.note) for action in restored.actions}
    assert (ActionKind.EXTERNAL, f"belongs to target:{EMBED}") == kinds[EMBED]


@pytest.mark.parametrize(
    ("external", "error", "message"),
    [
        (lambda target: None, MissingTensorError, "as it belongs to the model 'target' .* give that model: external="),
        (lambda target: {"other": target}, MissingTensorError, "as it belongs to the model 'target'"),
        (lambda target: {"target": {}}, MissingTensorError, f"the model given as 'target' has no {EMBED}"),
        (lambda target: {"target": TiedPair()}, ExternalOwnerError, "its elements are not those of the plan: expected"),
        (
            lambda target: {"target": TiedPair(vocab_size=9)},
            ShapeMismatchError,
            r"was \(12, 4\) torch.float32 and is \(9, 4\) torch.float32 in the model given",
        ),
    ],
)
def test_an_owner_that_is_absent_or_another_is_refused_before_the_draft_is_touched(saved, external, error, message):
    target, _, folder = saved
    fresh = draft_of()
    before = [parameter.detach().clone() for parameter in fresh.parameters()]
    with pytest.raises(error, match=message):
        tiepolicy_dcp.load(folder, model=fresh, external=external(target))
    assert [True, True] == [torch.equal(*pair) for pair in zip(before, fresh.parameters(), strict=True)]


def test_what_is_stored_of_a_shared_tensor_is_compared_with_the_target_and_never_written_to_it(tmp_path):
    """A checkpoint of a time when the draft had an embedding of its own."""
    folder = tiepolicy_dcp.save(tmp_path / "draft", model=draft_of())
    target = TiedPair()
    before = target.embed_tokens.weight.detach().clone()
    with pytest.raises(TieConflictError, match=f"{EMBED} and target:{EMBED} are one tensor in the model, but their"):
        tiepolicy_dcp.load(folder, model=draft_of(target), external={"target": target})
    assert torch.equal(before, target.embed_tokens.weight)


def test_what_is_stored_and_equals_the_target_loads(tmp_path):
    target = TiedPair()
    folder = tiepolicy_dcp.save(tmp_path / "draft", model=draft_of(target))
    resumed = draft_of(target)
    tiepolicy_dcp.load(folder, model=resumed, external={"target": target})
    assert resumed.embed_tokens.weight is target.embed_tokens.weight


def test_the_optimizer_of_a_draft_knows_nothing_of_the_embedding(saved, tmp_path):
    target = TiedPair()
    target.requires_grad_(False)
    draft, resumed = draft_of(target), draft_of(target)
    optimizers = [torch.optim.AdamW([model.lm_head.weight], lr=0.1) for model in (draft, resumed)]
    draft.lm_head(torch.ones(4)).sum().backward()
    optimizers[0].step()
    folder = tiepolicy_dcp.save(tmp_path / "c", model=draft, optimizer=optimizers[0], external={"target": target})
    tiepolicy_dcp.load(folder, model=resumed, optimizer=optimizers[1], external={"target": target})
    first, second = (o.state[m.lm_head.weight]["exp_avg"] for o, m in zip(optimizers, (draft, resumed), strict=True))
    assert torch.equal(first, second)


def test_a_store_hands_the_owner_on(tmp_path):
    target = TiedPair()
    draft = draft_of(target)
    with CheckpointStore(tmp_path) as store:
        store.save("one", model=draft, external={"target": target})
        fresh = draft_of()
        store.load("LATEST", model=fresh, external={"target": target})
    assert torch.equal(target.embed_tokens.weight, fresh.embed_tokens.weight)


def test_ones_own_dcp_save_leaves_out_what_the_target_owns_too(tmp_path):
    target = TiedPair()
    draft = draft_of(target)
    fresh = draft_of(target)
    for call, model in ((dcp.save, draft), (dcp.load, fresh)):
        with pytest.warns(UserWarning, match="torch.distributed is disabled"):
            call({"model": ModelState(model, external={"target": target})}, checkpoint_id=tmp_path)
    assert torch.equal(draft.lm_head.weight, fresh.lm_head.weight)
    assert fresh.embed_tokens.weight is target.embed_tokens.weight
