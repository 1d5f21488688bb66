"""Step 2: settings of a run: one frozen tree, typed, checked when it is built, read from YAML and dotted options."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from eagle3.errors import ConfigError
from eagle3.files import reason, write_in_run

#: The settings of a run, in its folder.
RUN_CONFIG = "run_config.json"

S = TypeVar("S")


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """The model that the draft will propose tokens to.

    Args:
        model: Folder of a transformers causal language model with its tokenizer.
        dtype: Of its weights and states.
        layers: Three layers whose states the draft reads, ascending; null for a low, a middle and a high one.
        layers_name: What an id of `layers` stands for: `inputs`, as in vLLM, speculators and transformers'
            `hidden_states`, or `outputs`, as in SGLang and SpecForge, whose ids are one lower for the same states.
        cache: Folder that `eagle3 cache` fills with the target's states and `eagle3 train` reads them from; null to
            run the target in each step.
    """

    model: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    layers: tuple[int, int, int] | None = None
    layers_name: Literal["inputs", "outputs"] = "inputs"
    cache: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The conversations to train on.

    Args:
        train: JSONL or Parquet file; each line has `messages`, or ShareGPT `conversations`.
        validation: File of the same kind whose conversations are only measured; null for none.
        max_length: In tokens; what is longer loses its end.
        packing: Put short conversations side by side into rows of `max_length` tokens; `train.batch_size` then counts
            rows. Conversations in one row do not see each other.
        num_workers: Processes that prepare batches ahead of each training process; 0 to prepare them in it.
        cache: Folder that keeps tokenized conversations for other runs; null for one in the run's own folder.
    """

    train: str
    validation: str | None = None
    max_length: int = 2048
    packing: bool = False
    num_workers: int = 0
    cache: str | None = None

    def __post_init__(self) -> None:
        _require(self.max_length >= 2, "data.max_length", self.max_length, "at least 2")
        _require(self.num_workers >= 0, "data.num_workers", self.num_workers, "at least 0")


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """The draft; its heads and rope are the target's.

    Args:
        init_from: Draft to start from: a folder that engines load, a run, or a checkpoint of one. Settings at their
            defaults follow it, others must agree. Null for a new one.
        vocab_size: Tokens that it can propose, the most frequent of the data; null for all of the target's.
        min_coverage: Smallest share of the assistant's tokens that this vocabulary must hold. The draft can never
            propose the others, so a small share is a wrong setting more often than a choice.
        hidden_size: Its width; null for the target's. Of another width it has an embedding of its own to train.
        intermediate_size: Width inside its MLP; null for the target's.
        norm_before_residual: Whether the residual stream starts from the normed state; SGLang serves no such draft.
        fc_norm: Whether each captured state is normed before the three are fused (EAGLE-3.1).
        norm_before_fc: Whether the three captured states are normed together instead.
        norm_output: Whether a step hands on its normed state (EAGLE-3.1).
    """

    init_from: str | None = None
    vocab_size: int | None = 32000
    min_coverage: float = 0.5
    hidden_size: int | None = None
    intermediate_size: int | None = None
    norm_before_residual: bool = False
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_output: bool = False

    def __post_init__(self) -> None:
        _require_positive("draft", self, "vocab_size", "hidden_size", "intermediate_size")
        _require(0 <= self.min_coverage <= 1, "draft.min_coverage", self.min_coverage, "from 0 to 1")
        if self.fc_norm and self.norm_before_fc:
            raise ConfigError(
                "draft.fc_norm and draft.norm_before_fc are both set, but each norms what the other does: one norms "
                "the captured states one by one, the other all together. Set one of them."
            )


@dataclass(frozen=True, kw_only=True)
class UnrollConfig:
    """How far the draft is trained on its own states.

    Args:
        steps: Tokens it proposes in a row.
        decay: Weight of each step's loss over that of the step before.
        loss: What is minimized: `soft_cross_entropy` against the target's distribution over the draft's vocabulary, or
            a loss of the acceptance rate itself (arXiv 2602.23881): `lk_alpha`, its negative logarithm, or `lk_lambda`,
            its complement mixed with the divergence.
        lk_decay: Of `lk_lambda`: how fast the divergence loses weight as the acceptance rate grows.
    """

    steps: int = 7
    decay: float = 0.8
    loss: Literal["soft_cross_entropy", "lk_alpha", "lk_lambda"] = "soft_cross_entropy"
    lk_decay: float = 3.0

    def __post_init__(self) -> None:
        _require_positive("unroll", self, "steps", "decay", "lk_decay")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimization.

    Args:
        epochs: Passes over the data.
        batch_size: Conversations per process that are in memory together.
        accumulate: Such batches per process and optimizer step. The step's loss is one mean over all of them.
        lr: Peak learning rate of AdamW.
        warmup_ratio: Share of the steps in which the learning rate rises to its peak; then it falls as a cosine to 0.
        weight_decay: Of AdamW; the weights of norms have none.
        max_grad_norm: Longer gradients are shortened to it.
        precision: In which the draft computes; weights, gradients and optimizer are always float32. Null for bfloat16
            on a GPU and float32 on the CPU.
        fp8: Multiply in the MLP and the head with 8-bit numbers, faster and rounded more coarsely; for the fused step
            on a GPU that has them. The CPU imitates them, slowly.
        step: How the draft's step is computed: `fused`, by kernels of its own, or `autograd`, which knows every option
            of the draft. Null for the fused one on a GPU, where the options allow it.
        validate_every: Steps between looks at `data.validation`, beside one before each checkpoint; null for none.
        deterministic: Use only operations that give the same bits each time; slower on a GPU.
        seed: Of the draft's first weights and the order of the data.
        log_every: Steps between log lines.
    """

    epochs: int = 1
    batch_size: int = 1
    accumulate: int = 1
    lr: float = 1e-4
    warmup_ratio: float = 0.015
    weight_decay: float = 0.0
    max_grad_norm: float = 0.5
    precision: Literal["float32", "bfloat16"] | None = None
    fp8: bool = False
    step: Literal["fused", "autograd"] | None = None
    validate_every: int | None = None
    deterministic: bool = False
    seed: int = 0
    log_every: int = 10

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "accumulate", "lr", "max_grad_norm", "validate_every", "log_every")
        _require_positive("train", self, *positive)
        _require(0 <= self.warmup_ratio < 1, "train.warmup_ratio", self.warmup_ratio, "at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the processes that torchrun starts share the work; alone, a process needs none of it.

    Args:
        kind: `data`: each process holds the whole draft (DDP). `shard`: each holds a part of its weights, gradients and
            optimizer (FSDP2). `hybrid`: groups of `shard_size` processes shard it, and each group holds the whole.
        shard_size: Processes of a group of `hybrid`; null for those of one machine.
    """

    kind: Literal["data", "shard", "hybrid"] = "data"
    shard_size: int | None = None

    def __post_init__(self) -> None:
        _require_positive("parallel", self, "shard_size")
        if self.shard_size is not None and self.kind != "hybrid":
            raise ConfigError(
                f"parallel.shard_size is {self.shard_size}, but parallel.kind is {self.kind}: only hybrid has groups. "
                "Leave out the one, or set the other to hybrid."
            )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where numbers go, beside `metrics.jsonl` and the log lines.

    Args:
        tensorboard: Also write them to `tensorboard/` of the run.
        wandb: Project of Weights & Biases to send them to; needs its package and account. Null for none.
    """

    tensorboard: bool = True
    wandb: str | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept of the run; the end of each epoch always is.

    Args:
        every_steps: Steps between checkpoints within an epoch; null for none.
        keep_last: Newest checkpoints that are kept; null for all.
        keep_best: Checkpoints with the longest accept length on `data.validation` that are kept as well; null for none.
        save_consolidated: Also write the draft as one `model.safetensors` in each checkpoint.
        on_error: What to do when a checkpoint cannot be written, as on a full disk, and the run is not at its end:
            `stop`, or warn and `continue` until the next one is due. Those before stay whole either way.
        async_save: Go on training while a checkpoint is written; takes room for a copy of it in memory.
        restore_from: `LATEST`, `BEST`, a checkpoint's name, or a path, to go on from; null to start afresh.
    """

    every_steps: int | None = None
    keep_last: int | None = None
    keep_best: int | None = None
    save_consolidated: bool = False
    on_error: Literal["stop", "continue"] = "stop"
    async_save: bool = False
    restore_from: str | None = None

    def __post_init__(self) -> None:
        _require_positive("checkpoint", self, "every_steps", "keep_last", "keep_best")


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
        parallel: How processes share the work.
        log: Where numbers go.
        checkpoint: What is kept of the run.
    """

    out: str
    target: TargetConfig
    data: DataConfig
    draft: DraftConfig = field(default_factory=DraftConfig)
    unroll: UnrollConfig = field(default_factory=UnrollConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        for name, value in (
            ("train.validate_every", self.train.validate_every),
            ("checkpoint.keep_best", self.checkpoint.keep_best),
        ):
            if value is not None and self.data.validation is None:
                raise ConfigError(
                    f"{name} is {value}, but data.validation is not set, so there is nothing to measure. Set "
                    f"data.validation, or leave out {name}."
                )


def write_run_config(out: str | Path, config: RunConfig) -> None:
    """Keep the settings of a run in its folder.

    Raises:
        CheckpointError: They cannot be written.
    """
    write_in_run(Path(out) / RUN_CONFIG, json.dumps(asdict(config), indent=2) + "\n")


def read_run_config(out: str | Path) -> RunConfig:
    """The settings that a run was started with, from its folder.

    Args:
        out: The folder of the run.

    Raises:
        ConfigError: They are missing, or cannot be read.
    """
    path = Path(out) / RUN_CONFIG
    try:
        return _build(RunConfig, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"The settings of the run, {path}, cannot be read ({reason(error)}). Give the folder that a run was "
            "started with as its --out."
        ) from error


def _build(kind: type[S], values: Mapping[str, Any]) -> S:
    """A section and the sections in it; lists in JSON were tuples."""
    built: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for name, value in values.items():
        section = hints.get(name)
        if isinstance(section, type) and is_dataclass(section):
            built[name] = _build(section, value)
        else:
            built[name] = tuple(value) if isinstance(value, list) else value
    return kind(**built)


def _require_positive(section: str, settings: object, *names: str) -> None:
    """Refuses a number of a section that is not above 0; null is fine where it may stand."""
    for name in names:
        value = getattr(settings, name)
        may_be_null = type(None) in get_args(get_type_hints(type(settings))[name])
        _require(value is None or value > 0, f"{section}.{name}", value, "above 0" + " or null" * may_be_null)


def _require(is_met: bool, name: str, value: object, demand: str) -> None:
    if not is_met:
        raise ConfigError(f"{name} is {value}, but must be {demand}.")
