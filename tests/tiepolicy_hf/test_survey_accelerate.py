"""Failures of the field in accelerate: ties it does not see, breaks, or makes again."""

import inspect

import pytest
import torch
from accelerate import Accelerator, init_empty_weights, load_checkpoint_in_model
from accelerate.utils import find_tied_parameters
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from safetensors import safe_open
from torch import nn
from transformers import LlamaForCausalLM

import tiepolicy
import tiepolicy_hf
from models import TiedPair, tiny_llama
from tiepolicy.errors import BrokenTieError, MissingTensorError


def is_tied(model):
    return model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.survey("T60")
def test_ties_that_accelerate_does_not_see_are_in_the_plan():
    buffers = nn.ModuleDict({"a": nn.BatchNorm1d(2, affine=False), "b": nn.BatchNorm1d(2, affine=False)})
    buffers["b"].running_mean = buffers["a"].running_mean
    storage = TiedPair(tied=False)
    storage.lm_head.weight = nn.Parameter(storage.embed_tokens.weight.data)
    view = TiedPair(tied=False)
    view.lm_head.weight = nn.Parameter(view.embed_tokens.weight.data[2:6])
    assert [[], [], []] == [find_tied_parameters(model) for model in (buffers, storage, view)]
    assert [1, 1, 1] == [len(tiepolicy.plan(model).groups) for model in (buffers, storage, view)]


@pytest.mark.survey("T61")
def test_a_tie_that_init_empty_weights_broke_is_found_and_mended():
    with init_empty_weights():
        broken = TiedPair()
    assert broken.lm_head.weight is not broken.embed_tokens.weight
    with torch.device("meta"):
        plan = tiepolicy.plan(TiedPair())
    broken.to_empty(device="cpu")
    with pytest.raises(BrokenTieError, match=r"were one tensor before init_empty_weights\(\)"):
        plan.verify(broken, after="init_empty_weights()")
    plan.retie(broken, keep="canonical")
    assert broken.lm_head.weight is broken.embed_tokens.weight


@pytest.mark.survey("T62")
def test_a_tie_lies_on_one_device_whatever_the_map(tmp_path):
    folder = tiepolicy_hf.save_pretrained(tiny_llama(tie_word_embeddings=True), tmp_path / "model")
    for device_map in ({"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}, "auto"):
        assert is_tied(tiepolicy_hf.from_pretrained(LlamaForCausalLM, folder, device_map=device_map))


@pytest.mark.survey("T71")
@pytest.mark.filterwarnings("ignore")
def test_a_file_without_a_trace_of_its_alias_is_read_by_the_declaration_or_refused(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    Accelerator(cpu=True).save_model(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {"format": "pt"} == file.metadata()
    random = tiny_llama(tie_word_embeddings=False)
    head = random.lm_head.weight.detach().clone()
    load_checkpoint_in_model(random, str(tmp_path))
    assert torch.equal(head, random.lm_head.weight), "today the head stays random and nothing says so"
    model.config.save_pretrained(tmp_path)
    assert is_tied(tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path))
    random.config.save_pretrained(tmp_path)
    with pytest.raises(MissingTensorError, match="^lm_head.weight"):
        tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path)


@pytest.mark.survey("T74")
def test_accelerates_tying_again_leaves_apart_what_was_loaded_apart(tmp_path):
    """It calls `tie_weights()` on what it is given, which reads the flag of the config."""
    assert "model.tie_weights()" in inspect.getsource(fsdp2_prepare_model)
    model = tiny_llama(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(torch.full_like(model.lm_head.weight, 2.0))
    model.save_pretrained(tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)
    ours = tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path, on_conflict="untie")
    theirs.tie_weights()
    ours.tie_weights()
    assert [(True, True), (False, False)] == [(is_tied(m), m.config.tie_word_embeddings) for m in (theirs, ours)]
    assert {2.0} == set(ours.lm_head.weight.flatten().tolist())
