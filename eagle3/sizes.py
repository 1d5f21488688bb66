"""Step 43: how large one training step is: its tokens, the rows and pairs that carry loss, and the widths they have."""

from dataclasses import dataclass

from transformers import PretrainedConfig

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
