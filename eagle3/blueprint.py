"""Step 16: the draft's config: that of a Llama with one layer which fits the target, kept in the folder of the run."""

import copy
import json
from pathlib import Path
from typing import Any

from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from eagle3.config import DraftConfig
from eagle3.errors import DraftError
from eagle3.files import reason, write_in_run

#: The draft's config in the folder of a run; a resumed run builds its draft from it.
DRAFT_CONFIG = "draft_config.json"

_NEEDED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
)

_DEFAULTS = DraftConfig()


def draft_config(target_config: Any, *, draft_vocab_size: int, options: DraftConfig = _DEFAULTS) -> LlamaConfig:
    """Describes a one-layer draft that fits a target.

    Widths, head counts, the rope block and the special tokens are the target's, unless the options say otherwise. Its
    tie flag is not: a head over the draft vocabulary has other rows than the embedding.

    Args:
        target_config: Config of any transformers model with rotary positions and RMS norms; of a model with several
            parts, the text part counts.
        draft_vocab_size: Rows of the draft's head, at most the target's vocabulary size.
        options: Widths and norms; the size of the vocabulary in them is not read.

    Returns:
        A config that survives JSON, with `draft_vocab_size`, `target_hidden_size` and the options' norms added.

    Raises:
        DraftError: The target lacks a field that the draft needs, has an unknown rope or another one in each kind of
            layer, rotates only a part of each head, or has a smaller vocabulary than the draft.
    """
    text = target_config.get_text_config()
    _check(text, draft_vocab_size, options)
    config = LlamaConfig(
        architectures=["LlamaForCausalLMEagle3"],
        hidden_size=options.hidden_size or text.hidden_size,
        intermediate_size=options.intermediate_size or text.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        hidden_act="silu",
        rms_norm_eps=text.rms_norm_eps,
        rope_parameters=copy.deepcopy(text.rope_parameters),
        max_position_embeddings=text.max_position_embeddings,
        vocab_size=text.vocab_size,
        bos_token_id=getattr(text, "bos_token_id", None),
        eos_token_id=getattr(text, "eos_token_id", None),
        pad_token_id=getattr(text, "pad_token_id", None),
        tie_word_embeddings=False,
    )
    config.draft_vocab_size = draft_vocab_size
    config.target_hidden_size = text.hidden_size
    for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"):
        setattr(config, name, getattr(options, name))
    return config


def _check(text: Any, draft_vocab_size: int, options: DraftConfig) -> None:
    missing = [name for name in _NEEDED if getattr(text, name, None) is None]
    if missing:
        raise DraftError(
            f"The target's config ({type(text).__name__}) has no {', '.join(missing)}, so no Llama-shaped draft can be "
            "derived from it. Choose a target with rotary positions and RMS norms."
        )
    if not 1 <= draft_vocab_size <= text.vocab_size:
        raise DraftError(
            f"draft_vocab_size is {draft_vocab_size}, but the draft's vocabulary must be a part of the target's, which "
            f"has {text.vocab_size} tokens. Set it to a number from 1 to {text.vocab_size}."
        )
    hidden_size = options.hidden_size or text.hidden_size
    if hidden_size % text.num_attention_heads:
        raise DraftError(
            f"The draft's hidden_size {hidden_size} is not a multiple of the target's num_attention_heads "
            f"{text.num_attention_heads}, which a Llama config does not allow. Set draft.hidden_size to a multiple."
        )
    _check_rope(text.rope_parameters)


def _check_rope(rope: dict[str, Any]) -> None:
    nested = sorted(name for name, value in rope.items() if isinstance(value, dict))
    if nested:
        raise DraftError(
            f"The target's rope_parameters differ by kind of layer ({', '.join(nested)}), and a draft of one layer has "
            "one rope. Choose a target whose layers share one."
        )
    kind = rope.get("rope_type", "default")
    if kind not in ("default", *ROPE_INIT_FUNCTIONS):
        raise DraftError(
            f"The target's rope_parameters are of type {kind!r}, which this version of transformers does not know; it "
            f"knows default, {', '.join(sorted(ROPE_INIT_FUNCTIONS))}. Update transformers, or choose another target."
        )
    # transformers' Llama ignores this factor in the default rope, serving engines obey it: the draft would be trained
    # with other rotations than it is served with.
    factor = rope.get("partial_rotary_factor", 1.0)
    if factor != 1.0:
        raise DraftError(
            f"The target's rope_parameters rotate only a part of each head (partial_rotary_factor {factor}), which a "
            "Llama-shaped draft cannot do. Choose a target that rotates whole heads."
        )


def write_draft_config(out: Path, config: LlamaConfig) -> None:
    """Keep the draft's config in the folder of its run.

    Raises:
        CheckpointError: It cannot be written.
    """
    write_in_run(out / DRAFT_CONFIG, json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n")


def read_draft_config(out: Path) -> LlamaConfig:
    """The draft's config from the folder of its run. Its `tie_word_embeddings` is a claim like any other.

    Raises:
        DraftError: If it is missing or cannot be read.
    """
    path = out / DRAFT_CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["eagle_aux_hidden_state_layer_ids"]  # of a draft, and not of any Llama
        config: LlamaConfig = LlamaConfig.from_dict(content)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DraftError(
            f"The draft's config {path} cannot be read ({reason(error)}). A run is resumed with the --out it was "
            "started with."
        ) from error
    return config
