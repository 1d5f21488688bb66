"""A draft whose config says tied and whose head has other rows keeps the head that it trained."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tiepolicy
import tiepolicy_hf
from models import tiny_llama
from tiepolicy import Reason
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
def test_a_draft_is_built_with_its_own_head_by_the_flag_that_we_saved(tmp_path):
    """Today a class that builds its head before transformers ties gets a wider one by the inherited flag, unasked."""
    widened = DraftBuiltTooEarly(tiny_llama(tie_word_embeddings=True).config)
    assert ((96, 16), 32) == (tuple(widened.lm_head.weight.shape), widened.lm_head.out_features)
    (refusal,) = tiepolicy.plan(draft()).refused
    assert Reason.SHAPE_MISMATCH is refusal.verdict.reason
    folder = tiepolicy_hf.save_pretrained(draft(), tmp_path / "draft")
    built = DraftBuiltTooEarly(LlamaConfig.from_pretrained(folder))
    assert (DRAFT_VOCAB_SIZE, 16) == tuple(built.lm_head.weight.shape)


@pytest.mark.survey("T02")
def test_a_head_of_its_own_is_loaded_into_a_model_built_from_the_config(tmp_path):
    """Today the model that the inherited flag built has no place for it."""
    model = draft()
    folder = tiepolicy_hf.save_pretrained(model, tmp_path / "draft")
    assert model.config.tie_word_embeddings, "the live config is the caller's"
    with pytest.raises(RuntimeError, match=r"size mismatch for lm_head.weight: .*\[32, 16\].*\[96, 16\]"):
        DraftBuiltTooEarly(model.config).load_state_dict(model.state_dict())
    built = DraftBuiltTooEarly(LlamaConfig.from_pretrained(folder))
    built.load_state_dict(model.state_dict())
    for cls in (DraftLlama, DraftBuiltTooEarly):
        for loaded in (built, tiepolicy_hf.from_pretrained(cls, folder), cls.from_pretrained(folder)):
            assert torch.equal(model.lm_head.weight, loaded.lm_head.weight)
    assert not flag_in(folder)


@pytest.mark.survey("T04")
def test_the_small_head_of_a_draft_is_in_the_file_and_comes_back(tmp_path):
    """Today it was replaced when the class was built, is in no file, and comes back as the embedding."""
    DraftBuiltTooEarly(tiny_llama(tie_word_embeddings=True).config).save_pretrained(tmp_path / "theirs")
    assert HEAD not in load_file(tmp_path / "theirs" / "model.safetensors")
    assert (96, 16) == tuple(DraftBuiltTooEarly.from_pretrained(tmp_path / "theirs").lm_head.weight.shape)
    model = draft()
    model.save_pretrained(tmp_path / "inherited")
    loaded = tiepolicy_hf.from_pretrained(DraftBuiltTooEarly, tmp_path / "inherited")
    tiepolicy_hf.save_pretrained(loaded, tmp_path / "ours")
    assert torch.equal(model.lm_head.weight, load_file(tmp_path / "ours" / "model.safetensors")[HEAD])
    again = tiepolicy_hf.from_pretrained(DraftBuiltTooEarly, tmp_path / "ours")
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)


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


@pytest.mark.survey("E03")
def test_a_draft_whose_head_is_in_no_file_is_not_given_a_random_one(tmp_path):
    """SGLang served one, and is not installed here; today transformers makes one, with a line in its load report."""
    model = DraftLlama(tiny_llama(tie_word_embeddings=False).config)
    headless = {name: tensor for name, tensor in model.state_dict().items() if name != HEAD}
    model.save_pretrained(tmp_path, state_dict=headless)
    assert not torch.equal(model.lm_head.weight, DraftLlama.from_pretrained(tmp_path).lm_head.weight)
    with pytest.raises(MissingTensorError, match=r"^lm_head.weight \(32, 16\) is not in"):
        tiepolicy_hf.from_pretrained(DraftLlama, tmp_path)


@pytest.mark.survey("T06")
def test_a_head_that_is_in_no_file_is_an_error_that_says_why_the_embedding_is_none(tmp_path):
    """Today transformers puts the embedding there, whatever its rows; so does NeMo, see `test_survey_automodel.py`."""
    target = tiepolicy_hf.save_pretrained(tiny_llama(tie_word_embeddings=True), tmp_path / "target")
    assert (96, 16) == tuple(DraftLlama.from_pretrained(target).lm_head.weight.shape)
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


def test_today_two_values_that_transformers_kept_apart_become_one_by_the_next_resize(tmp_path):
    two_values(tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)
    assert {2.0} == set(theirs.lm_head.weight.flatten().tolist())
    theirs.resize_token_embeddings(100)
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight


@pytest.mark.survey("T51")
def test_two_values_under_a_tie_flag_are_an_error_that_shows_the_choice(tmp_path):
    """Today transformers keeps both, until something ties again."""
    two_values(tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)
    assert {2.0} == set(theirs.lm_head.weight.flatten().tolist())
    theirs.resize_token_embeddings(100)
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
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
    """NeMo dropped one of them; `test_survey_automodel.py` shows that it no longer does."""
    model = two_values(tmp_path / "theirs")
    tiepolicy_hf.save_pretrained(model, tmp_path / "ours")
    loaded = tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path / "ours")
    assert {2.0} == set(loaded.lm_head.weight.flatten().tolist())
    assert torch.equal(model.model.embed_tokens.weight, loaded.model.embed_tokens.weight)
