"""Small models for the tests, each with one way in which names are tied, or are not."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tiepolicy.testing import FlaggedPair as FlaggedPair


class TiedPair(nn.Module):
    """An embedding and a head that are one parameter, or not."""

    def __init__(self, *, tied: bool = True, vocab_size: int = 12, hidden_size: int = 4) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.embed_tokens(ids))


class HeadFirst(TiedPair):
    """The same with the modules registered the other way round."""

    def __init__(self, *, tied: bool = True, vocab_size: int = 12, hidden_size: int = 4) -> None:
        super().__init__(tied=tied, vocab_size=vocab_size, hidden_size=hidden_size)
        embed_tokens, lm_head = self.embed_tokens, self.lm_head
        del self.embed_tokens, self.lm_head
        self.lm_head, self.embed_tokens = lm_head, embed_tokens


def tiny_llama(
    *, tie_word_embeddings: bool, vocab_size: int = 96, hidden_size: int = 16, num_layers: int = 1
) -> LlamaForCausalLM:
    """A transformers model of few layers."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        tie_word_embeddings=tie_word_embeddings,
    )
    return LlamaForCausalLM(config)


def train_steps(model: nn.Module, optimizer: torch.optim.Optimizer, *, num_steps: int, seed: int = 0) -> list[float]:
    """Optimize a `TiedPair` a few steps on fixed random ids; the losses."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(num_steps):
        ids = torch.randint(0, model.embed_tokens.num_embeddings, (6,), generator=generator)
        ids = ids.to(next(model.parameters()).device)
        loss = nn.functional.cross_entropy(model(ids), ids.roll(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
