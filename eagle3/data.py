"""Step 3: conversation files become token ids, the mask of what the assistant wrote, and the batches of a run.

Shape suffixes: B batch, T tokens.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from eagle3.errors import DataError

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_EXPECTED = (
    'Each line is one object such as {"messages": [{"role": "user", "content": "..."}, '
    '{"role": "assistant", "content": "..."}]}, or the same with "conversations", "from" and "value".'
)
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn: `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """The turns of one line of a file, and where it stands (`file:line`), which errors repeat."""

    messages: tuple[Message, ...]
    where: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Example:
    """One conversation: `input_ids` int64 `(T,)`, and `loss_mask` bool `(T,)`, true where the assistant wrote."""

    input_ids: torch.Tensor
    loss_mask: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedData:
    """The examples that can be trained on, and how many conversations were dropped (nothing to learn) or cut short."""

    examples: tuple[Example, ...]
    num_dropped: int
    num_truncated: int

    @property
    def num_tokens(self) -> int:
        """Tokens in all examples."""
        return sum(example.input_ids.numel() for example in self.examples)

    @property
    def num_supervised(self) -> int:
        """Tokens in all examples that the assistant wrote."""
        return sum(int(example.loss_mask.sum()) for example in self.examples)

    @property
    def digest(self) -> str:
        """SHA-256 in hex over lengths, ids and masks in order: equal for two runs exactly if their data is equal."""
        sha = hashlib.sha256()
        for example in self.examples:
            sha.update(example.input_ids.numel().to_bytes(8, "little"))
            sha.update(example.input_ids.numpy().tobytes())
            sha.update(example.loss_mask.numpy().tobytes())
        return sha.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Examples padded on the right: `input_ids_BT` int64 and `loss_mask_BT` bool, both `(B, T)`; padding is False."""

    input_ids_BT: torch.Tensor
    loss_mask_BT: torch.Tensor


def load_conversations(path: str | Path) -> list[Conversation]:
    """Reads a JSONL file of conversations; empty lines and keys that it does not know are passed over.

    Args:
        path: A file whose lines hold `messages` of `role` and `content`, or ShareGPT `conversations` of `from` and
            `value`.

    Returns:
        The conversations in the order of the file, roles normalised to `system`, `user` and `assistant`.

    Raises:
        DataError: The file cannot be read or is empty, or a line is broken; the message has the file and the line.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Give the path of a JSONL file.") from error
    conversations = [
        _parse_line(line, where=f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()
    ]
    if not conversations:
        raise DataError(f"{path} holds no conversation. {_EXPECTED}")
    return conversations


def _parse_line(line: bytes, *, where: str) -> Conversation:
    try:
        entry = json.loads(line.decode("utf-8"))
    except ValueError as error:  # the base of JSONDecodeError and UnicodeDecodeError
        raise DataError(f"{where}: not JSON in UTF-8 ({error}). {_EXPECTED}") from error
    if not isinstance(entry, dict):
        raise DataError(f"{where}: a line must be an object, not {_kind(entry)}. {_EXPECTED}")
    keys = [key for key in ("messages", "conversations") if key in entry]
    if len(keys) != 1:
        found = "both `messages` and `conversations`" if keys else "neither `messages` nor `conversations`"
        raise DataError(f"{where}: found {found}, expected exactly one of them. {_EXPECTED}")
    turns = entry[keys[0]]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: `{keys[0]}` must be a list of at least one message. {_EXPECTED}")
    messages = [_parse_message(turn, where=f"{where}: message {number}") for number, turn in enumerate(turns, start=1)]
    return Conversation(messages=tuple(messages), where=where)


def _parse_message(turn: object, *, where: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{where} must be an object, not {_kind(turn)}. {_EXPECTED}")
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    for key in (role_key, content_key):
        if not isinstance(turn.get(key), str):
            fault = f"must be a string, not {_kind(turn[key])}" if key in turn else "is missing"
            raise DataError(f"{where}: `{key}` {fault}. {_EXPECTED}")
    role, content = turn[role_key], turn[content_key]
    if role not in _ROLES:
        raise DataError(f"{where}: unknown role {role!r}; expected one of {', '.join(_ROLES)}.")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: `{content_key}` holds half of a surrogate pair, which no tokenizer reads."
        ) from error
    return Message(role=_ROLES[role], content=content)


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def encode(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> EncodedData:
    """Renders with the tokenizer's own chat template, tokenizes once, and marks what the assistant wrote.

    A template with a `{% generation %}` block says itself what that is. With any other, the text between the rendering
    that ends in the generation prompt and the rendering that includes the message is the assistant's, up to and with
    its end-of-turn token: the line break that many templates put behind that token is never generated.

    Args:
        conversations: From `load_conversations`.
        tokenizer: A fast tokenizer with a chat template.
        max_length: In tokens; what is longer loses its end.

    Returns:
        The examples in the order of the conversations, without those that have no supervised token after the first.

    Raises:
        DataError: There is no chat template, it refuses a conversation or does not show where an answer stands, the
            tokenizer reports no offsets, or no conversation has anything to learn.
    """
    mark = _mark_by_tags if _GENERATION_TAG.search(_chat_template(tokenizer)) else _mark_by_prefixes
    examples, num_truncated = [], 0
    for conversation in conversations:
        ids, mask = mark(conversation, tokenizer=tokenizer)
        num_truncated += len(ids) > max_length
        example = Example(
            input_ids=torch.tensor(ids[:max_length], dtype=torch.int64),
            loss_mask=torch.tensor(mask[:max_length], dtype=torch.bool),
        )
        # Nothing predicts the first token, so a mask on it alone teaches nothing.
        if example.loss_mask[1:].any():
            examples.append(example)
    if not examples:
        raise DataError(
            f"None of the {len(conversations)} conversations has a token of the assistant within the first "
            f"{max_length} tokens. Raise data.max_length, or check that the file has assistant messages."
        )
    return EncodedData(
        examples=tuple(examples), num_dropped=len(conversations) - len(examples), num_truncated=num_truncated
    )


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} does not report where its tokens stand in the text. Use the fast tokenizer."
        )
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(
            "The target's tokenizer has no chat template of its own, so conversations cannot be rendered the way the "
            "target reads them. Use the instruction-tuned model, or put a chat_template.jinja beside its tokenizer."
        ) from error
    return template


def _render(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, *, num_messages: int | None = None, **options: Any
) -> Any:
    messages = [{"role": message.role, "content": message.content} for message in conversation.messages[:num_messages]]
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except jinja2.TemplateError as error:
        raise DataError(
            f"{conversation.where}: the chat template refuses the first {len(messages)} messages: {error}. "
            "Change the conversation, or give the tokenizer another template."
        ) from error


def _mark_by_tags(conversation: Conversation, *, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    encoding = _render(conversation, tokenizer, return_dict=True, return_assistant_tokens_mask=True)
    return encoding["input_ids"], [bool(flag) for flag in encoding["assistant_masks"]]


def _mark_by_prefixes(
    conversation: Conversation, *, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    text = _render(conversation, tokenizer, tokenize=False)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special_ids = added.union(tokenizer.all_special_ids)
    mask = [False] * len(ids)
    for start, end in _assistant_spans(conversation, tokenizer, text=text):
        # A token that crosses the border holds text of the prompt, which the assistant did not write.
        inside = [index for index, (first, last) in enumerate(offsets) if start <= first < last <= end]
        closing = [index for index in inside if ids[index] in special_ids]
        # The turn ends with its last special token; blank text behind that only separates turns.
        if closing and not text[offsets[closing[-1]][1] : end].strip():
            inside = [index for index in inside if index <= closing[-1]]
        for index in inside:
            mask[index] = True
    return ids, mask


def _assistant_spans(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, *, text: str
) -> Iterator[tuple[int, int]]:
    """Character ranges of the assistant's messages in `text`, the rendered conversation."""
    for number, message in enumerate(conversation.messages):
        if message.role != "assistant":
            continue
        if number == 0:
            raise DataError(
                f"{conversation.where}: the first message is the assistant's, and this chat template cannot show where "
                "it begins. Start with a user or system message, or put {% generation %} tags into the template."
            )
        before = _render(conversation, tokenizer, num_messages=number, tokenize=False, add_generation_prompt=True)
        through = _render(conversation, tokenizer, num_messages=number + 1, tokenize=False)
        if not (through.startswith(before) and text.startswith(through)):
            raise DataError(
                f"{conversation.where}: message {number + 1} cannot be found in the rendered conversation, because "
                "the chat template rewrites earlier text when a message is added. Put {% generation %} and "
                "{% endgeneration %} around what the assistant writes in the tokenizer's chat template."
            )
        yield len(before), len(through)


def collate(examples: Sequence[Example], *, pad_id: int) -> Batch:
    """Pads to the longest example with `pad_id` on the right, where a causal model's real tokens never look."""
    ids_BT = torch.nn.utils.rnn.pad_sequence([e.input_ids for e in examples], batch_first=True, padding_value=pad_id)
    mask_BT = torch.nn.utils.rnn.pad_sequence([e.loss_mask for e in examples], batch_first=True, padding_value=False)
    return Batch(input_ids_BT=ids_BT, loss_mask_BT=mask_BT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """An example's place in a batch; unsupervised when it only fills up an incomplete batch."""

    index: int
    supervised: bool


class BatchOrder:
    """Which examples each rank sees at each step; a function of its arguments alone, so a run resumes anywhere.

    Args:
        num_examples: In the data set, at least 1.
        batch_size: Examples per rank and step.
        rank: Of this process.
        world_size: Number of ranks; they split each step's `batch_size * world_size` examples between them.
        seed: Of the run. The order of an epoch depends on it and the epoch's number, not on ranks.
    """

    def __init__(self, num_examples: int, *, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        assert num_examples > 0
        assert batch_size > 0
        assert 0 <= rank < world_size
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every example is seen once, the same on all ranks."""
        return -(-self.num_examples // (self.batch_size * self.world_size))

    def epoch(self, epoch: int, *, start_step: int = 0) -> Iterator[list[Pick]]:
        """This rank's picks, `batch_size` at a time, from `start_step` on.

        Where the last step has too few examples left, the epoch's first ones come again, unsupervised; they go to all
        ranks in turn, but a rank may still have a batch without any supervised token.
        """
        order = torch.randperm(self.num_examples, generator=self._generator(epoch)).tolist()
        global_size = self.batch_size * self.world_size
        for step in range(start_step, self.steps_per_epoch):
            places = range(step * global_size + self.rank, (step + 1) * global_size, self.world_size)
            yield [
                Pick(index=order[place % self.num_examples], supervised=place < self.num_examples) for place in places
            ]

    def _generator(self, epoch: int) -> torch.Generator:
        # A hash, because sums such as seed + epoch would give run 1 the second epoch of run 0.
        digest = hashlib.sha256(f"{self.seed}:{epoch}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


class _Picked(Dataset[Example]):
    def __init__(self, examples: tuple[Example, ...]) -> None:
        self.examples = examples

    def __getitem__(self, pick: Pick) -> Example:
        example = self.examples[pick.index]
        if pick.supervised:
            return example
        return Example(input_ids=example.input_ids, loss_mask=torch.zeros_like(example.loss_mask))


def batches(data: EncodedData, *, order: BatchOrder, epoch: int, start_step: int = 0, pad_id: int) -> Iterator[Batch]:
    """Yields this rank's batches of one epoch from `start_step` on, on the CPU.

    Args:
        data: The same on all ranks.
        order: Made for as many examples as `data` has.
        epoch: Number of the epoch, from 0.
        start_step: Steps of this epoch that a resumed run has already done.
        pad_id: Any id of the vocabulary.
    """
    assert order.num_examples == len(data.examples)
    yield from DataLoader(
        _Picked(data.examples),
        batch_sampler=order.epoch(epoch, start_step=start_step),
        collate_fn=lambda examples: collate(examples, pad_id=pad_id),
        # The loader draws a seed for its workers; from the global generator that would change a resumed run's numbers.
        generator=torch.Generator(),
    )
