"""Step 41: what one device spends on an optimizer step of a run: bytes by what they are for, and seconds."""

from typing import Any

import torch
from transformers import PreTrainedModel

from eagle3 import fused, loss, teacher
from eagle3.config import RunConfig
from eagle3.draft import Draft
from eagle3.fused_scorer import obstacle
from eagle3.speed import Device, StepSizes, Supervision, TargetSizes, sizes_of, step_seconds

#: What autograd keeps for the backward pass, times what the fused step keeps; measured.
_AUTOGRAD = 3.85


def weight_bytes(num_weights: int, *, num_own: int, is_fused: bool, compute: int, accumulates: bool) -> dict[str, int]:
    """Bytes of the draft's weights and all that hangs on each of them.

    Args:
        num_weights: Trainable elements of the draft.
        num_own: Those that this process keeps masters of, which shards divide.
        is_fused: Whether the fused step runs.
        compute: Bytes of an element in products.
        accumulates: Whether a step has several batches.
    """
    # The fused step's gradients are those of one batch, in the dtype of the products, and a sum where there are more.
    gradients = num_weights * compute + (4 * num_weights if accumulates else 0) if is_fused else 4 * num_own
    return {
        "master weights (float32)": 4 * num_own,
        "weights to compute with": compute * num_weights if compute < 4 else 0,
        "gradients": gradients,
        "moments of AdamW (float32)": 8 * num_own,
    }


def batch_bytes(sizes: StepSizes, *, is_fused: bool, compute: int, target: int) -> dict[str, int]:
    """Bytes that live as long as a batch, at the worst moment.

    Args:
        sizes: Of the batch.
        is_fused: Whether the fused step runs.
        compute: Bytes of an element in the draft's products.
        target: Bytes of an element of the target's states and logits.
    """
    kept = compute * _kept_elements(sizes)
    logits = target * sizes.num_teachers * sizes.draft_vocab
    states = {"states of the target": 4 * sizes.num_tokens * sizes.target_hidden * target}
    if is_fused:
        scoring = compute * min(fused.CHUNK, sizes.num_pairs) * sizes.draft_vocab
        # The gradients come when the logits are gone.
        return states | {
            "activations of the draft": kept,
            "logits of the target": logits,
            "chunk of logits, or gradients": max(scoring, _backward_bytes(sizes, compute)),
        }
    # The largest of three in float32: logits, target's distribution, gradient.
    scoring = 12 * min(loss.CHUNK, sizes.num_pairs) * sizes.draft_vocab
    return states | {
        "activations of the draft": round(_AUTOGRAD * kept),
        "logits of the target": logits + target * min(teacher.CHUNK, sizes.num_teachers) * sizes.vocab,
        "chunk of logits": scoring,
    }


def _kept_elements(sizes: StepSizes) -> int:
    """What the forward pass of the fused step keeps; `eagle3.tape.Tape` lists it."""
    s = sizes
    per_token = 4 * s.hidden + 2 * s.keys + 2 * s.num_steps * s.queries
    per_row = s.num_steps * (s.queries + 4 * s.hidden + 3 * s.intermediate) + 2 * (s.num_steps - 1) * s.keys
    return s.num_tokens * per_token + s.num_rows * per_row + s.num_pairs * s.hidden


def _backward_bytes(sizes: StepSizes, compute: int) -> int:
    """What its backward pass adds; `eagle3.tape.TapeGradients` lists it."""
    s = sizes
    per_row = s.num_steps * (2 * s.hidden + s.projected) + s.queries
    per_token = s.queries + 2 * s.keys
    in_float32 = 2 * s.keys * (s.num_tokens + (s.num_steps - 1) * s.num_rows)
    return compute * (s.num_rows * per_row + s.num_tokens * per_token) + 4 * in_float32


class Forecast:
    """What follows from a run's settings and the shapes of its models.

    Args:
        config: Of the run.
        draft: On the meta device.
        target: On the meta device.
        num_processes: How many train together, one per device.

    Attributes:
        num_weights: Trainable elements of the draft.
        is_fused: Whether a GPU takes the fused step.
    """

    def __init__(self, config: RunConfig, draft: Draft, target: PreTrainedModel, *, num_processes: int) -> None:
        self.config = config
        self.draft = draft
        self.num_weights = sum(parameter.numel() for parameter in draft.parameters() if parameter.requires_grad)
        self.is_fused = config.train.step != "autograd" and obstacle(config, draft, torch.device("cuda")) is None
        shared_by = {"data": 1, "shard": num_processes, "hybrid": config.parallel.shard_size or num_processes}
        self._is_fp8 = self.is_fused and config.train.fp8
        self._num_own = -(-self.num_weights // shared_by[config.parallel.kind])
        self._element = 2 if config.target.dtype == "bfloat16" else 4
        self._compute = 4 if config.train.precision == "float32" else 2
        embedding: Any = target.get_input_embeddings()
        head: Any = target.get_output_embeddings()
        self._head_elements: int = head.weight.numel()
        # A target whose states come from disk is only these two, or one that is both.
        tables = {id(table.weight): table.weight.numel() for table in (embedding, head)}
        self._num_tables = sum(tables.values())
        self._num_layer_weights = sum(parameter.numel() for parameter in target.parameters()) - self._num_tables
        self._text: Any = target.config.get_text_config(decoder=True)

    def memory(self, supervision: Supervision) -> dict[str, int]:
        """Bytes of one device while all rows are full, by what they are for."""
        config, sizes = self.config, self._sizes(supervision, self.config.data.max_length)
        num_target = self._num_tables + (self._num_layer_weights if config.target.cache is None else 0)
        frozen = sum(parameter.numel() for parameter in self.draft.parameters()) - self.num_weights
        is_shared = self.draft.config.hidden_size == self.draft.config.target_hidden_size
        return {
            "weights of the target": self._element * num_target,
            "head of the target, reordered": self._element * self._head_elements if self.is_fused else 0,
            "embedding of the draft": 0 if is_shared else 4 * frozen,
            **weight_bytes(
                self.num_weights,
                num_own=self._num_own,
                is_fused=self.is_fused,
                compute=self._compute,
                accumulates=config.train.accumulate > 1,
            ),
            **({"weights in FP8, also transposed": 2 * sizes.num_fp8_weights} if self._is_fp8 else {}),
            **batch_bytes(sizes, is_fused=self.is_fused, compute=self._compute, target=self._element),
        }

    def seconds(self, device: Device, supervision: Supervision, *, row_length: int) -> float:
        """How long an optimizer step takes where rows have so many tokens."""
        return step_seconds(
            self._sizes(supervision, row_length),
            device,
            target=self._live_target(),
            is_fused=self.is_fused,
            is_float32=self._compute == 4,
            is_fp8=self._is_fp8,
            num_batches=self.config.train.accumulate,
        )

    def _sizes(self, supervision: Supervision, row_length: int) -> StepSizes:
        return sizes_of(self.config, self.draft.config, supervision, row_length=row_length)

    def _live_target(self) -> TargetSizes | None:
        if self.config.target.cache is not None:
            return None
        text = self._text
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return TargetSizes(
            num_weights=self._num_layer_weights,
            num_layers=text.num_hidden_layers,
            queries=text.num_attention_heads * head_dim,
            is_float32=self._element == 4,
        )
