"""Step 40: how large a step is, and how long it takes on a GPU: operations and bytes by part, at a share of the peak.

The parts are those of the fused step, which computes rows that carry loss only, and a teacher row once for all steps.
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

from eagle3.commands import DeviceName
from eagle3.config import RunConfig
from eagle3.tokens import EncodedData


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervision:
    """Where in the data the assistant speaks.

    Attributes:
        share: Of all tokens, 0 to 1.
        mean_span: Tokens that it writes in a row.
        mean_conversation: Tokens of a conversation; None if unknown.
        is_counted: Whether both were counted in the data; else they are assumed.
    """

    share: float
    mean_span: float
    mean_conversation: float | None
    is_counted: bool

    @classmethod
    def of(cls, data: EncodedData) -> "Supervision":
        """That of encoded conversations."""
        masks = [example.loss_mask for example in data.examples]
        num_spans = sum(int(mask[0]) + int((mask[1:] & ~mask[:-1]).sum()) for mask in masks)
        return cls(
            share=data.num_supervised / data.num_tokens,
            mean_span=data.num_supervised / num_spans,
            mean_conversation=data.num_tokens / len(data.examples),
            is_counted=True,
        )


#: What is assumed of data that nobody has counted; benchmarks/bench_eagle3.py measures the same.
ASSUMED = Supervision(share=0.6, mean_span=400.0, mean_conversation=None, is_counted=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSizes:
    """The sizes of one batch of one process, in tokens and elements.

    Attributes:
        num_tokens: All of the batch.
        visible: Tokens that can see each other.
        num_rows: Rows of the draft that some loss depends on: the supervised, and those just before them.
        num_teachers: Rows of the target that some loss depends on.
        num_pairs: Of a row and a step of the unroll, with a loss each.
        num_steps: Of the unroll.
        hidden: Width of the draft.
        intermediate: Width inside its MLP.
        queries: Width of its queries.
        keys: Width of its keys, and of its values.
        target_hidden: Width of the target.
        vocab: Tokens of the target.
        draft_vocab: Tokens of the draft.
    """

    num_tokens: int
    visible: int
    num_rows: int
    num_teachers: int
    num_pairs: int
    num_steps: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    target_hidden: int
    vocab: int
    draft_vocab: int

    @property
    def projected(self) -> int:
        """Width of queries, keys and values side by side."""
        return self.queries + 2 * self.keys

    @property
    def num_weights(self) -> int:
        """Elements of the draft's matrices."""
        per_hidden = 3 * self.target_hidden + 2 * self.projected + self.queries + 3 * self.intermediate
        return self.hidden * (per_hidden + self.draft_vocab)

    @property
    def num_fp8_weights(self) -> int:
        """Elements of the matrices that `train.fp8` is about."""
        return self.hidden * (3 * self.intermediate + self.draft_vocab)


def sizes_of(config: RunConfig, draft: PretrainedConfig, supervision: Supervision, *, row_length: int) -> StepSizes:
    """The sizes of a batch of a run.

    Args:
        config: Of the run.
        draft: Config of its draft.
        supervision: Of the data.
        row_length: Tokens of each row, padding left out.
    """
    num_steps, num_tokens = config.unroll.steps, config.train.batch_size * row_length
    of_one = (supervision.mean_conversation if config.data.packing else None) or row_length
    num_teachers = supervision.share * num_tokens
    # Of each span, the first tokens are proposed from the rows just before it.
    num_spans = num_teachers / supervision.mean_span
    return StepSizes(
        num_tokens=num_tokens,
        visible=round(min(row_length, of_one)),
        num_rows=min(num_tokens, round(num_teachers + (num_steps - 1) * num_spans)),
        num_teachers=round(num_teachers),
        num_pairs=round(num_steps * num_teachers),
        num_steps=num_steps,
        hidden=draft.hidden_size,
        intermediate=draft.intermediate_size,
        queries=draft.num_attention_heads * draft.head_dim,
        keys=draft.num_key_value_heads * draft.head_dim,
        target_hidden=draft.target_hidden_size,
        vocab=draft.vocab_size,
        draft_vocab=draft.draft_vocab_size,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A kind of GPU, by its data sheet.

    Attributes:
        name: For people.
        flops: Of dense bfloat16 products, per second.
        float32_flops: Of float32 products outside tensor cores, per second.
        bandwidth: Of its memory, bytes per second.
        memory: Bytes.
        is_measured: Whether the shares below were measured on it; they are assumed for the others.
    """

    name: str
    flops: float
    float32_flops: float
    bandwidth: float
    memory: float
    is_measured: bool


DEVICES: dict[DeviceName, Device] = {
    "h200": Device(
        name="NVIDIA H200", flops=989e12, float32_flops=67e12, bandwidth=4.8e12, memory=141e9, is_measured=True
    ),
    "h100": Device(
        name="NVIDIA H100 SXM", flops=989e12, float32_flops=67e12, bandwidth=3.35e12, memory=80e9, is_measured=False
    ),
    "a100": Device(
        name="NVIDIA A100 SXM", flops=312e12, float32_flops=19.5e12, bandwidth=2.0e12, memory=80e9, is_measured=False
    ),
}

#: Of the peak that each kind of work reaches under the power cap, from docs/performance.md.
PRODUCTS, ATTENTION, ELEMENTWISE, OPTIMIZER = 0.70, 0.40, 0.55, 0.86
#: How much faster than those the products of FP8 numbers are, all that makes such numbers counted in; measured.
FP8 = 1.7
#: Seconds of a step in which the chip waits: the plan's upload, launches, the end of the step.
_WAITING = 1.0e-3
#: How much longer the step under autograd takes, as measured with a target as wide as Llama-3.1-8B.
_AUTOGRAD = 2.25


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSizes:
    """The part of a target that runs in each step.

    Attributes:
        num_weights: Elements of its layers.
        num_layers: How many they are.
        queries: Width of the queries in each.
        is_float32: Whether it runs in float32; bfloat16 if not.
    """

    num_weights: int
    num_layers: int
    queries: int
    is_float32: bool


def product_flops(sizes: StepSizes, *, knows_argmax: bool) -> dict[str, float]:
    """Operations of all matrix products of a batch, forward and backward, by part.

    A product of the forward pass comes back twice: for its input and for its weight.

    Args:
        sizes: Of the batch.
        knows_argmax: Whether the target's greedy tokens come from a cache; else its whole head runs.
    """
    s, later = sizes, sizes.num_rows * (sizes.num_steps - 1)
    pairs_of_rows = s.num_rows * s.num_steps
    projected = s.num_tokens * (s.projected + 2 * s.keys) + s.num_rows * s.queries + later * s.projected
    return {
        "teacher": 2 * s.num_teachers * (s.draft_vocab if knows_argmax else s.vocab) * s.target_hidden,
        # Nobody asks for the gradient of the target's states.
        "fuse": 4 * s.num_tokens * 3 * s.target_hidden * s.hidden,
        "queries, keys, values": 6 * projected * s.hidden,
        "attention's output": 6 * pairs_of_rows * s.queries * s.hidden,
        "MLP": 6 * pairs_of_rows * 3 * s.intermediate * s.hidden,
        "head": 6 * s.num_pairs * s.draft_vocab * s.hidden,
    }


def attention_flops(sizes: StepSizes) -> float:
    """Operations of attention over the keys of step 0, causal, forward and 2.5 times that backward."""
    return 3.5 * 2 * sizes.queries * sizes.visible * sizes.num_tokens * sizes.num_steps


def elementwise_bytes(sizes: StepSizes, *, knows_argmax: bool) -> float:
    """Bytes that everything between the products reads and writes in bfloat16; what a cache on the chip serves, too."""
    s = sizes
    # Norms and sums 24 times a state, SwiGLU 8 times its width, heads placed and taken back; the keys of earlier steps.
    per_row = 24 * s.hidden + 8 * s.intermediate + 4 * s.projected + 4 * s.num_steps * s.keys
    teacher = 2 * s.num_teachers * (s.draft_vocab if knows_argmax else s.vocab)
    return 2 * (
        s.num_rows * s.num_steps * per_row
        + 4 * s.num_tokens * s.num_steps * s.queries
        + 3 * s.num_pairs * s.draft_vocab
        + teacher
    )


def batch_seconds(
    sizes: StepSizes, device: Device, *, knows_argmax: bool, is_float32: bool, is_fp8: bool = False
) -> float:
    """How long forward and backward of one batch take."""
    flops = device.float32_flops if is_float32 else device.flops
    parts = product_flops(sizes, knows_argmax=knows_argmax)
    products = sum(parts.values()) - (1 - 1 / FP8) * (parts["MLP"] + parts["head"]) * is_fp8
    moved = elementwise_bytes(sizes, knows_argmax=knows_argmax) * (2 if is_float32 else 1)
    return (
        products / (flops * PRODUCTS)
        + attention_flops(sizes) / (flops * ATTENTION)
        + moved / (device.bandwidth * ELEMENTWISE)
    )


def optimizer_seconds(num_weights: int, device: Device) -> float:
    """How long AdamW takes: masters and two moments read and written, gradients read twice, copies written."""
    return 30 * num_weights / (device.bandwidth * OPTIMIZER)


def target_seconds(sizes: StepSizes, target: TargetSizes, device: Device) -> float:
    """How long the target takes for its states of a batch."""
    flops = device.float32_flops if target.is_float32 else device.flops
    attention = 2 * target.queries * sizes.visible * sizes.num_tokens * target.num_layers
    return 2 * target.num_weights * sizes.num_tokens / (flops * PRODUCTS) + attention / (flops * ATTENTION)


def step_seconds(
    sizes: StepSizes,
    device: Device,
    *,
    target: TargetSizes | None,
    is_fused: bool,
    is_float32: bool = False,
    is_fp8: bool = False,
    num_batches: int = 1,
) -> float:
    """How long an optimizer step takes on one device, its exchange with others left out.

    Args:
        sizes: Of one of its batches.
        device: Where.
        target: What runs of the target; None if its states come from a cache, which holds its greedy tokens, too.
        is_fused: Whether the fused step runs, else the one under autograd.
        is_float32: Whether the draft computes in float32.
        is_fp8: Whether its MLP and head compute in FP8.
        num_batches: Of the step.
    """
    batch = batch_seconds(sizes, device, knows_argmax=target is None, is_float32=is_float32, is_fp8=is_fp8)
    draft = (num_batches * batch + optimizer_seconds(sizes.num_weights, device) + _WAITING) * (
        1 if is_fused else _AUTOGRAD
    )
    return draft + (0 if target is None else num_batches * target_seconds(sizes, target, device))
