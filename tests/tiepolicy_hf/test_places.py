"""A device map may put apart what is apart, and only that."""

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

import tiepolicy_hf
from hf_zoo import build, entries
from models import tiny_llama
from tiepolicy.errors import CheckpointError
from tiepolicy_hf._ties import _place


class SmallHead(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, 24, bias=False)


def trained_apart():
    model = tiny_llama(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(torch.randn(96, 16))
    return model


def tied_by_the_text_flag_alone():
    model = build(next(entry for entry in entries() if entry.name == "LlavaForConditionalGeneration"), tied=False)
    assert isinstance(model, LlavaForConditionalGeneration)
    model.config.tie_word_embeddings, model.config.text_config.tie_word_embeddings = False, True
    return model


def with_a_small_head():
    return SmallHead(tiny_llama(tie_word_embeddings=True).config)


@pytest.mark.parametrize(
    ("make", "options"),
    [(trained_apart, {"on_conflict": "untie"}), (tied_by_the_text_flag_alone, {}), (with_a_small_head, {})],
)
def test_what_is_apart_may_lie_apart_whatever_a_flag_says(make, options, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "model")
    loaded = tiepolicy_hf.from_pretrained(
        type(model),
        tmp_path / "model",
        device_map={"model": "cpu", "lm_head": "disk"},
        offload_folder=tmp_path / "offloaded",
        **options,
    )
    ids = torch.tensor([[5, 20, 7]])
    assert torch.allclose(model(ids).logits, loaded(ids).logits, atol=1e-6)


def test_of_the_modules_around_a_tensor_the_innermost_says_where_it_lies(tmp_path):
    folder = tiepolicy_hf.save_pretrained(tiny_llama(tie_word_embeddings=True), tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"puts model.embed_tokens.weight on cpu and lm_head.weight on disk"):
        tiepolicy_hf.from_pretrained(LlamaForCausalLM, folder, device_map={"": "cpu", "lm_head": "disk"})


def test_a_module_is_around_what_is_named_after_it_and_a_dot():
    assert ("cpu", "disk") == (_place("lm_head.weight", {"": "cpu", "lm": "disk"}), _place("lm.weight", {"lm": "disk"}))
