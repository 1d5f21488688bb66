"""Tests for `eagle3.draft`."""

# Expected values stand on the left.

import json

import pytest
import torch
from torch import nn
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, LlavaConfig, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import tiepolicy
from eagle3.blueprint import draft_config
from eagle3.config import DraftConfig
from eagle3.draft import Draft, Rope
from eagle3.errors import ConfigError, DraftError

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
#: One of each type that transformers has.
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": YARN_ROPE,
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.5, 2.0],
        "long_factor": [2.0, 4.0, 8.0],
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "llama3": LLAMA3_ROPE,
    "proportional": {"rope_type": "proportional", "rope_theta": 10000.0},
}


def target_config(**changes):
    fields = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "vocab_size": 11,
        "max_position_embeddings": 128,
    }
    return LlamaConfig(**(fields | changes))


def target_tensors():
    torch.manual_seed(0)
    return {
        "embedding_VE": torch.randn(11, 8),
        "head_VE": torch.randn(11, 8),
        "draft_ids_D": torch.tensor([1, 3, 4, 10]),
    }


def refusal(target, **options):
    with pytest.raises(DraftError) as caught:
        draft_config(target, **({"draft_vocab_size": 4} | options))
    return str(caught.value)


def test_the_names_and_shapes_are_those_on_disk():
    draft = Draft(draft_config(target_config(), draft_vocab_size=4))
    expected = {
        "embed_tokens.weight": (11, 8),
        "fc.weight": (8, 24),
        "midlayer.input_layernorm.weight": (8,),
        "midlayer.hidden_norm.weight": (8,),
        "midlayer.post_attention_layernorm.weight": (8,),
        "midlayer.self_attn.q_proj.weight": (12, 16),
        "midlayer.self_attn.k_proj.weight": (6, 16),
        "midlayer.self_attn.v_proj.weight": (6, 16),
        "midlayer.self_attn.o_proj.weight": (8, 12),
        "midlayer.mlp.gate_proj.weight": (12, 8),
        "midlayer.mlp.up_proj.weight": (12, 8),
        "midlayer.mlp.down_proj.weight": (8, 12),
        "norm.weight": (8,),
        "lm_head.weight": (4, 8),
        "d2t": (4,),
        "t2d": (11,),
    }
    assert expected == {name: tuple(tensor.shape) for name, tensor in draft.state_dict().items()}
    assert (torch.int64, torch.bool) == (draft.d2t.dtype, draft.t2d.dtype)


def test_only_the_embedding_is_frozen():
    draft = Draft(draft_config(target_config(), draft_vocab_size=4))
    assert ["embed_tokens.weight"] == [name for name, p in draft.named_parameters() if not p.requires_grad]


def test_embedding_and_head_are_found_as_in_transformers():
    draft = Draft(draft_config(target_config(), draft_vocab_size=4))
    assert draft.embed_tokens is draft.get_input_embeddings()
    assert draft.lm_head is draft.get_output_embeddings()


@pytest.mark.parametrize("draft_vocab_size", [4, 11])
def test_a_draft_of_a_tied_target_is_not_tied(draft_vocab_size):
    """Also a head over the whole vocabulary is trained on its own."""
    config = draft_config(target_config(tie_word_embeddings=True), draft_vocab_size=draft_vocab_size)
    assert config.tie_word_embeddings is False
    draft = Draft(config)
    assert draft.lm_head.weight is not draft.embed_tokens.weight


def test_the_config_survives_json():
    config = draft_config(target_config(rope_parameters=LLAMA3_ROPE), draft_vocab_size=4)
    again = LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert config.to_dict() == again.to_dict()
    assert (4, 8) == (again.draft_vocab_size, again.target_hidden_size)
    assert ["LlamaForCausalLMEagle3"] == again.architectures
    assert LLAMA3_ROPE == again.rope_parameters
    assert Draft(config).state_dict().keys() == Draft(again).state_dict().keys()


def test_the_config_is_cut_from_the_target():
    target = target_config(bos_token_id=5, eos_token_id=[6, 7], pad_token_id=0, rms_norm_eps=1e-3)
    config = draft_config(target, draft_vocab_size=4)
    assert 1 == config.num_hidden_layers
    assert (5, [6, 7], 0) == (config.bos_token_id, config.eos_token_id, config.pad_token_id)
    assert (1e-3, 128) == (config.rms_norm_eps, config.max_position_embeddings)
    config.rope_parameters["rope_theta"] = 1.0
    assert 10000.0 == target.rope_parameters["rope_theta"]


def test_a_head_dimension_of_its_own_is_read_and_not_derived():
    target = Qwen3Config(
        hidden_size=8, intermediate_size=12, num_attention_heads=2, num_key_value_heads=2, head_dim=32, vocab_size=11
    )
    assert 32 == draft_config(target, draft_vocab_size=4).head_dim


def test_of_a_model_with_several_parts_the_text_part_counts():
    target = LlavaConfig(text_config=target_config(vocab_size=13))
    assert 13 == draft_config(target, draft_vocab_size=4).vocab_size


def test_a_draft_vocabulary_larger_than_the_targets_is_refused():
    assert (
        "draft.vocab_size is 12, but the draft's vocabulary must be a part of the target's, which has 11 tokens. "
        "Set it to a number from 1 to 11."
    ) == refusal(target_config(), draft_vocab_size=12)


def test_a_rope_for_each_kind_of_layer_is_refused():
    assert (
        "The target's rope_parameters differ by kind of layer (full_attention, sliding_attention), and a draft of one "
        "layer has one rope. Choose a model whose layers share one."
    ) == refusal(Gemma3TextConfig())


def test_a_partial_rotation_is_refused():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    assert (
        "The target's rope_parameters rotate only a part of each head (partial_rotary_factor 0.5), which a "
        "Llama-shaped draft cannot do. Choose a model that rotates whole heads."
    ) == refusal(target_config(rope_parameters=rope))


def test_a_target_without_the_needed_fields_is_refused():
    assert (
        "The target's config (GPT2Config) has no intermediate_size, rms_norm_eps, rope_parameters, so no Llama-shaped "
        "draft can be derived from it. Choose a target with rotary positions and RMS norms."
    ) == refusal(GPT2Config())


def test_a_width_that_llama_does_not_allow_is_refused():
    target = Qwen3Config(hidden_size=9, intermediate_size=12, num_attention_heads=2, num_key_value_heads=2)
    assert (
        "The draft's hidden_size 9 is not a multiple of the target's num_attention_heads 2, which a Llama config does "
        "not allow. Set draft.hidden_size to a multiple."
    ) == refusal(target)


def test_a_draft_starts_from_its_target():
    tensors = target_tensors()
    draft = Draft(draft_config(target_config(), draft_vocab_size=4))
    draft.init_from_target_(**tensors)
    assert torch.equal(tensors["embedding_VE"], draft.embed_tokens.weight)
    assert torch.equal(tensors["head_VE"][[1, 3, 4, 10]], draft.lm_head.weight)
    assert [1, 2, 2, 7] == draft.d2t.tolist()
    assert [1, 3, 4, 10] == draft.target_ids().tolist()
    assert [1, 3, 4, 10] == draft.t2d.nonzero().flatten().tolist()
    assert torch.equal(torch.ones(8), draft.norm.weight)
    assert 0.02 == pytest.approx(draft.fc.weight.std().item(), rel=0.3)


def test_a_new_draft_names_the_first_tokens():
    draft = Draft(draft_config(target_config(), draft_vocab_size=4))
    assert draft.t2d.nonzero().flatten().tolist() == draft.target_ids().tolist()


def test_the_same_seed_starts_the_same_draft():
    draws = []
    for _ in range(2):
        draft = Draft(draft_config(target_config(), draft_vocab_size=4))
        tensors = target_tensors()
        draft.init_from_target_(**tensors)
        draws.append(draft.state_dict())
    assert all(torch.equal(draws[0][name], draws[1][name]) for name in draws[0])


def test_a_draft_built_on_meta_is_whole_after_its_start():
    config = draft_config(target_config(), draft_vocab_size=4)
    with torch.device("meta"):
        draft = Draft(config)
    draft.to_empty(device="cpu")
    for tensor in draft.state_dict().values():
        tensor.fill_(1 if tensor.dtype == torch.bool else 77)
    expected = Draft(config)
    tensors = target_tensors()
    torch.manual_seed(1)
    draft.init_from_target_(**tensors)
    torch.manual_seed(1)
    expected.init_from_target_(**tensors)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, draft.state_dict()[name]), name
    inputs, positions = torch.randn(3, 16), torch.arange(3)
    assert torch.equal(expected.queries(inputs, positions, length=9), draft.queries(inputs, positions, length=9))


def test_a_target_of_another_shape_is_refused():
    draft = Draft(draft_config(target_config(), draft_vocab_size=4))
    with pytest.raises(DraftError) as caught:
        draft.init_from_target_(**(target_tensors() | {"head_VE": torch.zeros(12, 8)}))
    assert (
        "The target's head has shape (12, 8), but the draft's config describes (11, 8) (vocab_size, "
        "target_hidden_size). Give the target that the draft was made for."
    ) == str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("longest", [20, 300])
@pytest.mark.parametrize("kind", ROPES)
def test_rotations_are_those_of_transformers(kind, longest, dtype):
    """Positions within and behind the length that the target was made for: two types then change their frequencies."""
    config = draft_config(target_config(rope_parameters=ROPES[kind]), draft_vocab_size=4)
    torch.manual_seed(0)
    positions = torch.tensor([0, 1, 2, 5, longest // 2, longest])
    heads = torch.randn(len(positions), 2, 6).to(dtype)
    cos, sin = LlamaRotaryEmbedding(config)(heads, positions[None])
    expected, _ = apply_rotary_pos_emb(heads[None], heads[None], cos, sin, unsqueeze_dim=2)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        expected[0], Rope(config).rotate(heads, positions, length=longest + 1), rtol=tolerance, atol=tolerance
    )


def test_each_type_of_rope_in_transformers_is_tested():
    assert {"default", *ROPE_INIT_FUNCTIONS} == set(ROPES)


def test_frequencies_stay_float32_in_a_bfloat16_draft():
    config = draft_config(target_config(), draft_vocab_size=4)
    exact, rounded = Draft(config).double(), Draft(config).bfloat16()
    for draft in (exact, rounded):
        nn.init.ones_(draft.midlayer.self_attn.q_proj.weight)
    inputs, position = torch.ones(1, 16), torch.tensor([127])
    expected = exact.queries(inputs.double(), position, length=128)
    actual = rounded.queries(inputs.bfloat16(), position, length=128).double()
    # 127 * (1 - 2**-8) would be half a radian off.
    torch.testing.assert_close(expected, actual, rtol=0, atol=0.15)


def test_a_step_reads_the_embedding_first():
    draft = Draft(draft_config(target_config(), draft_vocab_size=4))
    draft.init_from_target_(**target_tensors())
    ids, states = torch.tensor([[1, 2]]), torch.randn(1, 2, 8)
    inputs = draft.step_inputs(ids, states)
    assert torch.equal(draft.midlayer.input_layernorm(draft.embed_tokens(ids)), inputs[..., :8])
    assert torch.equal(draft.midlayer.hidden_norm(states), inputs[..., 8:])


def test_the_options_say_which_norms_a_draft_has():
    options = DraftConfig(norm_before_residual=True, fc_norm=True, norm_output=True)
    config = draft_config(target_config(), draft_vocab_size=4, options=options)
    again = LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    flags = [again.norm_before_residual, again.fc_norm, again.norm_before_fc, again.norm_output]
    assert [True, True, False, True] == flags
    shapes = {name: tuple(tensor.shape) for name, tensor in Draft(again).state_dict().items() if "fc_norm" in name}
    assert {f"fc_norm.{n}.weight": (8,) for n in range(3)} == shapes
    joint = Draft(draft_config(target_config(), draft_vocab_size=4, options=DraftConfig(norm_before_fc=True)))
    assert (24,) == tuple(joint.input_norm.weight.shape)


def test_two_norms_of_the_same_states_are_refused():
    with pytest.raises(ConfigError, match=r"draft\.fc_norm and draft\.norm_before_fc are both set"):
        DraftConfig(fc_norm=True, norm_before_fc=True)


@pytest.mark.parametrize("width", [6, 12])
def test_a_draft_of_another_width_starts_from_the_targets_rows_turned_into_it(width):
    config = draft_config(target_config(), draft_vocab_size=4, options=DraftConfig(hidden_size=width))
    draft, tensors = Draft(config).double(), {name: t.double() for name, t in target_tensors().items()}
    draft.init_from_target_(**(tensors | {"draft_ids_D": torch.tensor([1, 3, 4, 10])}))
    assert ((11, width), (4, width), (width, 24)) == (
        *(tuple(layer.weight.shape) for layer in (draft.embed_tokens, draft.lm_head, draft.fc)),
    )
    assert draft.embed_tokens.weight.requires_grad
    # Embedding and head are turned by one matrix, so a wider draft keeps all products of the one with the other.
    products = tensors["head_VE"][[1, 3, 4, 10]] @ tensors["embedding_VE"].T
    same = torch.allclose(products, draft.lm_head.weight @ draft.embed_tokens.weight.T)
    assert (width > 8) is same


def test_a_shared_embedding_is_the_targets_and_a_plan_says_so():
    target = nn.Embedding(11, 8, dtype=torch.bfloat16)
    draft = Draft(draft_config(target_config(), draft_vocab_size=4))
    draft.init_from_target_(**target_tensors())
    draft.share_embedding_(target.weight)
    assert target.weight is draft.embed_tokens.weight
    plan = tiepolicy.plan(draft, external={"target": target}, digests=True)
    assert ["target:weight"] == [tie.source for tie in plan.external]
    small = plan.compact(draft.state_dict())
    assert set(draft.state_dict()) - {"embed_tokens.weight"} == set(small)
    # The target's bfloat16 rows meet float32 states.
    assert torch.float32 == draft.step_inputs(torch.tensor([1]), torch.randn(1, 8)).dtype


def test_a_draft_of_another_width_shares_no_embedding():
    draft = Draft(draft_config(target_config(), draft_vocab_size=4, options=DraftConfig(hidden_size=6)))
    own = draft.embed_tokens.weight
    draft.share_embedding_(nn.Embedding(11, 8).weight)
    assert own is draft.embed_tokens.weight


def test_an_embedding_of_another_target_is_not_shared():
    draft = Draft(draft_config(target_config(), draft_vocab_size=4))
    with pytest.raises(DraftError, match=r"embedding has shape \(12, 8\), but the draft's config describes \(11, 8\)"):
        draft.share_embedding_(nn.Embedding(12, 8).weight)


def test_an_unknown_rope_is_refused():
    target = target_config()
    target.rope_parameters = {"rope_type": "spiral", "rope_theta": 10000.0}
    assert (
        "The target's rope_parameters are of type 'spiral', which this version of transformers does not know; it knows "
        "default, "
    ) in refusal(target)
