"""Where the flags of a config disagree with each other, with the file or with the model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import tiepolicy
import tiepolicy_hf
from hf_zoo import build, entries
from models import tiny_llama
from tiepolicy.errors import MissingTensorError, TieConflictError
from tiepolicy.files import read_header

TRIPLE = ("shared.weight", "decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "lm_head.weight")


def tiny(cls, *, tied):
    return build(next(entry for entry in entries() if entry.name == cls.__name__), tied=tied)


def tiny_t5(**options):
    return T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, **options)
    )


def tiny_bart():
    sizes = {
        f"{part}_{what}": 8 if what == "ffn_dim" else 1
        for part in ("encoder", "decoder")
        for what in ("ffn_dim", "layers")
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=32, d_model=8, max_position_embeddings=16, **sizes, **heads)
    )


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def without(folder, *names):
    """Take tensors out of the one weights file of a folder, and leave in it what it notes."""
    file = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if name not in names}
    save_file(tensors, file, metadata=read_header(file).metadata)
    (folder / "digests.json").unlink(missing_ok=True)


def set_flags(model, *, top, text):
    model.config.tie_word_embeddings, model.config.text_config.tie_word_embeddings = top, text


@pytest.mark.survey("T70")
@pytest.mark.parametrize("cls", [Qwen3VLForConditionalGeneration, LlavaNextForConditionalGeneration])
def test_a_head_that_only_the_text_flag_ties_comes_from_the_embedding(cls, tmp_path):
    """Today it is random, and the load report has one line on it."""
    model = tiny(cls, tied=True)
    set_flags(model, top=False, text=True)
    model.save_pretrained(tmp_path)
    embedding, head = model.get_input_embeddings().weight, "lm_head.weight"
    assert head not in load_file(tmp_path / "model.safetensors")
    theirs = cls.from_pretrained(tmp_path)
    assert not torch.equal(embedding, theirs.get_output_embeddings().weight)
    ours = tiepolicy_hf.from_pretrained(cls, tmp_path)
    assert torch.equal(embedding, ours.get_output_embeddings().weight)
    assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight


@pytest.mark.survey("T50")
@pytest.mark.parametrize(("top", "text"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("tied", [True, False])
def test_whatever_the_flags_say_the_saved_ones_say_what_is(top, text, tied, tmp_path):
    """Today flags that say otherwise lose the head when it is read, or when something ties it again."""
    model = tiny(LlavaForConditionalGeneration, tied=tied)
    set_flags(model, top=top, text=text)
    model.save_pretrained(tmp_path / "theirs")
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "theirs")
    theirs.tie_weights()
    kept = torch.equal(model.get_output_embeddings().weight, theirs.get_output_embeddings().weight)
    assert (tied == (top or text)) is kept
    tiepolicy_hf.save_pretrained(model, tmp_path / "model")
    saved = config_of(tmp_path / "model")
    assert tied is saved["tie_word_embeddings"]
    assert tied is saved["text_config"].get("tie_word_embeddings", False)
    for load in (tiepolicy_hf.from_pretrained, lambda cls, folder: cls.from_pretrained(folder)):
        loaded = load(LlavaForConditionalGeneration, tmp_path / "model")
        loaded.tie_weights()
        assert tied is (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight)
        assert torch.equal(model.get_output_embeddings().weight, loaded.get_output_embeddings().weight)


def test_a_text_flag_alone_ties_nothing_that_is_stored_twice(tmp_path):
    """So does transformers; and text configs are made with a true flag that nobody chose."""
    model = tiny(LlavaForConditionalGeneration, tied=False)
    set_flags(model, top=False, text=True)
    model.save_pretrained(tmp_path)
    loaded = tiepolicy_hf.from_pretrained(LlavaForConditionalGeneration, tmp_path)
    assert torch.equal(model.get_output_embeddings().weight, loaded.get_output_embeddings().weight)


def test_a_text_flag_alone_does_not_even_tie_equal_values_that_are_stored_twice(tmp_path):
    model = tiny(Qwen3VLForConditionalGeneration, tied=False)
    set_flags(model, top=False, text=True)
    model.get_output_embeddings().weight.data.copy_(model.get_input_embeddings().weight)
    model.save_pretrained(tmp_path)
    loaded = tiepolicy_hf.from_pretrained(Qwen3VLForConditionalGeneration, tmp_path)
    assert torch.equal(loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight)
    assert loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight


@pytest.mark.survey("T55")
@pytest.mark.parametrize("kept", TRIPLE)
def test_any_one_of_four_names_is_enough(kept, tmp_path):
    """`load_state_dict` misses the three others."""
    model = tiny_t5()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[kept] = tensors.pop("shared.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert 3 == len(tiny_t5().load_state_dict(tensors, strict=False).missing_keys)
    loaded = tiepolicy_hf.from_pretrained(T5ForConditionalGeneration, tmp_path)
    assert [TRIPLE] == [group.names for group in tiepolicy.plan(loaded).groups]
    assert torch.equal(model.shared.weight, loaded.shared.weight)


@pytest.mark.survey("T54")
def test_a_t5_without_its_shared_weight_is_put_together(tmp_path):
    """As checkpoints exist that hold the embeddings of encoder and decoder, equal, and a head of its own."""
    model = tiny_t5()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    shared = tensors.pop("shared.weight")
    tensors |= {"encoder.embed_tokens.weight": shared, "decoder.embed_tokens.weight": shared.clone()}
    tensors["lm_head.weight"] = torch.full_like(shared, 2.0)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = config_of(tmp_path) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = tiepolicy_hf.from_pretrained(T5ForConditionalGeneration, tmp_path)
    assert torch.equal(shared, loaded.shared.weight)
    assert loaded.shared.weight is loaded.encoder.embed_tokens.weight is loaded.decoder.embed_tokens.weight
    assert {2.0} == set(loaded.lm_head.weight.flatten().tolist())


def test_a_flag_that_a_class_sets_itself_is_left_to_it(tmp_path):
    """T5's config makes its flag true whatever the file says, where it means how outputs are scaled."""
    model = tiny_t5()
    model.lm_head.weight = nn.Parameter(torch.full_like(model.shared.weight, 2.0))
    tiepolicy_hf.save_pretrained(model, tmp_path / "model")
    loaded = tiepolicy_hf.from_pretrained(T5ForConditionalGeneration, tmp_path / "model")
    assert (True, True) == (loaded.config.tie_word_embeddings, loaded.config.scale_decoder_outputs)
    loaded.tie_weights()
    assert {2.0} == set(loaded.lm_head.weight.flatten().tolist())
    assert loaded.shared.weight is loaded.encoder.embed_tokens.weight


def test_what_the_plan_in_a_folder_keeps_apart_is_not_filled_from_a_partner_that_the_class_declares(tmp_path):
    model = tiny_t5()
    model.lm_head.weight = nn.Parameter(torch.full_like(model.shared.weight, 2.0))
    tiepolicy_hf.save_pretrained(model, tmp_path / "model")
    without(tmp_path / "model", "lm_head.weight")
    with pytest.raises(MissingTensorError, match=r"^lm_head.weight \(32, 8\) is not in"):
        tiepolicy_hf.from_pretrained(T5ForConditionalGeneration, tmp_path / "model")


def test_three_names_stay_one_where_the_fourth_is_apart(tmp_path):
    model = tiny_bart()
    model.lm_head.weight = nn.Parameter(torch.full_like(model.model.shared.weight, 2.0))
    tiepolicy_hf.save_pretrained(model, tmp_path / "model")
    loaded = tiepolicy_hf.from_pretrained(BartForConditionalGeneration, tmp_path / "model")
    loaded.resize_token_embeddings(40)
    loaded.tie_weights()
    (group,) = tiepolicy.plan(loaded).groups
    assert (
        "model.shared.weight",
        "model.decoder.embed_tokens.weight",
        "model.encoder.embed_tokens.weight",
    ) == group.names
    assert {2.0} == set(loaded.lm_head.weight[:32].flatten().tolist())


def test_a_tie_under_a_false_flag_is_saved_once_with_a_true_one(tmp_path):
    """Otherwise transformers would make the name that is not stored random."""
    model = tiny_llama(tie_word_embeddings=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    tiepolicy_hf.save_pretrained(model, tmp_path / "model")
    assert config_of(tmp_path / "model")["tie_word_embeddings"]
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, loaded.lm_head.weight)


class TwoScorers(LlamaForCausalLM):
    """A class that ties two more heads and declares nothing of it."""

    def __init__(self, config):
        super().__init__(config)
        self.first = nn.Linear(config.hidden_size, 7, bias=False)
        self.second = nn.Linear(config.hidden_size, 7, bias=False)
        self.second.weight = self.first.weight
        self.post_init()


@pytest.mark.survey("T53")
def test_a_tie_that_nobody_declared_is_stored_under_both_names_and_tied_when_loaded(tmp_path):
    model = TwoScorers(tiny_llama(tie_word_embeddings=False).config)
    with pytest.raises(RuntimeError, match="which are not properly defined"):
        model.save_pretrained(tmp_path / "theirs")
    folder = tiepolicy_hf.save_pretrained(model, tmp_path / "ours")
    assert {"first.weight", "second.weight"} <= set(load_file(folder / "model.safetensors"))
    assert torch.equal(model.second.weight, TwoScorers.from_pretrained(folder).second.weight)
    loaded = tiepolicy_hf.from_pretrained(TwoScorers, folder)
    assert loaded.second.weight is loaded.first.weight
    assert torch.equal(model.second.weight, loaded.second.weight)


@pytest.mark.parametrize("equal", [True, False])
def test_what_a_class_ties_binds_where_another_tool_stored_both_names(equal, tmp_path):
    model = TwoScorers(tiny_llama(tie_word_embeddings=False).config)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["second.weight"] += 0.0 if equal else 1.0
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(tmp_path)
    if equal:
        loaded = tiepolicy_hf.from_pretrained(TwoScorers, tmp_path)
        assert loaded.second.weight is loaded.first.weight
    else:
        with pytest.raises(TieConflictError, match=r"^second.weight and first.weight are one tensor by the model's"):
            tiepolicy_hf.from_pretrained(TwoScorers, tmp_path)


class Forgiving(LlamaForCausalLM):
    """A class that says which of its tensors a file need not hold."""

    _keys_to_ignore_on_load_missing = ("lm_head.weight", "model.embed_tokens.weight")


def test_a_tied_tensor_that_a_class_calls_dispensable_is_missed_all_the_same(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    without(tmp_path, "model.embed_tokens.weight")
    with pytest.raises(MissingTensorError, match=r"^lm_head.weight \(96, 16\) \(and 1 more\) is not in"):
        tiepolicy_hf.from_pretrained(Forgiving, tmp_path)


def test_what_a_class_ties_and_the_plan_in_a_folder_keeps_apart_stays_apart(tmp_path):
    model = TwoScorers(tiny_llama(tie_word_embeddings=False).config)
    model.second.weight = nn.Parameter(torch.full_like(model.first.weight, 2.0))
    folder = tiepolicy_hf.save_pretrained(model, tmp_path)
    loaded = tiepolicy_hf.from_pretrained(TwoScorers, folder)
    assert torch.equal(model.first.weight, loaded.first.weight)
    assert {2.0} == set(loaded.second.weight.flatten().tolist())


@pytest.mark.survey("E04")
def test_a_head_that_is_not_there_is_not_taken_for_a_tie(tmp_path):
    """TensorRT-LLM did, and is not installed here; today transformers makes it random, with a line in its report."""
    model = tiny_llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    without(tmp_path, "lm_head.weight")
    assert not torch.equal(model.lm_head.weight, LlamaForCausalLM.from_pretrained(tmp_path).lm_head.weight)
    with pytest.raises(MissingTensorError, match=r"^lm_head.weight \(96, 16\) is not in"):
        tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path)


@pytest.mark.survey("T58")
def test_a_quantized_head_is_not_replaced_by_the_embedding(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    del model.lm_head.weight
    model.lm_head.register_buffer("weight", torch.ones(96, 16, dtype=torch.int8))
    tiepolicy_hf.save_pretrained(model, tmp_path / "model")
    assert torch.int8 is load_file(tmp_path / "model" / "model.safetensors")["lm_head.weight"].dtype
    assert not config_of(tmp_path / "model")["tie_word_embeddings"]
    model.tie_weights()
    assert isinstance(model.lm_head.weight, nn.Parameter), "today the flag alone replaces it"


@pytest.mark.survey("T67")
def test_a_pair_stored_in_two_dtypes_is_compared_in_the_dtype_it_is_loaded_in(tmp_path):
    model = tiny_llama(tie_word_embeddings=True).bfloat16()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].float()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.survey("T69")
def test_keys_are_names_and_not_the_beginnings_of_names(tmp_path):
    """Today `lm_head.weight_scale` counts as declared: one of two names is saved, and nothing brings back the other."""
    model = tiny_llama(tie_word_embeddings=True)
    model.model.norm.register_parameter("spare", nn.Parameter(torch.ones(4)))
    model.lm_head.register_parameter("weight_scale", model.model.norm.spare)
    model.save_pretrained(tmp_path / "theirs")
    assert 1 == len(
        {"model.norm.spare", "lm_head.weight_scale"} & set(load_file(tmp_path / "theirs" / "model.safetensors"))
    )
    tiepolicy_hf.save_pretrained(model, tmp_path / "ours")
    assert {"model.norm.spare", "lm_head.weight_scale"} <= set(load_file(tmp_path / "ours" / "model.safetensors"))
