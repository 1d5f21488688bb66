"""The training steps that benchmarks measure: sizes of targets and drafts, batches, and which tokens are supervised."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eagle3.speed import StepSizes


@dataclass(frozen=True)
class Model:
    """Sizes of a target and its draft."""

    hidden: int
    intermediate: int
    heads: tuple[int, int]
    head_dim: int
    vocab: int
    draft_vocab: int


@dataclass(frozen=True)
class Work:
    """One line of the table."""

    model: str
    sequences: int
    tokens: int
    steps: int
    supervised: float = 0.6
    mean_span: int = 400
    mean_document: int | None = None

    @property
    def name(self) -> str:
        """What the table calls it."""
        if self.mean_document is not None:
            return f"{self.model} packed {self.tokens}, {self.steps} steps"
        share = "" if self.supervised == 0.6 else f", {self.supervised:.0%} supervised"
        return f"{self.model} {self.sequences}x{self.tokens}, {self.steps} steps{share}"


MODELS = {
    "W8B": Model(4096, 14336, (32, 8), 128, 128256, 32000),
    "W1B": Model(2048, 8192, (32, 8), 64, 128256, 8192),
    "tiny": Model(64, 128, (4, 2), 16, 512, 128),
}
WORKS = [
    Work("W8B", 1, 2048, 7),
    Work("W8B", 1, 4096, 7),
    Work("W8B", 4, 2048, 7),
    Work("W8B", 1, 8192, 7, mean_document=1000),
    Work("W8B", 1, 2048, 7, supervised=1.0),
    Work("W8B", 4, 2048, 7, supervised=1.0),
    Work("W1B", 4, 2048, 7),
    Work("W1B", 4, 2048, 2),
    Work("W1B", 8, 256, 7, mean_span=100),
    Work("W1B", 8, 256, 2, mean_span=100),
    Work("tiny", 2, 64, 3, mean_span=10),
    Work("tiny", 1, 256, 3, mean_span=10, mean_document=40),
]


def spans(work: Work) -> Tensor:
    """A mask (sequences, tokens) whose supervised tokens stand in spans, as answers do; within 0.5% of the share."""
    total = work.sequences * work.tokens
    gap = work.mean_span * (1 - work.supervised) / work.supervised
    for seed in range(10_000):
        generator = torch.Generator().manual_seed(seed)
        mask, place = torch.full((total,), work.supervised == 1), 0
        while gap and place < total:
            draw = -torch.rand(2, generator=generator).log()
            place += round(float(draw[0]) * gap)
            mask[place : place + round(float(draw[1]) * work.mean_span)] = True
            place += round(float(draw[1]) * work.mean_span)
        if abs(mask.float().mean() - work.supervised) < 0.005:
            return mask.view(work.sequences, work.tokens)
    raise AssertionError("no seed gives this share")


def documents(work: Work) -> Tensor | None:
    """Which document each token of a packed row belongs to, lengths drawn like those of answers."""
    if work.mean_document is None:
        return None
    generator = torch.Generator().manual_seed(1)
    # Half of each mean is fixed: a document holds a prompt and an answer.
    lengths = work.mean_document * (0.5 - 0.5 * torch.rand(work.tokens, generator=generator).log())
    ends = lengths.long().cumsum(0)
    return torch.bucketize(torch.arange(work.tokens), ends, right=True).expand(work.sequences, -1).contiguous()


def sizes_of_work(work: Work) -> StepSizes:
    """What one step of a line multiplies, as `eagle3 estimate` counts it."""
    model, num_tokens = MODELS[work.model], work.sequences * work.tokens
    num_teachers = work.supervised * num_tokens
    rows = num_teachers + (work.steps - 1) * num_teachers / work.mean_span
    return StepSizes(
        num_tokens=num_tokens,
        visible=work.mean_document or work.tokens,
        num_rows=min(num_tokens, round(rows)),
        num_teachers=round(num_teachers),
        num_pairs=round(work.steps * num_teachers),
        num_steps=work.steps,
        hidden=model.hidden,
        intermediate=model.intermediate,
        queries=model.heads[0] * model.head_dim,
        keys=model.heads[1] * model.head_dim,
        target_hidden=model.hidden,
        vocab=model.vocab,
        draft_vocab=model.draft_vocab,
    )
