"""A draft whose config says tied and whose head has other rows keeps the head that it trained."""

import json

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tiepolicy
import tiepolicy_hf
from models import tiny_llama
from tiepolicy.errors import MissingTensorError, ShapeMismatchError, TieConflictError

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DRAFT_VOCAB_SIZE = 32


class DraftLlama(LlamaForCausalLM):
    """A causal model with a head for a part of the vocabulary; its config is the target's."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, DRAFT_VOCAB_SIZE, bias=False)


class DraftBuiltTooEarly(LlamaForCausalLM):
    """The same, with a head that is made before the class ties what its flag says."""

    def __init__(self, config: LlamaConfig) -> None:
        LlamaForCausalLM.__base__.__init__(self, config)
        self.model = LlamaForCausalLM(config).model
        self.lm_head = nn.Linear(config.hidden_size, DRAFT_VOCAB_SIZE, bias=False)
        self.post_init()


def draft() -> DraftLlama:
    return DraftLlama(tiny_llama(tie_word_embeddings=True).config)


def flag_in(folder):
    return json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.survey("T01")
def test_today_building_a_draft_with_an_inherited_flag_widens_its_head():
    model = DraftBuiltTooEarly(tiny_llama(tie_word_embeddings=True).config)
    assert ((96, 16), 32) == (tuple(model.lm_head.weight.shape), model.lm_head.out_features)


@pytest.mark.survey("T04")
def test_today_the_small_head_of_a_draft_does_not_come_back(tmp_path):
    model = draft()
    model.save_pretrained(tmp_path)
    model.tie_weights()
    assert (96, 16) == tuple(model.lm_head.weight.shape)


@pytest.mark.survey("T02")
def test_a_draft_comes_back_with_its_own_head_and_a_flag_that_says_so(tmp_path):
    model = draft()
    tiepolicy_hf.save_pretrained(model, tmp_path / "draft")
    for load in (tiepolicy_hf.from_pretrained, lambda cls, folder: cls.from_pretrained(folder)):
        loaded = load(DraftLlama, tmp_path / "draft")
        assert torch.equal(model.lm_head.weight, loaded.lm_head.weight)
    assert not flag_in(tmp_path / "draft")
    assert model.config.tie_word_embeddings, "the live config is the caller's"


@pytest.mark.survey("T03")
def test_a_trained_head_survives_everything_that_ties_again(tmp_path):
    """Written by transformers, with the flag that contradicts it; then tied, resized and saved again."""
    model = draft()
    head = model.lm_head.weight.detach().clone()
    model.save_pretrained(tmp_path / "theirs")
    assert flag_in(tmp_path / "theirs")
    loaded = tiepolicy_hf.from_pretrained(DraftLlama, tmp_path / "theirs")
    loaded.tie_weights()
    assert torch.equal(head, loaded.lm_head.weight)
    tiepolicy_hf.save_pretrained(loaded, tmp_path / "again")
    again = tiepolicy_hf.from_pretrained(DraftLlama, tmp_path / "again")
    again.resize_token_embeddings(100)
    # transformers gives a head as many rows as the embedding, and keeps those that were there.
    assert torch.equal(head, again.lm_head.weight[:DRAFT_VOCAB_SIZE])
    assert again.lm_head.weight is not again.model.embed_tokens.weight
    again.tie_weights()
    tiepolicy_hf.save_pretrained(again, tmp_path / "resized")
    resized = tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path / "resized")
    assert torch.equal(head, resized.lm_head.weight[:DRAFT_VOCAB_SIZE])


def test_today_tying_again_replaces_the_head_that_transformers_had_kept(tmp_path):
    draft().save_pretrained(tmp_path)
    loaded = DraftLlama.from_pretrained(tmp_path)
    assert (DRAFT_VOCAB_SIZE, 16) == tuple(loaded.lm_head.weight.shape)
    loaded.tie_weights()
    assert (96, 16) == tuple(loaded.lm_head.weight.shape)


def test_a_head_that_is_in_no_file_is_an_error_that_says_why_the_embedding_is_none(tmp_path):
    target = tiepolicy_hf.save_pretrained(tiny_llama(tie_word_embeddings=True), tmp_path / "target")
    expected = (
        f"lm_head.weight (32, 16) is not in {target}, under its own name or an alias. It cannot be derived "
        "from another tensor: lm_head.weight (32, 16) and model.embed_tokens.weight (96, 16) cannot be one tensor: "
        "shapes differ; claimed by config.tie_word_embeddings and DraftLlama._tied_weights_keys. The folder says that "
        "it holds a LlamaForCausalLM. Nothing was loaded. Load a folder that holds it, or a class that does without"
    )
    with pytest.raises(MissingTensorError) as caught:
        tiepolicy_hf.from_pretrained(DraftLlama, target)
    assert expected == str(caught.value)


def test_a_small_head_does_not_fit_into_a_class_that_has_none(tmp_path):
    tiepolicy_hf.save_pretrained(draft(), tmp_path / "draft")
    with pytest.raises(
        ShapeMismatchError, match=r"lm_head.weight has shape \(32, 16\) .* the model expects \(96, 16\)"
    ):
        tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path / "draft")


def two_values(folder):
    """A folder that transformers wrote of a model whose flag says tied, and whose two weights are apart."""
    model = tiny_llama(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(torch.full_like(model.lm_head.weight, 2.0))
    model.save_pretrained(folder)
    return model


@pytest.mark.survey("T51")
def test_two_values_under_a_tie_flag_are_an_error_that_shows_the_choice(tmp_path):
    two_values(tmp_path)
    with pytest.raises(
        TieConflictError, match='Choose: on_conflict="untie" keeps both .* on_conflict="canonical" gives'
    ):
        tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path)


def test_two_values_can_be_kept_apart_for_good(tmp_path):
    two_values(tmp_path)
    loaded = tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path, on_conflict="untie")
    loaded.tie_weights()
    assert {2.0} == set(loaded.lm_head.weight.flatten().tolist())
    assert not loaded.config.tie_word_embeddings
    tiepolicy_hf.save_pretrained(loaded, tmp_path / "again")
    assert not flag_in(tmp_path / "again")
    assert {2.0} == set(LlamaForCausalLM.from_pretrained(tmp_path / "again").lm_head.weight.flatten().tolist())


def test_the_embedding_can_be_chosen_for_both(tmp_path):
    model = two_values(tmp_path)
    loaded = tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path, on_conflict="canonical")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(model.model.embed_tokens.weight, loaded.lm_head.weight)


def test_a_plugin_chooses_before_anybody_else(tmp_path):
    class KeepsTheHead:
        @tiepolicy.hookimpl
        def tiepolicy_resolve(self, conflict):
            return tiepolicy.Resolution.keep(conflict.alias)

    two_values(tmp_path)
    policy = tiepolicy.Policy(plugins=[KeepsTheHead()])
    loaded = tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path, policy=policy)
    assert {2.0} == set(loaded.model.embed_tokens.weight.flatten().tolist())


@pytest.mark.survey("T09")
def test_weights_that_diverged_under_a_tie_flag_are_both_saved(tmp_path):
    model = two_values(tmp_path / "theirs")
    tiepolicy_hf.save_pretrained(model, tmp_path / "ours")
    loaded = tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path / "ours")
    assert {2.0} == set(loaded.lm_head.weight.flatten().tolist())
    assert torch.equal(model.model.embed_tokens.weight, loaded.model.embed_tokens.weight)
