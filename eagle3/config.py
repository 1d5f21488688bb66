"""Step 1: settings of a run: one frozen tree, typed, checked when it is built, read from YAML and dotted options."""

from dataclasses import dataclass, field
from typing import Literal

from eagle3.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """The model that the draft will propose tokens to.

    Args:
        model: Folder of a transformers causal language model with its tokenizer.
        dtype: Of its weights and states.
        layers: Three layers whose inputs the draft reads, ascending, counted as in transformers' `hidden_states`;
            null for a low, a middle and a high one.
    """

    model: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    layers: tuple[int, int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The conversations to train on.

    Args:
        train: JSONL file; each line has `messages`, or ShareGPT `conversations`.
        max_length: In tokens; what is longer loses its end.
    """

    train: str
    max_length: int = 2048

    def __post_init__(self) -> None:
        _require_positive("data.max_length", self.max_length - 1, "must be at least 2")


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """The draft; its width, heads and rope are the target's.

    Args:
        vocab_size: Tokens that it can propose, the most frequent of the data; null for all of the target's.
    """

    vocab_size: int | None = 32000

    def __post_init__(self) -> None:
        if self.vocab_size is not None:
            _require_positive("draft.vocab_size", self.vocab_size)


@dataclass(frozen=True, kw_only=True)
class UnrollConfig:
    """How far the draft is trained on its own states.

    Args:
        steps: Tokens it proposes in a row.
        decay: Weight of each step's loss over that of the step before.
    """

    steps: int = 7
    decay: float = 0.8

    def __post_init__(self) -> None:
        _require_positive("unroll.steps", self.steps)
        _require_positive("unroll.decay", self.decay)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimization.

    Args:
        epochs: Passes over the data.
        batch_size: Conversations per process and step.
        lr: Peak learning rate of AdamW.
        warmup_ratio: Share of the steps in which the learning rate rises to its peak; then it falls as a cosine to 0.
        weight_decay: Of AdamW.
        max_grad_norm: Longer gradients are shortened to it.
        seed: Of the draft's first weights and the order of the data.
        log_every: Steps between log lines.
    """

    epochs: int = 1
    batch_size: int = 1
    lr: float = 1e-4
    warmup_ratio: float = 0.015
    weight_decay: float = 0.0
    max_grad_norm: float = 0.5
    seed: int = 0
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr", "max_grad_norm", "log_every"):
            _require_positive(f"train.{name}", getattr(self, name))
        if not 0 <= self.warmup_ratio < 1:
            raise ConfigError(f"train.warmup_ratio is {self.warmup_ratio}, but must be at least 0 and below 1.")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept of the run; the end of each epoch always is.

    Args:
        every_steps: Steps between checkpoints within an epoch; null for none.
        save_consolidated: Also write the draft as one `model.safetensors` in each checkpoint.
        restore_from: `LATEST`, a checkpoint's name, or a path, to go on from; null to start afresh.
    """

    every_steps: int | None = None
    save_consolidated: bool = False
    restore_from: str | None = None

    def __post_init__(self) -> None:
        if self.every_steps is not None:
            _require_positive("checkpoint.every_steps", self.every_steps)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run.

    Args:
        out: Folder for all that the run writes.
        target: The model that the draft will propose tokens to.
        data: The conversations to train on.
        draft: The draft.
        unroll: How far the draft is trained on its own states.
        train: The optimization.
        checkpoint: What is kept of the run.
    """

    out: str
    target: TargetConfig
    data: DataConfig
    draft: DraftConfig = field(default_factory=DraftConfig)
    unroll: UnrollConfig = field(default_factory=UnrollConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


def _require_positive(name: str, value: float, demand: str = "must be above 0") -> None:
    if value <= 0:
        raise ConfigError(f"{name} is too small: it {demand}.")
