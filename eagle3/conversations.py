"""Step 4: conversation files, line by line, become roles and texts."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle3.errors import DataError
from eagle3.files import reason

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
# Calls of tools and their results, which neither the draft nor most chat templates know.
_TOOL_ROLES = frozenset(
    ("tool", "tools", "tool_call", "tool_response", "function", "function_call", "function_response", "observation")
)
_EXPECTED = (
    'Each line is one object such as {"messages": [{"role": "user", "content": "..."}, '
    '{"role": "assistant", "content": "..."}]}, or the same with "conversations", "from" and "value".'
)
_COLUMNS = ("messages", "conversations", "tools")


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn: `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """The turns of one line of a file.

    Attributes:
        messages: In their order; none if the line held nothing but tools.
        where: `file:line` or `file: row N`, which errors repeat.
        num_tools: Descriptions, calls and results of tools that were left out.
    """

    messages: tuple[Message, ...]
    where: str
    num_tools: int = 0


def load_conversations(path: str | Path) -> list[Conversation]:
    """Reads a file of conversations; empty lines and keys that it does not know are passed over.

    Args:
        path: A Parquet file if its name ends in `.parquet`, else JSONL. Its lines hold `messages` of `role` and
            `content`, or ShareGPT `conversations` of `from` and `value`.

    Returns:
        The conversations in the order of the file, roles normalised to `system`, `user` and `assistant`. Tools are
        left out and counted.

    Raises:
        DataError: The file cannot be read or is empty, or a line is broken; the message has the file and the line.
    """
    path = Path(path)
    entries = _parquet_entries(path) if path.suffix == ".parquet" else _json_entries(path)
    try:
        conversations = [_parse(entry, where=where) for where, entry in entries]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {reason(error)}. Give the path of a JSONL or Parquet file.") from error
    if not conversations:
        raise DataError(f"{path} holds no conversation. {_EXPECTED}")
    return conversations


def count_conversations(path: str | Path) -> int:
    """Counts the conversations of a file without reading what they say.

    Raises:
        DataError: The file cannot be read, or is empty.
    """
    path = Path(path)
    try:
        if path.suffix == ".parquet":
            _, parquet = _pyarrow(path)
            count: int = parquet.read_metadata(path).num_rows
        else:
            with path.open("rb") as file:
                count = sum(1 for line in file if line.strip())
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise DataError(f"{path} cannot be read: {reason(error)}. Give the path of a JSONL or Parquet file.") from error
    if not count:
        raise DataError(f"{path} holds no conversation. {_EXPECTED}")
    return count


def _json_entries(path: Path) -> Iterator[tuple[str, object]]:
    """Each line that is not blank, and where it stands."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                yield where, json.loads(line.decode("utf-8"))
            except ValueError as error:  # the base of JSONDecodeError and UnicodeDecodeError
                raise DataError(f"{where}: not JSON in UTF-8 ({error}). {_EXPECTED}") from error


def _parquet_entries(path: Path) -> Iterator[tuple[str, object]]:
    """Each row, and where it stands; one row group is in memory at a time."""
    pa, parquet = _pyarrow(path)
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
            for group in range(file.num_row_groups):
                for row in file.read_row_group(group, columns=columns).to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is not a whole Parquet file ({error}). Write it again.") from error


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow as pa  # type: ignore[import-untyped]  # it has no annotations
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{path} is a Parquet file, which needs pyarrow. Install it with `pip install tiepolicy[parquet]`, or "
            "convert the file to JSONL."
        ) from error
    return pa, parquet


def _parse(entry: object, *, where: str) -> Conversation:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: a line must be an object, not {_kind(entry)}. {_EXPECTED}")
    # In Parquet every row has every column.
    keys = [key for key in ("messages", "conversations") if entry.get(key) is not None]
    if len(keys) != 1:
        found = "both `messages` and `conversations`" if keys else "neither `messages` nor `conversations`"
        raise DataError(f"{where}: found {found}, expected exactly one of them. {_EXPECTED}")
    turns = entry[keys[0]]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: `{keys[0]}` must be a list of at least one message. {_EXPECTED}")
    parsed = [_parse_message(turn, where=f"{where}: message {number}") for number, turn in enumerate(turns, start=1)]
    tools = entry.get("tools")
    num_tools = sum(count for _, count in parsed) + (len(tools) if isinstance(tools, list) else int(bool(tools)))
    return Conversation(
        messages=tuple(message for message, _ in parsed if message is not None), where=where, num_tools=num_tools
    )


def _parse_message(turn: object, *, where: str) -> tuple[Message | None, int]:
    """The message, or None where it is a tool's, and how many calls and results of tools were left out."""
    if not isinstance(turn, dict):
        raise DataError(f"{where} must be an object, not {_kind(turn)}. {_EXPECTED}")
    role_key, content_key = ("from", "value") if turn.get("from") is not None else ("role", "content")
    calls = turn.get("tool_calls") or []
    num_calls = len(calls) if isinstance(calls, list) else 1
    role, content = turn.get(role_key), turn.get(content_key)
    if isinstance(role, str) and role in _TOOL_ROLES:
        return None, 1
    if num_calls and not content:
        return None, num_calls
    for key, value in ((role_key, role), (content_key, content)):
        if not isinstance(value, str):
            fault = f"must be a string, not {_kind(value)}" if key in turn else "is missing"
            raise DataError(f"{where}: `{key}` {fault}. {_EXPECTED}")
    assert isinstance(role, str)
    assert isinstance(content, str)
    if role not in _ROLES:
        raise DataError(f"{where}: unknown role {role!r}; expected one of {', '.join(_ROLES)}.")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: `{content_key}` holds half of a surrogate pair, which no tokenizer reads. Remove it."
        ) from error
    return Message(role=_ROLES[role], content=content), num_calls


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
