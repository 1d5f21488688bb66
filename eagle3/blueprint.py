"""Step 14: the draft's config: that of a Llama with one layer which fits the target, kept in the folder of the run."""

import copy
import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
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

LAYERS = "eagle_aux_hidden_state_layer_ids"
NORMS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")

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
    for name in NORMS:
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
            f"draft.vocab_size is {draft_vocab_size}, but the draft's vocabulary must be a part of the target's, which "
            f"has {text.vocab_size} tokens. Set it to a number from 1 to {text.vocab_size}."
        )
    hidden_size = options.hidden_size or text.hidden_size
    if hidden_size % text.num_attention_heads:
        raise DraftError(
            f"The draft's hidden_size {hidden_size} is not a multiple of the target's num_attention_heads "
            f"{text.num_attention_heads}, which a Llama config does not allow. Set draft.hidden_size to a multiple."
        )
    _check_rope(text.rope_parameters, "The target's rope_parameters")


def _check_rope(rope: Any, which: str) -> None:
    nested = sorted(name for name, value in rope.items() if isinstance(value, dict))
    if nested:
        raise DraftError(
            f"{which} differ by kind of layer ({', '.join(nested)}), and a draft of one layer has "
            "one rope. Choose a model whose layers share one."
        )
    kind = rope.get("rope_type", "default")
    if kind not in ("default", *ROPE_INIT_FUNCTIONS):
        raise DraftError(
            f"{which} are of type {kind!r}, which this version of transformers does not know; it "
            f"knows default, {', '.join(sorted(ROPE_INIT_FUNCTIONS))}. Update transformers, or choose another model."
        )
    # transformers' Llama ignores this factor in the default rope, serving engines obey it: the draft would be trained
    # with other rotations than it is served with.
    factor = rope.get("partial_rotary_factor", 1.0)
    if factor != 1.0:
        raise DraftError(
            f"{which} rotate only a part of each head (partial_rotary_factor {factor}), which a "
            "Llama-shaped draft cannot do. Choose a model that rotates whole heads."
        )


def write_draft_config(out: Path, config: LlamaConfig) -> None:
    """Keep the draft's config in the folder of its run.

    Raises:
        CheckpointError: It cannot be written.
    """
    write_in_run(out / DRAFT_CONFIG, json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n")


def read_draft_config(folder: Path) -> LlamaConfig:
    """The draft's config from a run, a checkpoint of one, or a folder that engines load, as they understand it.

    Its `tie_word_embeddings` is a claim like any other.

    Raises:
        DraftError: If it is missing or cannot be read, or its rope is none for a draft.
    """
    run = run_of(folder)
    path = folder / "config.json" if run is None else run / DRAFT_CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        # The speculators format nests the layer's fields, and assumes a norm.
        layer = content.get("transformer_layer_config")
        config: LlamaConfig = LlamaConfig.from_dict(layer or content)
        for name in NORMS:
            setattr(config, name, content.get(name, name == "norm_before_residual" and layer is not None))
        config.draft_vocab_size = content.get("draft_vocab_size") or (layer or content)["vocab_size"]
        config.target_hidden_size = content.get("target_hidden_size") or config.hidden_size
        # SGLang's ids are one lower than vLLM's.
        outputs = (content.get("eagle_config") or {}).get(LAYERS) or ()
        setattr(config, LAYERS, content.get(LAYERS) or [k + 1 for k in outputs] or None)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise DraftError(
            f"The draft's config {path} cannot be read ({reason(error)}). Give the --out of a run, a checkpoint of "
            "one, or a folder that engines load."
        ) from error
    _check_rope(config.rope_parameters, f"The rope_parameters of {path}")
    return config


def run_of(folder: Path) -> Path | None:
    """The run that a folder is, or is a checkpoint of; None for one that engines load."""
    runs = () if (folder / "config.json").exists() else (folder, folder.absolute().parents[1])
    return next((run for run in runs if (run / DRAFT_CONFIG).exists()), None)


def require_draft(config: LlamaConfig, folder: Path, **needed: Any) -> None:
    """Refuses the draft in a folder unless its `config` has what is `needed`.

    Raises:
        DraftError: It has not.
    """
    own = {name: getattr(config, name) for name in needed}
    wrong = [f"{name} {own[name]}, not {value}" for name, value in needed.items() if own[name] != value]
    if wrong:
        raise DraftError(
            f"The draft in {folder} has {'; '.join(wrong)}, as the settings or this trainer need it. Leave out what is "
            "set, to follow the draft, or choose another."
        )
