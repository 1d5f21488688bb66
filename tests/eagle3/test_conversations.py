import json
import sys

import pyarrow as pa
import pytest
from pyarrow import parquet

from eagle3.conversations import Message, load_conversations
from eagle3.errors import DataError


def test_both_layouts_and_all_role_names_read_alike(tmp_path):
    path = tmp_path / "chats.jsonl"
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")]
    sharegpt = [("system", "Be kind."), ("human", "Hi"), ("gpt", "Hello")]
    lines = [
        {"id": 3, "messages": [{"role": role, "content": content} for role, content in turns]},
        {"conversations": [{"from": role, "value": content} for role, content in sharegpt]},
        {"conversations": [{"role": role, "content": content} for role, content in turns]},
    ]
    path.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    expected = tuple(Message(role=role, content=content) for role, content in turns)
    loaded = load_conversations(path)
    assert [expected] * 3 == [conversation.messages for conversation in loaded]
    assert [f"{path}:{number}" for number in (1, 3, 5)] == [conversation.where for conversation in loaded]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", r"not JSON in UTF-8 \(Expecting property name"),
        ("[]", "a line must be an object, not list"),
        ('{"text": "x"}', "found neither `messages` nor `conversations`, expected exactly one"),
        ('{"messages": [], "conversations": []}', "found both `messages` and `conversations`"),
        ('{"messages": []}', "`messages` must be a list of at least one message"),
        ('{"messages": ["x"]}', "message 1 must be an object, not str"),
        ('{"messages": [{"content": "x"}]}', "message 1: `role` is missing"),
        ('{"conversations": [{"from": "gpt"}]}', "message 1: `value` is missing"),
        ('{"messages": [{"role": "user", "content": null}]}', "message 1: `content` must be a string, not null"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "message 1: unknown role 'bot'; expected one of system, "),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "message 1: `content` holds half of a surrogate"),
    ],
)
def test_a_broken_line_is_named_with_its_fault(tmp_path, line, fault):
    path = tmp_path / "chats.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "fine"}]}\n' + line)
    with pytest.raises(DataError, match=rf"chats\.jsonl:2: {fault}"):
        load_conversations(path)


def test_a_line_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b'{"messages": "\xff"}')
    with pytest.raises(DataError, match=r"chats\.jsonl:1: not JSON in UTF-8 \('utf-8' codec can't decode byte 0xff"):
        load_conversations(path)


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("\n \n")
    with pytest.raises(DataError, match=r"chats\.jsonl holds no conversation\. Each line is one object such as"):
        load_conversations(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        DataError,
        match=r"chats\.jsonl cannot be read: No such file or directory\. Give the path of a JSONL or Parquet file\.",
    ):
        load_conversations(tmp_path / "chats.jsonl")


TURNS = [("user", "Hi"), ("assistant", "Hello")]


def test_a_parquet_file_reads_like_the_same_lines_of_json(tmp_path):
    """Its rows have every column, filled with nulls where a line had none."""
    lines = [
        {"messages": [{"role": role, "content": content} for role, content in TURNS], "id": 1},
        {"conversations": [{"from": role, "value": content} for role, content in TURNS], "id": 2},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "c"}], "id": 3},
    ]
    jsonl, table = tmp_path / "chats.jsonl", tmp_path / "chats.parquet"
    jsonl.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [{"messages": None, "conversations": None} | line for line in lines]
    parquet.write_table(pa.Table.from_pylist(rows), table, row_group_size=2)
    loaded = load_conversations(table)
    assert [one.messages for one in load_conversations(jsonl)] == [one.messages for one in loaded]
    assert [f"{table}: row {number}" for number in (1, 2, 3)] == [one.where for one in loaded]


def test_a_broken_row_of_a_parquet_file_is_named(tmp_path):
    path = tmp_path / "chats.parquet"
    rows = [{"messages": [{"role": "user", "content": "x"}]}, {"messages": [{"role": "bot", "content": "x"}]}]
    parquet.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(DataError, match=r"chats\.parquet: row 2: message 1: unknown role 'bot'"):
        load_conversations(path)


@pytest.mark.parametrize(
    ("content", "fault"), [(b"PAR1", r"is not a whole Parquet file"), (None, r"cannot be read: .*No such file")]
)
def test_a_parquet_file_that_cannot_be_read_is_named(tmp_path, content, fault):
    path = tmp_path / "chats.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"chats\.parquet {fault}"):
        load_conversations(path)


def test_a_parquet_file_without_pyarrow_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow\. Install it with `pip install tiepolicy\[parquet\]`, or"):
        load_conversations(tmp_path / "chats.parquet")


def test_tools_are_left_out_and_counted(tmp_path):
    path = tmp_path / "chats.jsonl"
    line = {
        "tools": [{"name": "clock"}, {"name": "map"}],
        "messages": [
            {"role": "user", "content": "What time is it?"},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]},
            {"role": "tool", "content": "12:00"},
            {"role": "assistant", "content": "Noon.", "tool_calls": [{"name": "map"}]},
        ],
    }
    only_tools = {"conversations": [{"from": "function_call", "value": "x"}, {"from": "observation", "value": "y"}]}
    path.write_text(json.dumps(line) + "\n" + json.dumps(only_tools))
    first, second = load_conversations(path)
    assert (("user", "What time is it?"), ("assistant", "Noon.")) == tuple((m.role, m.content) for m in first.messages)
    assert (5, 2, ()) == (first.num_tools, second.num_tools, second.messages)
