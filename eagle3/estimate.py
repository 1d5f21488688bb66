"""Step 42: what a run will take, from its settings and the target's config alone: nothing is loaded."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table

from eagle3.blueprint import draft_config, read_draft_config
from eagle3.cache import bytes_per_token
from eagle3.commands import DeviceName, EstimateConfig
from eagle3.config import RunConfig
from eagle3.conversations import count_conversations
from eagle3.description import TargetDescription, choose_layers, describe_target, model_class
from eagle3.draft import Draft
from eagle3.forecast import Forecast
from eagle3.inputs import asked_layers, known_data
from eagle3.speed import ASSUMED, ATTENTION, DEVICES, FP8, PRODUCTS, Supervision
from eagle3.terminal import say, show, waiting
from eagle3.vocab import choose_draft_vocab, count_supervised, forced_ids
from tiepolicy import format_bytes

# Of English text; other languages and code have fewer.
_BYTES_PER_TOKEN = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DataEstimate:
    """The data of a run.

    Attributes:
        is_counted: Whether tokens were counted by an earlier command; if not, they follow from the size of the file.
        num_conversations: That can be trained on, or lines of the file.
        num_tokens: Of one epoch.
        supervision: How many of them the assistant wrote.
        num_rows: Of one epoch.
        coverage: Share of the supervised tokens that the draft vocabulary holds; None if they were not counted.
    """

    is_counted: bool
    num_conversations: int
    num_tokens: int
    supervision: Supervision
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
        step_seconds: Of an optimizer step all of whose rows are full.
        run_seconds: Of all steps, at the mean length of rows; None if there is no data yet.
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
    step_seconds: float
    run_seconds: float | None


def estimate(config: RunConfig, *, num_processes: int, device: DeviceName = "h200") -> Estimate:
    """Computes what a run will take.

    Args:
        config: Of the run. Of its files only the target's `config.json` and `tokenizer.json`, the size of the data, and
            tokens that an earlier command has kept are read.
        num_processes: How many train together.
        device: Kind of the devices.

    Returns:
        Memory and time, with what they are made of.

    Raises:
        TargetError: The target's config cannot be read, or it is too shallow.
        ConfigError: Settings do not fit the target.
        DraftError: No draft can be built for it.
    """
    description = describe_target(config.target.model)
    layers = choose_layers(description.config.num_hidden_layers, asked_layers(config))
    options = config.draft
    vocab_size = options.vocab_size or description.vocab_size
    with torch.device("meta"):
        draft = Draft(
            draft_config(description.config, draft_vocab_size=vocab_size, options=options)
            if options.init_from is None
            else read_draft_config(Path(options.init_from))
        )
        target = model_class(description.whole_config).from_config(description.whole_config)
    forecast = Forecast(config, draft, target, num_processes=num_processes)
    trainable = forecast.num_weights
    data = _estimate_data(config, description)
    supervision = ASSUMED if data is None else data.supervision
    num_steps = None if data is None else _num_steps(config, data, num_processes)
    run_seconds = None
    if data is not None and num_steps is not None:
        mean_length = max(2, min(config.data.max_length, round(data.num_tokens / data.num_rows)))
        run_seconds = num_steps * forecast.seconds(DEVICES[device], supervision, row_length=mean_length)
    per_token = bytes_per_token(description.hidden_size, config.target.dtype)
    return Estimate(
        target_parameters=sum(parameter.numel() for parameter in target.parameters()),
        trainable_parameters=trainable,
        frozen_parameters=sum(parameter.numel() for parameter in draft.parameters()) - trainable,
        target_layers=layers,
        memory=forecast.memory(supervision),
        checkpoint_bytes=_checkpoint_bytes(
            draft, trainable=trainable, consolidated=config.checkpoint.save_consolidated
        ),
        cache_bytes=None if data is None else data.num_tokens * per_token,
        data=data,
        num_steps=num_steps,
        step_seconds=forecast.seconds(DEVICES[device], supervision, row_length=config.data.max_length),
        run_seconds=run_seconds,
    )


def print_estimate(config: EstimateConfig) -> None:
    """Prints what a run will take, as a table or as JSON.

    Raises:
        Eagle3Error: As for `estimate`.
    """
    with waiting("Estimating"):
        result = estimate(config, num_processes=config.processes, device=config.device)
    if config.json:
        given = {"processes": config.processes, "device": DEVICES[config.device].name}
        assumes = list(_assumptions(config, result))
        entry = {**asdict(result), "memory_total": sum(result.memory.values()), **given, "assumes": assumes}
        say(json.dumps(entry, indent=2) + "\n")
        return
    table = Table(title=f"eagle3 estimate: {config.target.model}", show_header=False)
    table.add_column(ratio=1, overflow="fold")
    table.add_column(ratio=2, overflow="fold")
    for section in _sections(config, result):
        for name, value in section:
            table.add_row(name, value)
        table.add_section()
    show(table)


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
    run = "unknown" if result.run_seconds is None else f"{_about(result)}{_duration(result.run_seconds)}"
    yield [
        (f"time per step, {DEVICES[config.device].name}", f"{1e3 * result.step_seconds:.3g} ms, all rows full"),
        ("time of the run", run),
    ]
    cache = "unknown" if result.cache_bytes is None else f"{_about(result)}{format_bytes(result.cache_bytes)}"
    yield [("disk per checkpoint", format_bytes(result.checkpoint_bytes)), ("disk for a cache of states", cache)]
    yield [("assumes", "\n".join(_assumptions(config, result)))]


def _data_rows(config: RunConfig, result: Estimate) -> Iterator[tuple[str, str]]:
    data = result.data
    if data is None:
        yield "data", f"{config.data.train} is not there yet, so tokens and steps are unknown"
        return
    about = _about(result)
    shares = f", {data.supervision.share:.1%} of them supervised" if data.supervision.is_counted else ""
    yield "conversations", f"{data.num_conversations:,}"
    yield "tokens per epoch", f"{about}{data.num_tokens:,}{shares}"
    yield (
        "optimizer steps",
        f"{about}{result.num_steps:,} in {config.train.epochs} epoch{'s' if config.train.epochs > 1 else ''}",
    )
    if data.coverage is None:
        yield "coverage of the draft vocabulary", "unknown until `eagle3 vocab` has counted the tokens"
    else:
        yield "coverage of the draft vocabulary", f"{data.coverage:.2%} of what the assistant wrote"


def _assumptions(config: EstimateConfig, result: Estimate) -> Iterator[str]:
    """What the numbers for memory and time rest on, a sentence each."""
    supervision = ASSUMED if result.data is None else result.data.supervision
    source = "counted" if supervision.is_counted else "a guess until `eagle3 vocab` has counted the tokens"
    yield f"{supervision.share:.0%} of the tokens supervised, in spans of {supervision.mean_span:.0f} ({source})."
    device = DEVICES[config.device]
    source = "as measured" if device.is_measured else "as measured on an NVIDIA H200"
    yield f"{PRODUCTS:.0%} of the peak in products and {ATTENTION:.0%} in attention ({source})."
    if config.train.fp8:
        yield f"Products in FP8 {FP8:g} times as fast as in bfloat16 ({source})."
    yield "Memory is what torch allocates at most; CUDA and its libraries take up to 1 GB beside it."
    yield "Left out of the time: data, exchange between devices, validation, checkpoints."


def _duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    for unit, length in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def _about(result: Estimate) -> str:
    return "" if result.data is not None and result.data.is_counted else "about "


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
            supervision=ASSUMED,
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
        supervision=Supervision.of(data),
        num_rows=data.num_rows,
        coverage=choose_draft_vocab(counts_V, size=config.draft.vocab_size, forced_ids=forced).coverage
        if config.draft.init_from is None
        else None,
    )


def _num_steps(config: RunConfig, data: DataEstimate, num_processes: int) -> int:
    """As the trainer counts: batches in which every row comes once, and every epoch ends with a whole step."""
    num_batches = -(-data.num_rows // (config.train.batch_size * num_processes))
    return config.train.epochs * -(-num_batches // config.train.accumulate)
