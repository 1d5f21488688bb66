"""Step 37: writes the folder that serving engines load, and publishes it only if it reads back as the draft.

Two formats. `plain` is what vLLM (`model_executor/models/llama_eagle3.py`) and SGLang (`srt/models/llama_eagle3.py`)
load as `LlamaForCausalLMEagle3`; `speculators` is what vLLM and the library of that name load (speculators 0.9,
`models/eagle3/config.py`). Both were served by vLLM 0.32.0; SGLang's loader was read in 0.5.23.

Shape suffixes: T tokens, V target vocabulary, H draft hidden, A captured states side by side, D draft vocabulary.
"""

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from eagle3.blueprint import NORMS, read_draft_config
from eagle3.commands import ExportConfig, Format
from eagle3.draft import Draft
from eagle3.errors import ConfigError, ExportError
from eagle3.files import naming_disk_errors
from eagle3.finished import TrainedDraft, exported_tensors, open_run
from eagle3.speculate import DraftChain, Greedy
from eagle3.terminal import say, waiting

#: The release whose format `speculators` folders have.
SPECULATORS_VERSION = "0.9.0"

# Of the larger of two logits: what float64 leaves of other orders of addition, and far less than bfloat16's 2 ** -8.
_TOLERANCE = 1e-6


def run_export(config: ExportConfig) -> None:
    """Export the draft of a run.

    Raises:
        ConfigError: The folder exists, or the run is not finished and no checkpoint of it was chosen.
        Eagle3Error: The run or its target cannot be used, or what was written does not read back as the draft.
        TiePolicyError: The checkpoint is missing or damaged.
    """
    trained = open_run(config.run, checkpoint=config.checkpoint, target=config.target)
    epochs = trained.config.train.epochs
    if config.checkpoint == "LATEST" and trained.epochs_completed < epochs:
        raise ConfigError(
            f"The run {config.run} is not finished: its last checkpoint, {trained.checkpoint.name}, was written when "
            f"{trained.epochs_completed} of {epochs} epochs were completed. Finish it with "
            f"--checkpoint.restore_from LATEST, or export it as it is with --checkpoint {trained.checkpoint.name}."
        )
    export(trained, Path(config.out), kind=config.format)
    done = f"Exported {trained.checkpoint} to {config.out} ({config.format}); read back with equal logits."
    if config.format == "plain" and trained.draft.config.norm_before_residual:
        done += " For vLLM alone: SGLang (0.5.23) passes over norm_before_residual, and would draft other tokens."
    say(f"{done}\n")


def export(trained: TrainedDraft, out: Path, *, kind: Format) -> None:
    """Writes the folder under another name, reads it back, and renames it: it is whole or absent.

    Args:
        trained: Weights are rounded to bfloat16 on their way into the file; the draft itself stays as it is.
        out: Must not exist.
        kind: Of the folder.

    Raises:
        ConfigError: `out` exists, or the format has no room for this draft.
        ExportError: What was written does not read back as the draft.
        CheckpointError: The folder cannot be written.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; choose another --out, or delete it.")
    config = _CONFIGS[kind](trained)
    with naming_disk_errors(out), waiting("Exporting"):
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.unfinished.", dir=out.parent))
        try:
            save_file(_tensors(trained.draft, kind=kind), folder / "model.safetensors", metadata={"format": "pt"})
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            _read_back(folder, trained)
            _flush(folder)
            folder.chmod(0o755)  # a temporary folder is its maker's alone
            folder.rename(out)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def plain_config(trained: TrainedDraft) -> dict[str, Any]:
    """The `config.json` of a folder that vLLM and SGLang load."""
    draft: Any = trained.draft.config
    layers = list(trained.target.layer_ids)
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        **_layer_config(trained),
        "draft_vocab_size": draft.draft_vocab_size,
        "target_hidden_size": draft.target_hidden_size,
        # A head over other rows than the embedding's is never the embedding, whatever the target's own config says.
        "tie_word_embeddings": False,
        **_norms(draft),
        # vLLM reads this key first and takes an id for the layer whose input is meant; SGLang reads the other one, and
        # takes the layer whose output is meant, which is one lower.
        "eagle_aux_hidden_state_layer_ids": layers,
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in layers],
        },
    }


def speculators_config(trained: TrainedDraft) -> dict[str, Any]:
    """The `config.json` of a folder in the format of the speculators library.

    Raises:
        ConfigError: The draft is of another width than its target, which that library cannot load.
    """
    draft: Any = trained.draft.config
    if draft.hidden_size != draft.target_hidden_size:
        raise ConfigError(
            f"The draft is {draft.hidden_size} wide and its target {draft.target_hidden_size}, but the speculators "
            "format has one width for both. Export it with --format plain."
        )
    target_config, folder = trained.target.model.config, Path(trained.target_folder)
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS_VERSION,
        "torch_dtype": "bfloat16",
        "draft_vocab_size": draft.draft_vocab_size,
        "target_hidden_size": draft.target_hidden_size,
        "tie_word_embeddings": False,
        **_norms(draft),
        "embed_requires_grad": False,
        "eagle_aux_hidden_state_layer_ids": list(trained.target.layer_ids),
        "transformer_layer_config": _layer_config(trained),
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": trained.config.unroll.steps,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {
                # A server starts in another folder; what is no folder here is a name of the hub.
                "name_or_path": str(folder.absolute()) if folder.is_dir() else trained.target_folder,
                "architectures": list(target_config.architectures or []),
            },
        },
    }


_CONFIGS = {"plain": plain_config, "speculators": speculators_config}


def _layer_config(trained: TrainedDraft) -> dict[str, Any]:
    """The fields of a Llama of one layer. Older readers know the rope by two fields, newer ones by one: all three."""
    draft: Any = trained.draft.config
    rope = copy.deepcopy(dict(draft.rope_parameters))
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    fields = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings", "vocab_size", "initializer_range"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    )
    return {
        "model_type": "llama",
        **{field: getattr(draft, field) for field in fields},
        "attention_bias": False,
        "mlp_bias": False,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def _norms(draft: Any) -> dict[str, bool]:
    # All of them, also the false ones: readers differ in what they take a missing one for.
    return {name: bool(getattr(draft, name)) for name in NORMS}


def _tensors(draft: Draft, *, kind: Format) -> dict[str, Tensor]:
    """What the file holds, on the CPU: weights in bfloat16, the vocabulary as it is."""
    config: Any = draft.config
    left_out = set()
    if config.draft_vocab_size == config.vocab_size:
        # Draft ids and target ids are the same. The head is written all the same: it was trained.
        left_out |= {"d2t", "t2d"}
    if kind == "plain" and config.hidden_size == config.target_hidden_size:
        # Engines take the target's.
        left_out.add("embed_tokens.weight")
    # The one name of the layer that all versions of both engines know, and the one of the library.
    layer = "midlayer." if kind == "plain" else "layers.0."
    return {
        name.replace("midlayer.", layer): _as_stored(tensor)
        for name, tensor in draft.state_dict().items()
        if name not in left_out
    }


def _as_stored(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return (tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor).contiguous()


def _read_back(folder: Path, trained: TrainedDraft) -> None:
    """Compares the logits of a chain with those of the draft, whose weights are rounded as in the file."""
    config: Any = trained.draft.config
    draft = copy.deepcopy(trained.draft).cpu().to(torch.bfloat16).double()
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(config.vocab_size, (12,), generator=generator).tolist()
    aux_TA = torch.randn(12, 3 * config.target_hidden_size, generator=generator, dtype=torch.float64)
    expected = _Recorder()
    with torch.inference_mode():
        chain = DraftChain(draft, capacity=16)
        chain.propose(token_ids, aux_TA, rule=expected, num_tokens=4, stop_ids=frozenset())
        embedding_VH = draft.embed_tokens.weight
        actual = ExportedDraft(folder, target_embedding_VH=embedding_VH).chain_logits(token_ids, aux_TA, num_steps=4)
    expected_SD = torch.stack(expected.logits)
    difference = float((expected_SD - actual).abs().max() / expected_SD.abs().max())
    # Written so that NaN fails.
    if not difference <= _TOLERANCE:
        raise ExportError(
            f"What was written for {trained.checkpoint} does not read back as the draft: logits differ by "
            f"{difference:.3g} of the largest one, allowed are {_TOLERANCE:g}. Nothing was exported. The weights may "
            "hold NaN, or numbers that bfloat16 cannot hold; look at the run's loss."
        )


class _Recorder(Greedy):
    """Drafts greedily and keeps the logits."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def propose(self, logits_D: Tensor) -> tuple[int, None]:
        self.logits.append(logits_D)
        return super().propose(logits_D)


def _flush(folder: Path) -> None:
    """Puts the files on disk before the folder gets its name."""
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class ExportedDraft:
    """A draft as engines see it: `config.json` and `model.safetensors` of either format.

    Written from the engines' file format and not from the draft's code, so that an export is compared with another
    reading of it. Slow: one row at a time, in float64.

    Args:
        folder: The export.
        target_embedding_VH: What engines put where the file has no embedding.
    """

    def __init__(self, folder: Path, *, target_embedding_VH: Tensor) -> None:
        self.config = read_draft_config(folder)
        self.weights = {
            name: tensor.double() if tensor.is_floating_point() else tensor
            for name, tensor in exported_tensors(folder).items()
        }
        self.embedding_VH = self.weights.get("embed_tokens.weight", target_embedding_VH.double().cpu())
        # Offsets: draft id j means target id j + d2t[j]; without them the ids are the same.
        num_draft = len(self.weights["lm_head.weight"])
        self.target_ids_D = torch.arange(num_draft) + self.weights.get("d2t", torch.zeros(num_draft, dtype=torch.int64))
        self.rotary = LlamaRotaryEmbedding(self.config)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def chain_logits(self, token_ids: list[int], aux_TA: Tensor, *, num_steps: int) -> Tensor:
        """Drafts greedily behind the last token.

        Args:
            token_ids: T tokens, each the one behind that whose states stand in its row of `aux_TA`.
            aux_TA: Captured states.
            num_steps: Tokens to draft.

        Returns:
            (num_steps, D) float64: the logits of each drafted token.
        """
        self.keys, self.values = [], []
        state_H, logits = torch.empty(0), []
        for position, token in enumerate(token_ids):
            state_H = self._row(token, self._fused(aux_TA[position].double().cpu()), position)
        for step in range(num_steps):
            normed_H = state_H if self.config.norm_output else self._norm(state_H, "norm.weight")
            logits.append(self.weights["lm_head.weight"] @ normed_H)
            token = int(self.target_ids_D[logits[-1].argmax()])
            state_H = self._row(token, state_H, len(token_ids) + step)
        return torch.stack(logits)

    def _fused(self, aux_A: Tensor) -> Tensor:
        if self.config.fc_norm:
            parts = aux_A.chunk(3)
            aux_A = torch.cat([self._norm(part, f"fc_norm.{n}.weight") for n, part in enumerate(parts)])
        if self.config.norm_before_fc:
            aux_A = self._norm(aux_A, "input_norm.weight")
        return self.weights["fc.weight"] @ aux_A

    def _row(self, token: int, state_H: Tensor, position: int) -> Tensor:
        """One row through the layer; its keys stay for the rows behind it."""
        normed_H = self._norm(state_H, "midlayer.hidden_norm.weight")
        inputs = torch.cat((self._norm(self.embedding_VH[token], "midlayer.input_layernorm.weight"), normed_H))
        query, key, value = (
            (self.weights[f"midlayer.self_attn.{name}_proj.weight"] @ inputs).view(-1, self.config.head_dim or 0)
            for name in "qkv"
        )
        cos, sin = self.rotary(torch.empty(0), torch.tensor([[position]]))
        query, key = (
            part[0, :, 0] for part in apply_rotary_pos_emb(query[None, :, None], key[None, :, None], cos, sin)
        )
        shared = len(query) // len(key)
        self.keys.append(key.repeat_interleave(shared, dim=0))
        self.values.append(value.repeat_interleave(shared, dim=0))
        scores = torch.einsum("qd,nqd->qn", query, torch.stack(self.keys)) / query.shape[-1] ** 0.5
        attended = torch.einsum("qn,nqd->qd", scores.softmax(dim=-1), torch.stack(self.values)).flatten()
        residual = normed_H if self.config.norm_before_residual else state_H
        state_H = residual + self.weights["midlayer.self_attn.o_proj.weight"] @ attended
        inner = self._norm(state_H, "midlayer.post_attention_layernorm.weight")
        gate, up = (self.weights[f"midlayer.mlp.{name}_proj.weight"] @ inner for name in ("gate", "up"))
        state_H = state_H + self.weights["midlayer.mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)
        return self._norm(state_H, "norm.weight") if self.config.norm_output else state_H

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(x.square().mean() + self.config.rms_norm_eps)
        return x * scale * self.weights[name]
