"""Small runs of the trainer, and what they left in their folders."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import tiepolicy_dcp
from eagle3.blueprint import read_draft_config
from eagle3.config import (
    CheckpointConfig,
    DataConfig,
    DraftConfig,
    LogConfig,
    ParallelConfig,
    RunConfig,
    TargetConfig,
    TrainConfig,
    UnrollConfig,
    read_run_config,
)
from eagle3.draft import Draft
from eagle3.parallel import Ranks
from eagle3_targets import make_target, make_world

ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


def make_run_world(folder, *, num_conversations=10):
    """A tied target and conversations for it: their paths."""
    tokenizer, conversations = make_world(folder, num_conversations=num_conversations)
    return make_target(folder / "target", tokenizer, vocab_size=600, tie_word_embeddings=True), conversations


def config_of(
    world,
    out,
    *,
    draft_vocab_size=96,
    epochs=2,
    log_every=1,
    batch_size=2,
    lr=1e-2,
    init_from=None,
    validation=None,
    train=None,
    unroll=None,
    kind="data",
    shard_size=None,
    dtype="float32",
    tensorboard=False,
    **checkpoint,
):
    """Ten conversations of 48 tokens, three steps of the unroll, and whatever a test is about."""
    return RunConfig(
        out=str(out),
        target=TargetConfig(model=str(world[0]), dtype=dtype),
        data=DataConfig(train=str(world[1]), validation=None if validation is None else str(validation), max_length=48),
        draft=DraftConfig(vocab_size=draft_vocab_size, init_from=None if init_from is None else str(init_from)),
        unroll=UnrollConfig(steps=3, **(unroll or {})),
        train=TrainConfig(epochs=epochs, batch_size=batch_size, lr=lr, log_every=log_every, **(train or {})),
        parallel=ParallelConfig(kind=kind, shard_size=shard_size),
        log=LogConfig(tensorboard=tensorboard),
        checkpoint=CheckpointConfig(**checkpoint),
    )


def metrics_of(out, name="metrics.jsonl"):
    """The lines of a run, without what depends on the machine."""
    entries = [json.loads(line) for line in (Path(out) / name).read_text().splitlines()]
    assert all(entry.pop("tokens_per_second", 1.0) > 0 for entry in entries)
    return entries


def weights_of(out, name):
    """All tensors of a draft, from a checkpoint of its run and from its target."""
    return draft_of(out, name).state_dict()


def draft_of(out, name):
    """The draft of a checkpoint, beside an embedding that transformers has loaded."""
    config, draft = read_run_config(out).target, Draft(read_draft_config(Path(out)))
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=getattr(torch, config.dtype))
    embedding = model.requires_grad_(False).get_input_embeddings().weight
    draft.share_embedding_(embedding)
    external = {"target": {"embed_tokens.weight": embedding}}
    tiepolicy_dcp.load(Path(out) / "checkpoints" / name, model=draft, external=external)
    return draft
