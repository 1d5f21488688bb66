"""Every model class of transformers' auto mappings, tiny and random, built from its own shrunk config."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

MAPPINGS = {
    "causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "vision-language": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
VOCAB_SIZE = 96
SMALL_VOCAB_SIZE = 40
NUM_LAYERS = 2
#: What a field of a config shrinks to; the first expression that is in its name decides. What is smaller stays.
SIZES = [
    (r"vocab_size|num_embeddings", VOCAB_SIZE),
    (r"(pad|bos|eos|sep|cls|unk|start|end|mask)_token_id|_(start|end)_id$", 1),
    (r"token_(id|index)$|_token$|_id$", 3),
    (r"kv_heads|key_value_heads|multi_query_group_num|n_head_kv", 2),
    (r"head_dim|d_kv|kv_channels|head_size|rotary_dim|rope_dim", 8),
    (r"heads?$", 4),
    (r"lora_rank", 8),
    (r"layers?$|num_blocks|n_blocks|first_k_dense_replace", NUM_LAYERS),
    (r"per_tok|top_?k|num_selects|moe_k$", 2),
    (r"shared_experts|n_group|num_groups|topk_group", 1),
    (r"experts?$", 4),
    (r"intermediate|ffn|d_ff|inner|mlp_dim|ff_dim|feed_?forward", 64),
    (r"hidden|d_model|n_embd|embed|projection_dim|output_dim|out_dim|model_dim|lru_width|width$|^dim$", 32),
    (r"max_.*(position|seq|len)|n_positions|seq_length|n_ctx|num_positions", 128),
    (r"image_size|img_size", 32),
    (r"patch_size", 8),
    (r"mel_bins", 16),
]
MAX_PARAMETERS = 4_000_000


class Entry(NamedTuple):
    """One class that an auto mapping names."""

    kind: str
    model_type: str
    name: str


def entries() -> list[Entry]:
    """Every class that the mappings name, once."""
    found: dict[str, Entry] = {}
    for kind, mapping in MAPPINGS.items():
        for model_type, names in mapping.items():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault(name, Entry(kind, model_type, name))
    return list(found.values())


def build(entry: Entry, *, tied: bool) -> PreTrainedModel:
    """A tiny model of a class with all its tie flags set, every parameter random.

    Raises whatever the class raises when it cannot be built of such a config.
    """
    cls = getattr(transformers, entry.name)
    # A few names stand in the mapping beside the config of a larger model, of which they take the text part.
    config_class = cls.config_class or CONFIG_MAPPING[entry.model_type]
    config = config_class.from_dict(_shrunk(config_class().to_dict()))
    for part in _parts(config):
        if hasattr(part, "tie_word_embeddings"):
            part.tie_word_embeddings = tied
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in cls(config).parameters())
    if num_parameters > MAX_PARAMETERS:
        raise ValueError(f"{num_parameters} parameters are too many")
    model = cls(config).eval()
    fill_(model)
    return model


def fill_(model: nn.Module) -> None:
    """Give every parameter random values: what a class starts at one or zero could be lost unseen."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.normal_(std=0.1)


def with_small_head(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class with a head of fewer rows than its embedding, as a draft's."""

    def __init__(self: Any, config: Any) -> None:  # noqa: N807 - it becomes the method of that name
        cls.__init__(self, config)
        head = self.get_output_embeddings()
        self.set_output_embeddings(nn.Linear(head.in_features, SMALL_VOCAB_SIZE, bias=False))

    # transformers copies the source of classes from elsewhere into a checkpoint.
    return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__})


def logits(model: PreTrainedModel) -> torch.Tensor:
    """What a model makes of a few ids; of text alone, also for a model that can see."""
    ids = torch.tensor([[5, 20, 7, 33, 9, 12]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(**inputs)
    return getattr(output, "logits", output[0])


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for part in vars(config).values():
        if hasattr(part, "model_type"):
            yield from _parts(part)


def _shrunk(fields: dict[str, Any]) -> dict[str, Any]:
    num_layers = {fields.get(key) for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers")} - {None}
    return {key: _small(key, value, num_layers) for key, value in fields.items()}


def _small(key: str, value: Any, num_layers: set[int]) -> Any:
    if isinstance(value, dict) and value and all(str(index).isdigit() for index in value):
        return {index: item for index, item in value.items() if int(index) < NUM_LAYERS}
    if isinstance(value, dict):
        return _shrunk(value)
    if key == "mrope_section":
        return [2, 1, 1]
    if isinstance(value, list) and len(value) in num_layers and len(value) > NUM_LAYERS:
        return [value[0], value[-1]]
    if isinstance(value, int) and not isinstance(value, bool):
        return next((min(size, value) for pattern, size in SIZES if re.search(pattern, key)), value)
    return value
