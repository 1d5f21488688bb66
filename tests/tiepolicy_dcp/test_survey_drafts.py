"""Failures of the field with drafts in DCP checkpoints: what is missing, and whose tensor it is.

A test whose name says `today` pins torch's behaviour; when it fails, torch was fixed.
"""

import pytest
import torch

import tiepolicy_dcp
from models import FlaggedPair, TiedPair
from plain_dcp import num_bytes, plain_load, plain_save
from tiepolicy.errors import MissingTensorError

EMBED = "embed_tokens.weight"


def draft_of(target=None, **changes):
    model = FlaggedPair(**{"flag": False, "vocab_size": 12, "draft_vocab_size": 5, "hidden_size": 4} | changes)
    if target is not None:
        model.embed_tokens = target.embed_tokens
    return model


def test_a_draft_whose_head_is_not_in_the_checkpoint_is_refused(tmp_path):
    """Whatever it declares; a random head would be served with an acceptance of zero."""
    plain_save({"model": {EMBED: torch.ones(12, 4)}}, tmp_path)
    with pytest.raises(MissingTensorError, match=r"lm_head.weight \(5, 4\) is not in the checkpoint"):
        tiepolicy_dcp.load(tmp_path, model=draft_of(flag=True))


def test_today_a_draft_without_its_vocabulary_map_loads_and_maps_ids_to_themselves():
    model = draft_of()
    model.register_buffer("d2t", torch.zeros(5, dtype=torch.int64))
    assert ["d2t"] == model.load_state_dict(draft_of().state_dict(), strict=False).missing_keys
    assert {0} == set(model.d2t.tolist())


@pytest.mark.survey("T65")
def test_a_draft_without_its_vocabulary_map_is_not_loaded(tmp_path):
    tiepolicy_dcp.save(tmp_path / "c", model=draft_of())
    model = draft_of()
    model.register_buffer("d2t", torch.zeros(5, dtype=torch.int64))
    with pytest.raises(MissingTensorError, match=r"d2t \(5,\) is not in the checkpoint"):
        tiepolicy_dcp.load(tmp_path / "c", model=model)


def test_today_loading_a_draft_overwrites_the_target_that_it_shares_an_embedding_with(tmp_path):
    plain_save({"model": draft_of(TiedPair()).state_dict()}, tmp_path)
    target = TiedPair()
    before = target.embed_tokens.weight.detach().clone()
    plain_load({"model": draft_of(target).state_dict()}, tmp_path)
    assert not torch.equal(before, target.embed_tokens.weight)


@pytest.mark.survey("T66")
def test_a_draft_neither_writes_nor_overwrites_the_embedding_of_its_target(tmp_path):
    target = TiedPair(vocab_size=4096)
    draft = draft_of(target)
    folder = tiepolicy_dcp.save(tmp_path / "c", model=draft, external={"target": target})
    assert num_bytes(folder) < target.embed_tokens.weight.nbytes
    before = target.embed_tokens.weight.detach().clone()
    version = target.embed_tokens.weight._version
    resumed = draft_of(target)
    tiepolicy_dcp.load(folder, model=resumed, external={"target": target})
    assert torch.equal(draft.lm_head.weight, resumed.lm_head.weight)
    assert resumed.embed_tokens.weight is target.embed_tokens.weight
    assert torch.equal(before, target.embed_tokens.weight)
    assert version == target.embed_tokens.weight._version, "somebody wrote to the target"
