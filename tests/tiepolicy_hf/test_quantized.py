"""Quantized models are saved as transformers saves them, and their ties and heads as everybody else's.

BitNet comes with transformers. torchao, bitsandbytes and quanto run on a CPU too and need nothing else; their tests run
where they are installed: `pip install --no-deps torchao bitsandbytes optimum-quanto`. 0.18.0, 0.50.2 and 0.2.7 were
tried.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import BitNetQuantConfig, BitsAndBytesConfig, LlamaForCausalLM, QuantoConfig, TorchAoConfig
from transformers.integrations.bitnet import pack_weights

import tiepolicy_hf
from models import tiny_llama
from tiepolicy.errors import ObservationError

HEAD = "lm_head.weight"
NOT_INSTALLED = "not installed: pip install --no-deps torchao bitsandbytes optimum-quanto"


def bitnet(folder, *, tied):
    """A model whose maps hold four weights in a byte; transformers reads such a file, and makes none."""
    model = tiny_llama(tie_word_embeddings=tied)
    state = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == HEAD)}
    for name in [name for name in state if name.endswith("_proj.weight")]:
        state[name] = pack_weights(torch.randint(-1, 2, state[name].shape).float())
        state[f"{name}_scale"] = torch.rand(1)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.quantization_config = BitNetQuantConfig()
    model.config.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def quantized(folder, config, *, tied=False):
    tiny_llama(tie_word_embeddings=tied, hidden_size=64).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)


def check_saved_as_by_transformers(model, folder, **options):
    """Returns the folder that was written here."""
    model.save_pretrained(folder / "theirs", **options)
    ours = tiepolicy_hf.save_pretrained(model, folder / "ours", **options)
    expected, found = (
        {path.name: load_file(path) for path in written.glob("*.safetensors")} for written in (folder / "theirs", ours)
    )
    assert [*expected] == [*found]
    for name, tensors in expected.items():
        assert tensors.keys() == found[name].keys()
        assert all(torch.equal(tensor, found[name][key]) for key, tensor in tensors.items())
        assert all(tensor.dtype is found[name][key].dtype for key, tensor in tensors.items())
    assert (folder / "theirs" / "config.json").read_text() == (ours / "config.json").read_text()
    return ours


def is_tied(model):
    return model.lm_head.weight is model.model.embed_tokens.weight


def loaded_from(folder):
    """By transformers, and here."""
    return LlamaForCausalLM.from_pretrained(folder), tiepolicy_hf.from_pretrained(LlamaForCausalLM, folder)


def check_loaded(model, folder, *, tied):
    ids = torch.tensor([[5, 20, 7]])
    for loaded in loaded_from(folder):
        assert tied is is_tied(loaded)
        assert torch.equal(model(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_packed_weights_are_saved_as_transformers_saves_them(tied, tmp_path):
    model = bitnet(tmp_path, tied=tied)
    for loaded in loaded_from(check_saved_as_by_transformers(model, tmp_path)):
        assert tied is is_tied(loaded)
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_bitsandbytes_are_saved_as_transformers_saves_them(bits, tied, tmp_path):
    pytest.importorskip("bitsandbytes", reason=NOT_INSTALLED)
    model = quantized(tmp_path, BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4), tied=tied)
    check_loaded(model, check_saved_as_by_transformers(model, tmp_path), tied=tied)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("max_shard_size", ["50GB", 20_000])
def test_weights_of_torchao_are_taken_apart_and_noted_as_by_transformers(max_shard_size, head, tied, tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason=NOT_INSTALLED)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig(), include_input_output_embeddings=head)
    model = quantized(tmp_path, config, tied=tied)
    folder = check_saved_as_by_transformers(model, tmp_path, max_shard_size=max_shard_size)
    check_loaded(model, folder, tied=tied)


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_head_is_apart_from_a_float_embedding_whatever_the_flag_says(tmp_path):
    """Today transformers compares the two, which torchao does not do."""
    quantization = pytest.importorskip("torchao.quantization", reason=NOT_INSTALLED)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig(), include_input_output_embeddings=True)
    model = quantized(tmp_path, config)
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(NotImplementedError, match="aten.equal"):
        LlamaForCausalLM.from_pretrained(tmp_path / "theirs")
    loaded = tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path / "theirs")
    assert (False, False) == (is_tied(loaded), loaded.config.tie_word_embeddings)
    check_loaded(model, tiepolicy_hf.save_pretrained(model, tmp_path / "ours"), tied=False)


@pytest.mark.filterwarnings("ignore")
def test_what_a_quantizer_cannot_store_is_refused(tmp_path):
    pytest.importorskip("optimum.quanto", reason=NOT_INSTALLED)
    model = quantized(tmp_path, QuantoConfig(weights="int8"))
    with pytest.raises(ObservationError, match="is quantized by QuantoHfQuantizer, which cannot be stored; save the"):
        tiepolicy_hf.save_pretrained(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_state_beside_that_of_the_quantizer_is_refused(tmp_path):
    model = bitnet(tmp_path, tied=True)
    with pytest.raises(ObservationError, match="by BitNetHfQuantizer, which makes its own state to save; leave"):
        tiepolicy_hf.save_pretrained(model, tmp_path / "model", state_dict=model.state_dict())


def test_a_tensor_that_is_made_of_several_is_refused_where_no_quantizer_takes_it_apart(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    model.model.norm.weight = nn.Parameter(TwoTensor(torch.ones(16), torch.ones(16)))
    with pytest.raises(ObservationError, match=r"^model.norm.weight is a TwoTensor, made of several tensors, which"):
        tiepolicy_hf.save_pretrained(model, tmp_path / "model")
