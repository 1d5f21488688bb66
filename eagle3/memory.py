"""Step 48: the memory of one device in a training step, by what it is for."""

from eagle3 import fused, loss, teacher
from eagle3.sizes import StepSizes

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
        "weights to compute with": compute * num_weights if is_fused or compute < 4 else 0,
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
