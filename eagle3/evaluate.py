"""Step 36: measures a draft by what it is for: tokens for each pass of the target, and time."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import GenerationConfig

from eagle3.commands import EvaluateConfig
from eagle3.conversations import load_conversations
from eagle3.description import end_ids
from eagle3.draft import Draft
from eagle3.errors import DataError
from eagle3.files import write_in_run
from eagle3.finished import TrainedDraft, open_run
from eagle3.loss import StepCounts, ratios
from eagle3.speculate import Greedy, Limits, Rule, Sampled, Written, random_choice, write_with_draft
from eagle3.target import FrozenTarget
from eagle3.terminal import show, watched
from eagle3.tokens import encode_prompt
from eagle3.unroll import TrainingTimeTest

#: What the last evaluation of a run found, in its folder.
EVALUATION = "evaluation.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """Many answers written with the draft, beside as many of the target alone.

    Attributes:
        accept_length: Drafted tokens of a whole chain that stand on average, from 0 to `num_drafted`: the sum of
            `by_depth`, as in training. The last chains of answers are shorter and count where they reach.
        by_depth: For each place of a chain, the share of the chains that reach so far which stand up to there.
        tokens_per_pass: New tokens for each pass of the target, the passes over prompts included.
        num_tokens: New tokens in all.
        tokens_per_second: With the draft.
        tokens_per_second_alone: Of the target's own `generate`.
    """

    accept_length: float
    by_depth: tuple[float, ...]
    tokens_per_pass: float
    num_tokens: int
    tokens_per_second: float
    tokens_per_second_alone: float

    @property
    def speed_up(self) -> float:
        """How many times as fast as the target alone."""
        return self.tokens_per_second / self.tokens_per_second_alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        checkpoint: Folder of the draft.
        target: Folder of the target.
        num_prompts: Answers of each kind.
        num_drafted: Tokens that the draft proposes for each pass of the target.
        temperature: Of the sampled answers.
        simulated: Accept length of the training-time test on the target's own greedy answers, all of their rows.
        simulated_by_depth: For each step, the share of rows whose chain stands up to there.
        greedy: Greedy answers.
        sampled: Sampled answers.
        num_identical: Greedy answers that are the target's own token by token.
        difference: Where the first of the others differs; None if there is none.
    """

    checkpoint: str
    target: str
    num_prompts: int
    num_drafted: int
    temperature: float
    simulated: float
    simulated_by_depth: tuple[float, ...]
    greedy: Decoding
    sampled: Decoding
    num_identical: int
    difference: str | None


def run_evaluate(config: EvaluateConfig) -> None:
    """Measure the draft of a run, print a table and write `evaluation.json` into the run's folder.

    Raises:
        Eagle3Error: The run, its target or the prompts cannot be used.
        TiePolicyError: The checkpoint is missing or damaged.
    """
    evaluation = evaluate(open_run(config.run, checkpoint=config.checkpoint, target=config.target), config)
    write_evaluation(Path(config.run), evaluation)
    show(table_of(evaluation))


def evaluate(trained: TrainedDraft, config: EvaluateConfig) -> Evaluation:
    """Writes each answer four times: greedy and sampled, by the target alone and with the draft.

    Args:
        trained: Its draft is cast to the target's dtype.
        config: What to measure; its run, checkpoint and target were opened already.

    Returns:
        Acceptance, tokens per pass and times of each.

    Raises:
        DataError: The conversations cannot be read, none of them begins with a question, or the target's chat template
            is missing or refuses one.
        TargetError: As for `write_with_draft`.
    """
    target, draft = trained.target, trained.draft
    draft.to(target.head_VE.dtype)
    data = config.data or trained.config.data.validation or trained.config.data.train
    prompts = list(_prompts(data, target, limit=config.num_prompts))
    num_drafted = config.num_drafted or trained.config.unroll.steps
    # The tokens at which the target's own `generate` stops.
    stop_ids = frozenset(end_ids(target.model.generation_config))
    limits = Limits(num_drafted=num_drafted, max_new_tokens=config.max_new_tokens, stop_ids=stop_ids)
    writers = _Writers(target, draft, limits, config)
    greedy = _timed(writers.greedy, prompts, "greedy answers with the draft")
    greedy_alone = _timed(writers.alone_greedy, prompts, "greedy answers of the target")
    with torch.random.fork_rng(devices=[]):  # `generate` takes no generator
        torch.manual_seed(config.seed)
        sampled_alone = _timed(writers.alone_sampled, prompts, "sampled answers of the target")
    sampled = _timed(writers.sampled, prompts, "sampled answers with the draft")
    own: list[list[int]] = greedy_alone.results
    counts = _simulate(target, draft, prompts, own, num_steps=num_drafted)
    different = [n for n, ids in enumerate(own) if tuple(ids) != greedy.results[n].ids]
    return Evaluation(
        checkpoint=str(trained.checkpoint),
        target=trained.target_folder,
        num_prompts=len(prompts),
        num_drafted=num_drafted,
        temperature=config.temperature,
        simulated=counts.accept_length(),
        simulated_by_depth=tuple(counts.accepted()),
        greedy=_decoding(greedy, greedy_alone, num_drafted),
        sampled=_decoding(sampled, sampled_alone, num_drafted),
        num_identical=len(prompts) - len(different),
        difference=_difference(target, prompts, own, greedy.results, different[0]) if different else None,
    )


def write_evaluation(run: Path, evaluation: Evaluation) -> None:
    """Keep an evaluation in the folder of its run; an older one is replaced in one step.

    Raises:
        CheckpointError: It cannot be written.
    """
    write_in_run(run / EVALUATION, json.dumps(asdict(evaluation), indent=2) + "\n")


def table_of(evaluation: Evaluation) -> Table:
    """The evaluation for a person: simulated and real side by side."""
    chains = f"chains of {evaluation.num_drafted}, {evaluation.num_prompts} answers"
    table = Table(title=f"{evaluation.checkpoint}: {chains}")
    for heading in ("", "simulated", "greedy", f"sampled at {evaluation.temperature:g}"):
        table.add_column(heading, justify="left" if not heading else "right")
    greedy, sampled = evaluation.greedy, evaluation.sampled
    decodings = (greedy, sampled)
    lengths = (evaluation.simulated, *(decoding.accept_length for decoding in decodings))
    table.add_row(f"accept length, of {evaluation.num_drafted}", *(f"{length:.2f}" for length in lengths))
    for depth, share in enumerate(evaluation.simulated_by_depth):
        shares = (share, *(decoding.by_depth[depth] for decoding in decodings))
        table.add_row(f"first {depth + 1} stand" if depth else "first stands", *(f"{part:.1%}" for part in shares))
    for name, form in (
        ("tokens_per_pass", "tokens per pass of the target"),
        ("tokens_per_second", "tokens per second"),
        ("tokens_per_second_alone", "of the target alone"),
        ("speed_up", "speed-up"),
    ):
        values = [getattr(decoding, name) for decoding in decodings]
        table.add_row(form, "", *(f"{value:.2f}" if value < 100 else f"{value:.0f}" for value in values))
    identical = f"{evaluation.num_identical} of {evaluation.num_prompts}"
    table.add_row("identical to the target's own", "", identical, "")
    if evaluation.difference:
        table.caption = evaluation.difference
    return table


@dataclass(frozen=True, slots=True, eq=False)
class _Timed:
    results: list[Any]
    seconds: float


class _Writers:
    """The four ways to write an answer."""

    def __init__(self, target: FrozenTarget, draft: Draft, limits: Limits, config: EvaluateConfig) -> None:
        self.target, self.draft, self.limits, self.config = target, draft, limits, config
        self.device = target.head_VE.device
        self.generator = torch.Generator(self.device).manual_seed(config.seed)

    def greedy(self, prompt: Sequence[int]) -> Written:
        return self._together(prompt, Greedy())

    def sampled(self, prompt: Sequence[int]) -> Written:
        return self._together(
            prompt, Sampled(temperature=self.config.temperature, choose=random_choice(self.generator))
        )

    def alone_greedy(self, prompt: Sequence[int]) -> list[int]:
        return self._alone(prompt, do_sample=False)

    def alone_sampled(self, prompt: Sequence[int]) -> list[int]:
        return self._alone(prompt, do_sample=True, temperature=self.config.temperature, top_k=0, top_p=1.0)

    def _together(self, prompt: Sequence[int], rule: Rule) -> Written:
        return write_with_draft(self.target, self.draft, prompt, rule=rule, limits=self.limits)

    def _alone(self, prompt: Sequence[int], **options: Any) -> list[int]:
        ids = torch.tensor([prompt], device=self.device)
        settings = GenerationConfig(
            max_new_tokens=self.limits.max_new_tokens,
            eos_token_id=sorted(self.limits.stop_ids) or None,
            pad_token_id=0,
            **options,
        )
        model: Any = self.target.model
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        answer: list[int] = output[0, len(prompt) :].tolist()
        return answer


def _timed(write: Callable[[Sequence[int]], Any], prompts: list[list[int]], description: str) -> _Timed:
    write(prompts[0])  # so that nobody pays alone for what is set up once
    _wait_for_device()
    start = time.perf_counter()
    results = [write(prompt) for prompt in watched(prompts, description, total=len(prompts))]
    _wait_for_device()
    return _Timed(results, time.perf_counter() - start)


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _decoding(timed: _Timed, alone: _Timed, num_drafted: int) -> Decoding:
    written: list[Written] = timed.results
    chains = [chain for text in written for chain in zip(text.drafted, text.accepted, strict=True)]
    num_tokens = sum(len(text.ids) for text in written)
    reached = [sum(drafted > depth for drafted, _ in chains) for depth in range(num_drafted)]
    stood = [sum(accepted > depth for _, accepted in chains) for depth in range(num_drafted)]
    by_depth = tuple(ratios(stood, reached))
    return Decoding(
        accept_length=sum(by_depth),
        by_depth=by_depth,
        tokens_per_pass=num_tokens / sum(text.num_passes for text in written),
        num_tokens=num_tokens,
        tokens_per_second=num_tokens / timed.seconds,
        tokens_per_second_alone=sum(map(len, alone.results)) / alone.seconds,
    )


def _prompts(path: str, target: FrozenTarget, *, limit: int) -> Iterator[list[int]]:
    """What stands before the first answer of each conversation, as the target reads it."""
    num_found = 0
    for conversation in load_conversations(path):
        roles = [message.role for message in conversation.messages]
        if num_found == limit or "assistant" not in roles[1:]:
            continue
        num_found += 1
        yield encode_prompt(conversation, target.tokenizer, num_messages=roles.index("assistant", 1))
    if not num_found:
        raise DataError(f"No conversation in {path} has an answer behind a question. Give answered ones as --data.")


@torch.no_grad()
def _simulate(
    target: FrozenTarget, draft: Draft, prompts: list[list[int]], answers: list[list[int]], *, num_steps: int
) -> StepCounts:
    """The training-time test on given answers, one at a time."""
    unroll, device = TrainingTimeTest(draft, num_steps=num_steps), target.head_VE.device
    total = StepCounts.from_tensor(torch.zeros(4, num_steps, dtype=torch.int64, device=device))
    pairs = zip(prompts, answers, strict=True)
    for prompt, answer in watched(pairs, "simulated acceptance", total=len(prompts)):
        ids_BT = torch.tensor([[*prompt, *answer]], device=device)
        mask_BT = torch.arange(ids_BT.shape[1], device=device)[None] >= len(prompt)
        features = target.features(ids_BT)
        aux_BTA = features.aux_BTA.to(draft.fc.weight.dtype)
        total += unroll(ids_BT, mask_BT, aux_BTA, features.hidden_BTE, target.head_VE).counts
    return total


@torch.no_grad()
def _difference(
    target: FrozenTarget, prompts: list[list[int]], own: list[list[int]], written: list[Written], number: int
) -> str:
    """Says where an answer leaves the target's own, and how near to each other the two tokens were."""
    ours, theirs = written[number].ids, own[number]
    same = [one == other for one, other in zip(ours, theirs, strict=False)]
    place = same.index(False) if False in same else len(same)
    if place >= min(len(ours), len(theirs)):
        return f"Answer {number} has {len(ours)} tokens, but {len(theirs)} without the draft."
    ids_BT = torch.tensor([[*prompts[number], *theirs[:place]]], device=target.head_VE.device)
    logits_V = (target.features(ids_BT).hidden_BTE[0, -1] @ target.head_VE.T).float()
    gap = float(logits_V[theirs[place]] - logits_V[ours[place]])
    return (
        f"Answer {number} differs at its token {place}: {ours[place]} instead of {theirs[place]}, whose logits are "
        f"{gap:.2g} apart. A pass over several tokens rounds otherwise than a pass over one; in {logits_V.dtype} of "
        f"{target.head_VE.dtype} weights only near ties may flip so."
    )
