"""Every model class of transformers' auto mappings, built tiny and random from its own config, shrunk field by field."""

import re

import torch
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.utils import import_utils  # noqa: F401

import transformers

MAPPINGS = {
    "causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image-text": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
VOCAB = 96
HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 32, 4, 2, 8
MAX_PARAMETERS = 4_000_000

#: The first rule whose expression a field's name matches in full decides its value.
RULES = [
    (r"(.*_)?vocab_size.*|num_embeddings|n_vocab", VOCAB),
    (r".*(pad|bos|eos|sep|cls|unk|start|end|mask)_token_id|.*_start_id|.*_end_id|decoder_start_token_id", 1),
    (r".*token_(id|index)|.*_token$|.*_id$", 3),
    (r"n?u?m?_?(key_value|kv)_heads|num_key_value_heads|.*num_(key_value|kv)_(heads|groups)|multi_query_group_num|n_head_kv", KV_HEADS),
    (r".*(n_heads?|num_.*heads|num_heads|attention_heads|n_head|heads)", HEADS),
    (r".*qk_rope_head_dim|.*rotary_dim|.*rope_dim", HEAD_DIM),
    (r".*(head_dim|d_kv|kv_channels|head_size|head_width|qk_head_dim|v_head_dim|qk_nope_head_dim)", HEAD_DIM),
    (r".*(kv|q|gate|qk|o)_lora_rank|.*lora_rank.*", 8),
    (r".*(num_hidden_layers|n_layers?|num_layers|num_.*_layers|.*_layers|num_blocks|n_blocks)", 2),
    (r".*(num_experts_per_tok|moe_top_?k|top_?k_experts|num_experts_per_token|moe_k|num_selects)|top_k", 2),
    (r".*(n_shared_experts|num_shared_experts.*)", 1),
    (r".*(num_local_experts|num_experts|n_routed_experts|moe_num_experts|num_.*experts|n_experts)", 4),
    (r".*(n_group|topk_group|num_groups|n_groups)", 1),
    (r".*(first_k_dense_replace)", 1),
    (r".*(intermediate_size|ffn_dim|d_ff|ffn_hidden_size|inner_dim|n_inner|mlp_dim|ff_dim|feed_forward.*size|dim_feedforward)", 64),
    (r".*(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_size|embedding_dim|projection_dim|output_dim|out_hidden_size|out_dim|emb_dim|model_dim|lru_width|cross_attention_hidden_size|.*_hidden_size|width|dim)", HIDDEN),
    (r".*(max_position_embeddings|n_positions|max_seq_len|max_.*positions|max_sequence_length|seq_length|n_ctx|num_positions)", 128),
    (r".*image_size|.*img_size", 32),
    (r".*(spatial_)?patch_size", 8),
    (r".*(mel_bins)", 16),
]
COMPILED = [(re.compile(pattern), value) for pattern, value in RULES]


def shrunk(value, key=""):
    """A field of a config, small."""
    if isinstance(value, dict):
        return {name: shrunk(item, name) for name, item in value.items()}
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        for pattern, small in COMPILED:
            if pattern.fullmatch(key):
                return min(small, value) if value >= 0 and "token" not in key and "id" not in key else (small if value > small else value)
    return value


def classes():
    """Kind, model type and class name of everything the mappings name, each class once."""
    seen = {}
    for kind, mapping in MAPPINGS.items():
        for model_type, names in mapping.items():
            for name in names if isinstance(names, (tuple, list)) else [names]:
                seen.setdefault(name, (kind, model_type))
    return [(kind, model_type, name) for name, (kind, model_type) in seen.items()]
