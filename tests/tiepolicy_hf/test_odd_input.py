"""What people hand over by mistake: each gets one sentence, and nothing half done."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM, LlamaModel, QuantoConfig
from transformers.quantizers import AutoHfQuantizer

import tiepolicy_hf
from models import tiny_llama
from tiepolicy.errors import (
    CheckpointError,
    MissingTensorError,
    ObservationError,
    ShapeMismatchError,
    UntrustedCheckpointError,
)
from tiepolicy.files import read_header


def tied():
    return tiny_llama(tie_word_embeddings=True)


@pytest.fixture
def folder(tmp_path):
    """As transformers writes it, without digests of its files."""
    tied().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# Loading


def test_a_file_is_no_folder(folder):
    with pytest.raises(CheckpointError, match=r"model.safetensors is no folder. A model of the Hub is loaded from"):
        tiepolicy_hf.from_pretrained(LlamaForCausalLM, folder / "model.safetensors")


@pytest.mark.parametrize("cls", [LlamaForCausalLM, AutoModelForCausalLM])
@pytest.mark.parametrize(
    ("config", "message"), [(None, "config.json cannot be read: .* No such file"), ("{", "config.json is damaged: ")]
)
def test_a_folder_without_a_config_is_no_model_of_the_default_size(cls, config, message, folder):
    """Which for a Llama takes 26 GB before the first shape is compared."""
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        tiepolicy_hf.from_pretrained(cls, folder)


def test_a_config_of_the_callers_needs_none_in_the_folder(folder):
    (folder / "config.json").unlink()
    loaded = tiepolicy_hf.from_pretrained(LlamaForCausalLM, folder, config=tied().config)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_named(text, folder):
    (folder / "model.safetensors").unlink()
    tied().save_pretrained(folder, max_shard_size=4096)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="model.safetensors.index.json is damaged: "):
        tiepolicy_hf.from_pretrained(LlamaForCausalLM, folder)


def test_a_folder_of_another_class_is_named_with_its_own(folder):
    config = GPT2LMHeadModel.config_class(vocab_size=96, n_positions=8, n_embd=16, n_head=2, n_layer=1)
    with pytest.raises(MissingTensorError) as caught:
        tiepolicy_hf.from_pretrained(GPT2LMHeadModel, folder, config=config)
    assert "The folder says that it holds a LlamaForCausalLM. Nothing was loaded" in str(caught.value)


def test_the_part_of_a_model_without_a_head_is_read_from_the_folder_of_the_whole(folder):
    part = tiepolicy_hf.from_pretrained(LlamaModel, folder)
    whole = tiepolicy_hf.from_pretrained(LlamaForCausalLM, folder)
    assert torch.equal(whole.model.embed_tokens.weight, part.embed_tokens.weight)


@pytest.mark.parametrize(("cls", "name"), [(nn.Linear, "Linear"), (nn.Linear(2, 2), "a Linear"), (None, "a NoneType")])
def test_what_is_no_class_of_transformers_cannot_be_loaded(cls, name, folder):
    with pytest.raises(TypeError, match=f"^{name} cannot be loaded; give a model class of transformers"):
        tiepolicy_hf.from_pretrained(cls, folder)


@pytest.mark.parametrize("option", ["subfolder", "variant", "gguf_file"])
def test_files_that_nobody_looked_at_are_not_opened(option, folder):
    with pytest.raises(TypeError, match=f"^{option} cannot be given: only model.safetensors or its shards"):
        tiepolicy_hf.from_pretrained(LlamaForCausalLM, folder, **{option: "other"})


def test_a_damaged_pickle_is_not_called_an_attack(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_text("x" * 10_000)
    with pytest.raises(UntrustedCheckpointError, match="pytorch_model.bin is damaged, or asks for more than reading"):
        tiepolicy_hf.from_pretrained(LlamaForCausalLM, folder, allow_pickle=True)


def test_a_config_of_another_size_is_named_with_both_shapes(folder):
    other = tiny_llama(tie_word_embeddings=True, vocab_size=100).config
    with pytest.raises(ShapeMismatchError, match=r"has shape \(96, 16\) in .*, the model expects \(100, 16\)"):
        tiepolicy_hf.from_pretrained(LlamaForCausalLM, folder, config=other)


def test_a_map_that_has_no_place_for_half_a_tie_says_so(folder):
    with pytest.raises(CheckpointError, match=r"puts model.embed_tokens.weight on cpu and lm_head.weight on no device"):
        tiepolicy_hf.from_pretrained(LlamaForCausalLM, folder, device_map={"model": "cpu"})


@pytest.mark.parametrize("device_map", ["cpu", "meta"])
def test_a_device_for_all_keeps_the_tie(device_map, folder):
    loaded = tiepolicy_hf.from_pretrained(LlamaForCausalLM, folder, device_map=device_map)
    assert device_map == loaded.lm_head.weight.device.type
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


# Saving


def saved(model, folder, **options):
    tiepolicy_hf.save_pretrained(model, folder, **options)


def with_adapter():
    model = tied()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    return model


def quantized():
    model = tied()
    model.hf_quantizer = AutoHfQuantizer.from_config(QuantoConfig())
    return model


def sparse():
    model = tied()
    model.model.norm.weight = nn.Parameter(torch.ones(16).to_sparse())
    return model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.compile(tied()), "^OptimizedModule is no transformers model; unwrap it"),
        (lambda: get_peft_model(tied(), LoraConfig(target_modules=["q_proj"])), "^the PeftModel has adapters of PEFT"),
        (with_adapter, "^the LlamaForCausalLM has adapters of PEFT, .* merge them first"),
        (
            quantized,
            "^the LlamaForCausalLM is quantized by QuantoHfQuantizer, which cannot be stored; save",
        ),
        (sparse, r"^model.norm.weight has the layout torch.sparse_coo, which safetensors has not; make it dense"),
    ],
)
def test_what_a_plain_folder_cannot_hold_is_refused(make, message, tmp_path):
    with pytest.raises(ObservationError, match=message):
        saved(make(), tmp_path / "model")
    assert [] == list(tmp_path.iterdir())


def test_a_state_of_other_shapes_is_not_saved(tmp_path):
    state = tied().state_dict() | {"model.norm.weight": torch.ones(3)}
    with pytest.raises(ShapeMismatchError, match=r"^model.norm.weight has shape \(3,\) in the state_dict to save, and"):
        saved(tied(), tmp_path / "model", state_dict=state)
    assert [] == list(tmp_path.iterdir())


def test_an_empty_state_is_not_taken_for_none(tmp_path):
    with pytest.raises(MissingTensorError, match="is in the model but not in the state_dict to save"):
        saved(tied(), tmp_path / "model", state_dict={})


def test_buffers_that_are_not_persistent_and_parameters_without_elements_keep_their_kind(tmp_path):
    model = tied()
    model.register_buffer("kept", torch.ones(3))
    model.register_buffer("computed", torch.ones(3), persistent=False)
    model.register_parameter("empty", nn.Parameter(torch.empty(0, 3)))
    saved(model, tmp_path / "model")
    names = read_header(tmp_path / "model" / "model.safetensors").tensors
    assert {"kept", "empty"} == {"kept", "computed", "empty"} & set(names)


def test_a_config_that_names_nothing_is_refused_by_transformers(folder):
    (folder / "config.json").write_text('{"model_type": "nosuch"}')
    with pytest.raises(ValueError, match="model type `nosuch` but Transformers does not recognize"):
        tiepolicy_hf.from_pretrained(AutoModelForCausalLM, folder)
