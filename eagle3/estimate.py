"""Step 42: what a run will take, from its settings and the target's config alone: nothing is loaded.

Memory follows from formulas, so it is an estimate: what a library keeps for itself is left out, and every token counts
as supervised, which few are.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from eagle3.cache import bytes_per_token
from eagle3.config import RunConfig
from eagle3.conversations import count_conversations
from eagle3.description import TargetDescription, choose_layers, describe_target, model_class
from eagle3.draft import Draft, draft_config
from eagle3.errors import ConfigError
from eagle3.inputs import asked_layers, known_data
from eagle3.vocab import choose_draft_vocab, count_supervised, forced_ids
from tiepolicy import format_bytes

# Of English text; other languages and code have fewer.
_BYTES_PER_TOKEN = 4.0
_CONSOLE_WIDTH = 100
_HEAD_CHUNK = 2048
_TEACHER_CHUNK = 1024


@dataclass(frozen=True, kw_only=True)
class EstimateConfig(RunConfig):
    """A run, and how it would be started.

    Args:
        processes: How many processes train together, one per device.
        json: Print JSON in place of a table.
    """

    processes: int = 1
    json: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.processes < 1:
            raise ConfigError(f"processes is {self.processes}, but must be at least 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataEstimate:
    """The data of a run.

    Attributes:
        is_counted: Whether tokens were counted by an earlier command; if not, they follow from the size of the file.
        num_conversations: That can be trained on, or lines of the file.
        num_tokens: Of one epoch.
        supervised_share: Of them, 0 to 1; None if they were not counted.
        num_rows: Of one epoch.
        coverage: Share of the supervised tokens that the draft vocabulary holds; None if they were not counted.
    """

    is_counted: bool
    num_conversations: int
    num_tokens: int
    supervised_share: float | None
    num_rows: int
    coverage: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run will take. Memory is of one device, in bytes.

    Attributes:
        target_parameters: The target's, a tied tensor counted once.
        trainable_parameters: The draft's.
        frozen_parameters: The draft's; its embedding, which is the target's own where the widths agree.
        target_layers: The captured layers, an id k meaning the input of layer k.
        memory: Bytes of a device, by what they are for.
        checkpoint_bytes: On disk, each.
        cache_bytes: On disk for the states of one epoch's tokens; None if there is no data yet.
        data: None if the file is not there yet.
        num_steps: Of the whole run; None if there is no data yet.
    """

    target_parameters: int
    trainable_parameters: int
    frozen_parameters: int
    target_layers: tuple[int, int, int]
    memory: dict[str, int]
    checkpoint_bytes: int
    cache_bytes: int | None
    data: DataEstimate | None
    num_steps: int | None


def estimate(config: RunConfig, *, num_processes: int) -> Estimate:
    """Computes what a run will take.

    Args:
        config: Of the run. Of its files only the target's `config.json` and `tokenizer.json`, the size of the data, and
            tokens that an earlier command has kept are read.
        num_processes: How many train together.

    Raises:
        TargetError: The target's config cannot be read, or it is too shallow.
        ConfigError: Settings do not fit the target.
        DraftError: No draft can be built for it.
    """
    description = describe_target(config.target.model)
    layers = choose_layers(description.config.num_hidden_layers, asked_layers(config))
    vocab_size = config.draft.vocab_size or description.vocab_size
    if vocab_size > description.vocab_size:
        raise ConfigError(
            f"draft.vocab_size is {vocab_size}, but the target's vocabulary has only {description.vocab_size} tokens."
        )
    with torch.device("meta"):
        draft = Draft(draft_config(description.config, draft_vocab_size=vocab_size, options=config.draft))
        target = model_class(description.whole_config).from_config(description.whole_config)
    trainable = _num_elements(draft, requires_grad=True)
    data = _estimate_data(config, description)
    per_token = bytes_per_token(description.hidden_size, config.target.dtype)
    return Estimate(
        target_parameters=sum(parameter.numel() for parameter in target.parameters()),
        trainable_parameters=trainable,
        frozen_parameters=_num_elements(draft, requires_grad=False),
        target_layers=layers,
        memory=_memory(config, draft, target, num_processes=num_processes),
        checkpoint_bytes=_checkpoint_bytes(
            draft, trainable=trainable, consolidated=config.checkpoint.save_consolidated
        ),
        cache_bytes=None if data is None else data.num_tokens * per_token,
        data=data,
        num_steps=None if data is None else _num_steps(config, data, num_processes),
    )


def print_estimate(config: EstimateConfig) -> None:
    """Prints what a run will take, as a table or as JSON.

    Raises:
        Eagle3Error: As for `estimate`.
    """
    result = estimate(config, num_processes=config.processes)
    console = Console(width=_CONSOLE_WIDTH)
    if config.json:
        entry = {**asdict(result), "memory_total": sum(result.memory.values()), "processes": config.processes}
        console.print_json(json.dumps(entry))
        return
    table = Table(title=f"eagle3 estimate: {config.target.model}", show_header=False, width=_CONSOLE_WIDTH)
    table.add_column(ratio=1, overflow="fold")
    table.add_column(ratio=2, overflow="fold")
    for section in _sections(config, result):
        for name, value in section:
            table.add_row(name, value)
        table.add_section()
    console.print(table)


def _sections(config: EstimateConfig, result: Estimate) -> Iterator[list[tuple[str, str]]]:
    yield [
        ("parameters of the target", f"{result.target_parameters:,} (frozen)"),
        ("parameters of the draft", f"{result.trainable_parameters:,} trainable, {result.frozen_parameters:,} frozen"),
        ("layers whose input is captured", ", ".join(map(str, result.target_layers))),
    ]
    devices = "device" if config.processes == 1 else f"of {config.processes} devices"
    yield [
        *((name, format_bytes(size)) for name, size in result.memory.items()),
        (f"memory, each {devices}" if config.processes > 1 else "memory", format_bytes(sum(result.memory.values()))),
    ]
    yield list(_data_rows(config, result))
    cache = "unknown" if result.cache_bytes is None else f"{_about(result)}{format_bytes(result.cache_bytes)}"
    yield [("disk per checkpoint", format_bytes(result.checkpoint_bytes)), ("disk for a cache of states", cache)]


def _data_rows(config: RunConfig, result: Estimate) -> Iterator[tuple[str, str]]:
    data = result.data
    if data is None:
        yield "data", f"{config.data.train} is not there yet, so tokens and steps are unknown"
        return
    about = _about(result)
    shares = "" if data.supervised_share is None else f", {data.supervised_share:.1%} of them supervised"
    yield "conversations", f"{data.num_conversations:,}"
    yield "tokens per epoch", f"{about}{data.num_tokens:,}{shares}"
    yield "optimizer steps", f"{about}{result.num_steps:,} in {config.train.epochs} epochs"
    if data.coverage is None:
        yield "coverage of the draft vocabulary", "unknown until `eagle3 vocab` has counted the tokens"
    else:
        yield "coverage of the draft vocabulary", f"{data.coverage:.2%} of what the assistant wrote"


def _about(result: Estimate) -> str:
    return "" if result.data is not None and result.data.is_counted else "about "


def _num_elements(draft: Draft, *, requires_grad: bool) -> int:
    return sum(parameter.numel() for parameter in draft.parameters() if parameter.requires_grad == requires_grad)


def _memory(config: RunConfig, draft: Draft, target: PreTrainedModel, *, num_processes: int) -> dict[str, int]:
    """Bytes of one device, by what they are for; draft and target on the meta device."""
    compute = 4 if config.train.precision == "float32" else 2
    target_bytes = 2 if config.target.dtype == "bfloat16" else 4
    trainable = _num_elements(draft, requires_grad=True)
    shared_by = {"data": 1, "shard": num_processes, "hybrid": config.parallel.shard_size or num_processes}
    own = -(-trainable // shared_by[config.parallel.kind])
    embedding: Any = target.get_input_embeddings()
    head: Any = target.get_output_embeddings()
    vocab, width = embedding.weight.shape
    # Of a target whose states come from disk only these two are there, or one that is both.
    tables = {id(table.weight): table.weight.numel() for table in (embedding, head)}
    loaded = target.parameters() if config.target.cache is None else ()
    num_target = sum(parameter.numel() for parameter in loaded) or sum(tables.values())
    num_tokens = config.train.batch_size * config.data.max_length
    return {
        "weights of the target": target_bytes * num_target,
        "embedding of the draft": 0
        if draft.config.hidden_size == width
        else 4 * _num_elements(draft, requires_grad=False),
        "master weights (float32)": 4 * own,
        "weights to compute with": compute * trainable if compute < 4 else 0,
        "gradients (float32)": 4 * own,
        "moments of AdamW (float32)": 8 * own,
        "states of the target": num_tokens * 4 * width * target_bytes,
        "activations of the draft": num_tokens * _activation_elements(draft, config.unroll.steps) * compute,
        "logits, a chunk at a time": _logit_bytes(draft, vocab, num_tokens, target_bytes),
    }


def _activation_elements(draft: Draft, num_steps: int) -> int:
    """Elements that one token keeps for the backward pass over all steps."""
    config = draft.config
    head_dim, num_kv_heads = config.head_dim, config.num_key_value_heads
    assert head_dim is not None
    assert num_kv_heads is not None
    attention = 2 * (config.num_attention_heads + num_kv_heads) * head_dim
    # Both normed halves of the input, four states between norms and sums, and three times the MLP's width.
    per_step: int = 6 * config.hidden_size + attention + 3 * config.intermediate_size
    return num_steps * per_step


def _logit_bytes(draft: Draft, vocab_size: int, num_tokens: int, target_bytes: int) -> int:
    draft_vocab_size: int = draft.config.draft_vocab_size
    loss = 3 * 4 * _HEAD_CHUNK * draft_vocab_size
    teacher = target_bytes * (num_tokens * draft_vocab_size + _TEACHER_CHUNK * vocab_size)
    return loss + teacher


def _checkpoint_bytes(draft: Draft, *, trainable: int, consolidated: bool) -> int:
    # A frozen parameter is the target's embedding, which a checkpoint leaves to the target.
    left_out = {name for name, parameter in draft.named_parameters() if not parameter.requires_grad}
    kept: int = sum(
        tensor.numel() * tensor.element_size() for name, tensor in draft.state_dict().items() if name not in left_out
    )
    return kept * (2 if consolidated else 1) + 8 * trainable


def _estimate_data(config: RunConfig, description: TargetDescription) -> DataEstimate | None:
    if not Path(config.data.train).exists():
        return None
    known = known_data(config)
    if known is None:
        num_bytes, num_conversations = Path(config.data.train).stat().st_size, count_conversations(config.data.train)
        num_tokens = min(int(num_bytes / _BYTES_PER_TOKEN), num_conversations * config.data.max_length)
        packed = -(-num_tokens // config.data.max_length)
        return DataEstimate(
            is_counted=False,
            num_conversations=num_conversations,
            num_tokens=num_tokens,
            supervised_share=None,
            num_rows=packed if config.data.packing else num_conversations,
            coverage=None,
        )
    data, tokenizer = known
    counts_V = count_supervised(data.examples, description.vocab_size)
    forced = forced_ids(tokenizer, counts_V, end_ids=description.end_ids)
    return DataEstimate(
        is_counted=True,
        num_conversations=len(data.examples),
        num_tokens=data.num_tokens,
        supervised_share=data.num_supervised / data.num_tokens,
        num_rows=data.num_rows,
        coverage=choose_draft_vocab(counts_V, size=config.draft.vocab_size, forced_ids=forced).coverage,
    )


def _num_steps(config: RunConfig, data: DataEstimate, num_processes: int) -> int:
    """As the trainer counts: batches in which every row comes once, and every epoch ends with a whole step."""
    num_batches = -(-data.num_rows // (config.train.batch_size * num_processes))
    return config.train.epochs * -(-num_batches // config.train.accumulate)
