"""Targets for the tests of the trainer, made once and saved by transformers."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from eagle3.config import DataConfig, DraftConfig, RunConfig, TargetConfig, TrainConfig, UnrollConfig
from eagle3.embedded import write_embedded_conversations, write_embedded_target
from eagle3.parallel import Ranks
from eagle3.trainer import train


def make_world(folder: Path, *, num_conversations: int) -> tuple[Path, Path]:
    """A tokenizer and conversations for it: their two paths."""
    conversations, tokenizer = folder / "conversations.jsonl", folder / "tokenizer"
    write_embedded_conversations(conversations, num_conversations=num_conversations, seed=0)
    write_embedded_target(tokenizer, conversations, seed=0, num_steps=1, vocab_size=512, max_length=64)
    return tokenizer, conversations


def make_target(
    folder: Path, tokenizer: Path, *, vocab_size: int, tie_word_embeddings: bool, hidden_size: int = 32
) -> Path:
    """A Llama of four narrow layers with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def make_run(out: Path, target: Path, conversations: Path, *, draft: DraftConfig, **settings) -> RunConfig:
    """A finished run of one epoch over what there is, in this process; its settings."""
    config = RunConfig(
        out=str(out),
        target=TargetConfig(model=str(target)),
        data=DataConfig(train=str(conversations), max_length=48),
        draft=draft,
        unroll=UnrollConfig(steps=3),
        **({"train": TrainConfig(epochs=1, batch_size=4, lr=1e-2)} | settings),
    )
    train(config, Ranks(rank=0, world_size=1, device=torch.device("cpu")))
    return config
