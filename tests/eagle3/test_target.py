import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

from eagle3.data import Batch
from eagle3.description import describe_target, load_tokenizer, weights_digest
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
    "llama4_text",
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
    with pytest.raises(TargetError, match=r"LlamaForCausalLM has no output head, so it predicts no tokens\. Choose"):
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


@pytest.mark.parametrize("name", ["no/such", "/no/such/folder"])
def test_a_target_that_is_not_there_is_one_sentence_and_what_to_do(name):
    """Nothing of what transformers says about servers that it was not allowed to ask."""
    expected = (
        f"There is no target {name}: no folder {Path(name).absolute()}, and no model of that name in the local Hugging "
        "Face cache. Give the folder of a model, or download the model first."
    )
    for read in (load_tokenizer, describe_target, weights_digest):
        with pytest.raises(TargetError) as caught:
            read(name)
        assert expected == str(caught.value)


def test_a_part_of_a_downloaded_model_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--some--model"
    make_model().config.save_pretrained(model / "snapshots" / "0abc")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0abc")
    with pytest.raises(TargetError, match=r"^The tokenizer of the target some/model cannot be loaded\. It must be a"):
        load_tokenizer("some/model")


def test_a_folder_without_tokenizer_is_named(tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(TargetError, match=r"tokenizer of the target .* cannot be loaded\. It must be a folder with"):
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


#: Those whose attention knows where a document ends; the others are run on each document alone.
PACKING_FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "gpt_neox", "olmo2")


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_of_one_row_have_the_states_that_they_have_alone(family):
    target = make_target(family)
    ids = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(0))
    lengths = ((1, 4, 6), (7, 2, 2))
    documents = torch.stack([torch.arange(3).repeat_interleave(torch.tensor(row)) for row in lengths])
    together = target.features(ids, documents_BT=documents)
    for row, row_lengths in enumerate(lengths):
        start = 0
        for length in row_lengths:
            alone = target.features(ids[row : row + 1, start : start + length])
            part = (slice(row, row + 1), slice(start, start + length))
            torch.testing.assert_close(alone.aux_BTA, together.aux_BTA[part], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(alone.hidden_BTE, together.hidden_BTE[part], rtol=1e-4, atol=1e-5)
            start += length


@pytest.mark.parametrize("family", PACKING_FAMILIES)
def test_common_models_read_documents_side_by_side_in_one_forward(family):
    target = make_target(family)
    target.features(torch.tensor([[3, 4, 5]]), documents_BT=torch.tensor([[0, 0, 1]]))
    assert target._packs


def test_a_model_that_mixes_documents_is_run_on_each_alone():
    target = make_target()
    forward = target.decoder.forward
    target.decoder.forward = lambda position_ids=None, **options: forward(**options)
    together = target.features(torch.tensor([[3, 4, 5, 6, 7]]), documents_BT=torch.tensor([[0, 0, 1, 1, 1]]))
    assert not target._packs
    torch.testing.assert_close(target.features(torch.tensor([[5, 6, 7]])).hidden_BTE, together.hidden_BTE[:, 2:])


def test_a_batch_gives_the_features_of_its_documents():
    target = make_target()
    ids, documents = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[0, 0, 1, 1]])
    batch = Batch(input_ids_BT=ids, loss_mask_BT=ids > 0, documents_BT=documents)
    assert torch.equal(target.features(ids, documents_BT=documents).aux_BTA, target.features_of(batch).aux_BTA)


SMALL_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SMALL_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
IMAGE_READERS = {
    "llava": {
        "text_config": {"model_type": "llama", **SMALL_TEXT},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 16, **SMALL_VISION},
    },
    "llama4": {
        "text_config": {"head_dim": 8, "intermediate_size_mlp": 32, "num_local_experts": 2, **SMALL_TEXT},
        "vision_config": {
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
            **SMALL_VISION,
        },
    },
    "gemma3": {"text_config": {"head_dim": 8, **SMALL_TEXT}, "vision_config": SMALL_VISION},
    "qwen2_5_vl": {
        "text_config": {
            **SMALL_TEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
        },
    },
}


@pytest.mark.parametrize("family", IMAGE_READERS)
def test_of_a_model_that_also_reads_images_the_text_part_is_the_target(tmp_path, family):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[family](**IMAGE_READERS[family])).eval()
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    target = FrozenTarget.load(tmp_path, dtype=torch.float32, device="cpu")
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    features, output = target.features(ids), model(input_ids=ids, output_hidden_states=True)
    assert (2, 4, 5) == target.layer_ids
    torch.testing.assert_close(torch.cat([output.hidden_states[k] for k in (2, 4, 5)], dim=-1), features.aux_BTA)
    torch.testing.assert_close(output.logits, features.hidden_BTE @ target.head_VE.T)


def test_a_folder_without_weights_is_named(tmp_path):
    make_model().config.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(TargetError, match=r"The model of the target .* cannot be loaded\. It must be a folder with"):
        FrozenTarget.load(tmp_path, dtype=torch.float32, device="cpu")


def test_the_ends_of_a_sequence_come_from_all_configs():
    model = make_model()
    model.generation_config.eos_token_id = [5, 2]
    assert (2, 5) == FrozenTarget(model, tokenizer=make_tokenizer()).end_ids


def test_the_digest_of_weights_tells_a_trained_model_from_an_untrained_one(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "same")
    for parameter in model.parameters():
        parameter.data.add_(1e-3)
    model.save_pretrained(tmp_path / "other")
    one, same, other = (weights_digest(tmp_path / name) for name in ("one", "same", "other"))
    assert (True, False) == (one == same, one == other)


def test_a_folder_without_weights_has_no_digest(tmp_path):
    with pytest.raises(TargetError, match=r"holds no \*\.safetensors\. Get the complete model\."):
        weights_digest(tmp_path)
