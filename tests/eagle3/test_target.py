import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from eagle3.errors import ConfigError, TargetError
from eagle3.target import FrozenTarget

FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mistral",
    "mixtral",
    "gemma",
    "gemma3_text",
    "phi3",
    "gpt_neox",
    "opt",
    "bloom",
    "falcon",
    "granite",
    "olmo2",
    "gpt_oss",
)


def make_model(family="llama", *, num_layers=8, **changes):
    torch.manual_seed(0)
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings | changes))


def make_tokenizer(num_tokens=64):
    words = {f"word{index}": index for index in range(num_tokens)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="word0")))


def make_target(family="llama", *, layers=None, **changes):
    return FrozenTarget(make_model(family, **changes), tokenizer=make_tokenizer(), layers=layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_states_that_transformers_reports(family):
    target = make_target(family)
    input_ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    features = target.features(input_ids)
    output = target.model(input_ids, output_hidden_states=True)
    assert torch.equal(torch.cat([output.hidden_states[k] for k in (2, 4, 5)], dim=-1), features.aux_BTA)
    # The last entry stands behind the final norm; all others before it.
    assert torch.equal(output.hidden_states[-1], features.hidden_BTE)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_state_times_the_head_gives_the_models_own_logits(family):
    target = make_target(family)
    input_ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = target.features(input_ids).hidden_BTE @ target.head_VE.T
    torch.testing.assert_close(logits, target.model(input_ids).logits)


def test_layer_zero_is_the_embeddings_output():
    target = make_target(layers=(0, 1, 7))
    input_ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(target.embedding_VE[input_ids], target.features(input_ids).aux_BTA[..., :32])


@pytest.mark.parametrize(
    ("num_layers", "layers"), [(4, (1, 2, 3)), (5, (1, 2, 4)), (6, (1, 3, 5)), (7, (2, 3, 4)), (32, (2, 16, 29))]
)
def test_the_default_layers_are_the_engines_where_those_are_three(num_layers, layers):
    assert layers == make_target(num_layers=num_layers, hidden_size=8).layer_ids


def test_padding_on_the_right_changes_no_real_state():
    target = make_target()
    short = torch.tensor([[3, 4, 5]])
    padded = torch.tensor([[3, 4, 5, 0, 0], [6, 7, 8, 9, 10]])
    torch.testing.assert_close(target.features(short).aux_BTA, target.features(padded).aux_BTA[:1, :3])


def test_features_serve_as_inputs_of_a_backward_pass():
    target = make_target()
    features = target.features(torch.tensor([[3, 4, 5]]))
    layer = torch.nn.Linear(96, 1)
    layer(features.aux_BTA).sum().backward()
    assert torch.equal(features.aux_BTA.sum((0, 1)), layer.weight.grad[0])
    assert not features.aux_BTA.requires_grad


def test_hooks_are_gone_after_a_forward_that_fails():
    target = make_target()
    with pytest.raises(IndexError):
        target.features(torch.tensor([[99]]))
    assert all(not layer._forward_pre_hooks for layer in target.decoder_layers)


def test_a_tied_target_keeps_one_tensor_and_an_untied_one_two():
    tied, untied = make_target(tie_word_embeddings=True), make_target(tie_word_embeddings=False)
    assert tied.head_VE is tied.embedding_VE
    assert untied.head_VE is not untied.embedding_VE


def test_nothing_of_the_target_asks_for_gradients_or_drops_out():
    target = make_target()
    assert not target.model.training
    assert not any(parameter.requires_grad for parameter in target.model.parameters())


def test_experts_as_many_as_layers_are_not_taken_for_layers():
    target = make_target()
    target.decoder_layers[0].experts = torch.nn.ModuleList(torch.nn.Identity() for _ in range(8))
    again = FrozenTarget(target.model, tokenizer=make_tokenizer())
    assert again.decoder_layers is target.decoder_layers


def test_two_lists_that_could_be_the_layers_are_refused():
    model = make_model()
    model.model.others = torch.nn.ModuleList(torch.nn.Identity() for _ in range(8))
    with pytest.raises(TargetError, match=r"LlamaModel has 2 lists of 8 modules \(layers, others\), but exactly one"):
        FrozenTarget(model, tokenizer=make_tokenizer())


def test_a_target_of_three_layers_is_too_shallow():
    with pytest.raises(TargetError, match=r"The target has 3 layers; a draft reads from three of them"):
        make_target(num_layers=3)


@pytest.mark.parametrize("layers", [(1, 2), (1, 1, 2), (3, 2, 1), (-1, 2, 3), (1, 2, 8)])
def test_layers_that_are_not_three_ascending_ids_are_refused(layers):
    with pytest.raises(ConfigError, match=r"it must be three ascending ids from 0 to 7: id k is the input of the"):
        make_target(layers=layers)


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused():
    with pytest.raises(TargetError, match=r"The tokenizer has 65 tokens, but the target's embedding has 64 rows\."):
        FrozenTarget(make_model(), tokenizer=make_tokenizer(65))


@pytest.mark.parametrize(
    ("family", "changes"),
    [("cohere", {}), ("granite", {"logits_scaling": 8.0}), ("gemma2", {"final_logit_softcapping": 0.05})],
)
def test_a_target_that_scales_or_caps_its_logits_is_refused(family, changes):
    with pytest.raises(TargetError, match=r"are not its last hidden state times its head"):
        make_target(family, **changes)


def test_a_head_with_a_bias_is_refused_once_the_bias_is_not_zero():
    model = make_model("phi")
    model.lm_head.bias.data[3] = 1.0
    with pytest.raises(TargetError, match=r"The logits of PhiForCausalLM are not its last hidden state times its head"):
        FrozenTarget(model, tokenizer=make_tokenizer())


def test_a_target_with_a_narrower_embedding_is_refused():
    with pytest.raises(TargetError, match=r"layers are 32 wide, but the head is 16 and the last hidden state is 16"):
        make_target("opt", word_embed_proj_dim=16)


def test_a_target_without_an_output_head_is_refused():
    model = make_model()
    model.set_output_embeddings(None)
    with pytest.raises(TargetError, match=r"LlamaForCausalLM has no output head, so it predicts no tokens\."):
        FrozenTarget(model, tokenizer=make_tokenizer())


def test_a_saved_folder_gives_the_same_features(tmp_path):
    target = make_target(layers=(1, 2, 3))
    target.model.save_pretrained(tmp_path)
    target.tokenizer.save_pretrained(tmp_path)
    loaded = FrozenTarget.load(tmp_path, dtype=torch.float32, device="cpu", layers=(1, 2, 3))
    input_ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(target.features(input_ids).aux_BTA, loaded.features(input_ids).aux_BTA)
    assert loaded.vocab_size == 64
    assert loaded.config.hidden_size == 32


def test_the_asked_dtype_is_that_of_weights_and_features(tmp_path):
    make_model().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    loaded = FrozenTarget.load(tmp_path, dtype=torch.bfloat16, device="cpu")
    features = loaded.features(torch.tensor([[3, 4, 5]]))
    assert {torch.bfloat16} == {loaded.head_VE.dtype, features.aux_BTA.dtype, features.hidden_BTE.dtype}


def test_a_path_that_does_not_exist_is_named():
    with pytest.raises(
        TargetError, match=r"tokenizer of the target no/such cannot be loaded\. There is no such folder"
    ):
        FrozenTarget.load("no/such", dtype=torch.float32, device="cpu")


def test_a_folder_without_tokenizer_is_named(tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(TargetError, match=r"tokenizer of the target .* cannot be loaded\. The folder must hold"):
        FrozenTarget.load(tmp_path, dtype=torch.float32, device="cpu")


def test_a_damaged_weights_file_is_named(tmp_path):
    make_model().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(TargetError, match=r"The model of the target .* cannot be loaded\.") as caught:
        FrozenTarget.load(tmp_path, dtype=torch.float32, device="cpu")
    assert caught.value.__cause__ is not None


def test_weights_that_are_not_in_the_files_are_never_invented(tmp_path):
    """A folder whose config says untied but whose file has no head: transformers would make a random one."""
    make_model(tie_word_embeddings=False).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TargetError, match=r"The weights in .* lack lm_head\.weight\."):
        FrozenTarget.load(tmp_path, dtype=torch.float32, device="cpu")


def test_a_head_of_its_own_is_kept_although_the_config_says_tied(tmp_path):
    model = make_model(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    loaded = FrozenTarget.load(tmp_path, dtype=torch.float32, device="cpu")
    assert torch.equal(model.lm_head.weight, loaded.head_VE)
    assert not torch.equal(loaded.embedding_VE, loaded.head_VE)
