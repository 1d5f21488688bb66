"""Step 6: conversations become token ids and the mask of what the assistant wrote, kept on disk, and share rows.

Shape suffixes: T tokens.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import torch
from transformers import PreTrainedTokenizerBase

from eagle3.conversations import Conversation, load_conversations
from eagle3.errors import DataError
from eagle3.features import FeatureSource
from eagle3.files import TensorCache
from eagle3.terminal import waiting, watched


def pack(lengths: Sequence[int], row_length: int) -> tuple[tuple[int, ...], ...]:
    """Puts each conversation into the fullest row that still has room for it, long ones first.

    Best fit in falling order leaves at most 11/9 of the rows that would be needed at least (Johnson et al. 1974, SIAM
    J. Comput. 3(4)), and on chat data a few percent of padding. It depends on the lengths alone.

    Args:
        lengths: Tokens of each conversation, from 1 to `row_length`.
        row_length: Tokens of a row.

    Returns:
        The rows, each a tuple of indices into `lengths`, ascending; every index is in exactly one row.
    """
    assert all(0 < length <= row_length for length in lengths)
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    # Bit r is set if some row has room for exactly r more tokens, so the best fit is one shift away.
    rooms = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = row_length, len(rows)
            rows.append([])
        rows[row].append(index)
        by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return tuple(tuple(sorted(row)) for row in rows)


logger = logging.getLogger("eagle3")

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Part of the key of kept tokens: raise it when the same file would give other tokens.
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Example:
    """One conversation: `input_ids` int64 `(T,)`, and `loss_mask` bool `(T,)`, true where the assistant wrote."""

    input_ids: torch.Tensor
    loss_mask: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedData:
    """The examples that can be trained on, and how they are laid out in rows.

    Attributes:
        examples: In the order of the file.
        num_dropped: Conversations without a token to learn.
        num_truncated: Conversations that were cut short.
        num_tools: Descriptions, calls and results of tools that were left out.
        packed_rows: Indices of the examples that stand side by side, for each row; None for one example per row.
        row_length: Tokens of a packed row.
        feature_source: Reads the target's states of the examples from disk; None to run the target.
    """

    examples: tuple[Example, ...]
    num_dropped: int
    num_truncated: int
    num_tools: int = 0
    packed_rows: tuple[tuple[int, ...], ...] | None = None
    row_length: int | None = None
    feature_source: FeatureSource | None = None

    @property
    def num_rows(self) -> int:
        """Rows of one epoch: what `train.batch_size` and an epoch's position count."""
        return len(self.examples) if self.packed_rows is None else len(self.packed_rows)

    @property
    def num_tokens(self) -> int:
        """Tokens in all examples."""
        return sum(example.input_ids.numel() for example in self.examples)

    @property
    def num_supervised(self) -> int:
        """Tokens in all examples that the assistant wrote."""
        return sum(int(example.loss_mask.sum()) for example in self.examples)

    @property
    def token_digest(self) -> str:
        """SHA-256 in hex over lengths, ids and masks in order, however they are laid out in rows."""
        sha = hashlib.sha256()
        for example in self.examples:
            sha.update(example.input_ids.numel().to_bytes(8, "little"))
            sha.update(example.input_ids.numpy().tobytes())
            sha.update(example.loss_mask.numpy().tobytes())
        return sha.hexdigest()

    @property
    def digest(self) -> str:
        """SHA-256 in hex over tokens and rows: equal for two runs exactly if an epoch's rows are equal."""
        if self.packed_rows is None:
            return self.token_digest
        return hashlib.sha256(f"{self.token_digest} {self.row_length} {self.packed_rows}".encode()).hexdigest()

    def packed(self, row_length: int) -> "EncodedData":
        """The same examples in rows of `row_length` tokens, at least the longest example's."""
        rows = pack([example.input_ids.numel() for example in self.examples], row_length)
        return replace(self, packed_rows=rows, row_length=row_length)

    def __str__(self) -> str:
        rows = "" if self.packed_rows is None else f" in {self.num_rows} rows of {self.row_length}"
        tools = f"; {self.num_tools} tool descriptions, calls and results left out" if self.num_tools else ""
        return (
            f"{len(self.examples)} conversations, {self.num_tokens} tokens{rows}, {self.num_supervised} of them "
            f"supervised; {self.num_dropped} dropped without a token to learn, {self.num_truncated} cut short{tools}"
        )


def load_tokens(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, *, max_length: int, cache: TensorCache
) -> EncodedData:
    """Reads and encodes a file of conversations, or takes from the cache what an earlier run made of the same file.

    Args:
        path: As for `load_conversations`.
        tokenizer: As for `encode`.
        max_length: As for `encode`.
        cache: Where tokens are kept, under a digest of the file's bytes, the tokenizer, its template and
            `max_length`. Of several processes that ask at once, one encodes.

    Returns:
        The examples, one per row.

    Raises:
        DataError: As for `load_conversations` and `encode`, or the cache's folder cannot be written.
    """
    name = _file_name(path, tokenizer, max_length=max_length)
    with cache.locked(name):
        kept = cache.read(name)
        if kept is not None:
            logger.info("Tokens of %s are read from %s", path, cache.folder / name)
            return _from_tensors(*kept)
        logger.info("Tokenizing %s", path)
        with waiting("Reading conversations"):
            conversations = load_conversations(path)
        data = encode(conversations, tokenizer, max_length=max_length)
        cache.write(name, *_to_tensors(data))
    return data


def kept_tokens(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, *, max_length: int, cache: TensorCache
) -> EncodedData | None:
    """What `load_tokens` has kept of a file, or None; nothing is encoded.

    Raises:
        DataError: The file cannot be read, or the tokenizer has no chat template.
    """
    kept = cache.read(_file_name(path, tokenizer, max_length=max_length))
    return None if kept is None else _from_tensors(*kept)


def _file_name(path: str | Path, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> str:
    path = Path(path)
    sha = hashlib.sha256(f"{_VERSION} {max_length} {tokenizer_digest(tokenizer)} {path.suffix}".encode())
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                sha.update(block)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}. Give the path of a JSONL or Parquet file."
        ) from error
    return f"tokens-{sha.hexdigest()[:32]}.safetensors"


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 in hex over all that decides which tokens and masks a conversation becomes.

    Raises:
        DataError: The tokenizer has no chat template, or reports no offsets.
    """
    template = _chat_template(tokenizer)
    backend: Any = tokenizer.backend_tokenizer
    model: str = backend.to_str()
    return hashlib.sha256(json.dumps([model, template, sorted(tokenizer.all_special_ids)]).encode()).hexdigest()


def _to_tensors(data: EncodedData) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors = {
        "input_ids": torch.cat([example.input_ids for example in data.examples]).to(torch.int32),
        "loss_mask": torch.cat([example.loss_mask for example in data.examples]),
        "lengths": torch.tensor([example.input_ids.numel() for example in data.examples]),
    }
    counts = {name: str(getattr(data, name)) for name in ("num_dropped", "num_truncated", "num_tools")}
    return tensors, counts


def _from_tensors(tensors: dict[str, torch.Tensor], counts: dict[str, str]) -> EncodedData:
    lengths = tensors["lengths"].tolist()
    parts = zip(tensors["input_ids"].long().split(lengths), tensors["loss_mask"].split(lengths), strict=True)
    return EncodedData(
        examples=tuple(Example(input_ids=ids, loss_mask=mask) for ids, mask in parts),
        num_dropped=int(counts["num_dropped"]),
        num_truncated=int(counts["num_truncated"]),
        num_tools=int(counts["num_tools"]),
    )


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
    for conversation in watched(conversations, "Tokenizing", total=len(conversations)):
        if not conversation.messages:
            continue
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
        examples=tuple(examples),
        num_dropped=len(conversations) - len(examples),
        num_truncated=num_truncated,
        num_tools=sum(conversation.num_tools for conversation in conversations),
    )


def encode_prompt(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, *, num_messages: int) -> list[int]:
    """The first messages of a conversation and the beginning of an answer to them, as the target reads it.

    Raises:
        DataError: There is no chat template, or it refuses the messages.
    """
    _chat_template(tokenizer)
    options = {"num_messages": num_messages, "add_generation_prompt": True, "return_dict": False}
    ids: list[int] = _render(conversation, tokenizer, **options)
    return ids


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
            f"{conversation.where}: the chat template refuses the first {len(messages)} messages "
            f"({error}). Change the conversation, or give the tokenizer another template."
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
        found = through.startswith(before) and text.startswith(before)
        size = _size_of_answer(through[len(before) :], text[len(before) :], content=message.content) if found else None
        if size is None:
            raise DataError(
                f"{conversation.where}: message {number + 1} cannot be found in the rendered conversation, because "
                "the chat template rewrites earlier text when a message is added. Put {% generation %} and "
                "{% endgeneration %} around what the assistant writes in the tokenizer's chat template."
            )
        yield len(before), len(before) + size


def _size_of_answer(last: str, text: str, *, content: str) -> int | None:
    """The length of the answer that `text` begins with and that is `last` at a conversation's end; None if unknown.

    Some templates show thoughts, or that there are none, before the last answer only: an earlier one is its end.
    """
    if text.startswith(last):
        return len(last)
    ends = (last[cut:] for cut in range(1, len(last)))
    end = next((end for end in ends if text.startswith(end)), "")
    # By chance they may share a little, such as a line break.
    return len(end) if content.rstrip()[-1:] in end else None
