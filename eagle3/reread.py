"""Step 38: reads an exported folder back and drafts with it, by nothing but what the folder says.

Written from the engines' file format and not from the draft's code, so that an export is compared with another reading
of it. Slow: one row at a time, in float64.

Shape suffixes: T tokens, V target vocabulary, H draft hidden, A captured states side by side, D draft vocabulary.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from eagle3.blueprint import read_draft_config
from eagle3.finished import exported_tensors


class ExportedDraft:
    """A draft as engines see it: `config.json` and `model.safetensors` of either format.

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
