"""Conversations become ids and masks, which are kept for the next run."""

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from eagle3.conversations import Conversation, Message
from eagle3.errors import DataError
from eagle3.files import TensorCache
from eagle3.tokens import EncodedData, Example, encode, kept_tokens, load_tokens

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ':' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ (m['content'] if loop.last else m['content'].split('</think>')[-1]) + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
)


def make_tokenizer(template=CHATML):
    """One token per byte, so that every place in a text is a border between tokens."""
    words = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=template,
    )


def chat(*turns):
    messages = tuple(Message(role=role, content=content) for role, content in turns)
    return Conversation(messages=messages, where="chats.jsonl:7")


def make_data(*masks):
    examples = tuple(
        Example(input_ids=torch.full((len(mask),), index), loss_mask=torch.tensor(mask, dtype=torch.bool))
        for index, mask in enumerate(masks)
    )
    return EncodedData(examples=examples, num_dropped=0, num_truncated=0)


def supervised_texts(tokenizer, example):
    """The supervised stretches of an example, decoded."""
    ids, mask = example.input_ids, example.loss_mask
    edges = torch.cat([torch.tensor([False]), mask, torch.tensor([False])]).diff().nonzero().flatten().tolist()
    return [tokenizer.decode(ids[start:end]) for start, end in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("template", [CHATML, TAGGED])
def test_the_assistants_words_and_its_end_of_turn_are_supervised(template):
    """The line break behind the end-of-turn token is the template's, so it is not."""
    tokenizer = make_tokenizer(template)
    chats = [
        chat(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "So"), ("assistant", "\u00e9!"))
    ]
    data = encode(chats, tokenizer, max_length=200)
    assert supervised_texts(tokenizer, data.examples[0]) == ["Hello<|im_end|>", "\u00e9!<|im_end|>"]
    expected = tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in chats[0].messages], return_dict=True
    )
    assert expected["input_ids"] == data.examples[0].input_ids.tolist()


def test_a_template_without_end_of_turn_token_supervises_up_to_the_next_turn():
    tokenizer = make_tokenizer(PLAIN)
    data = encode([chat(("user", "Hi"), ("assistant", "Hello"), ("user", "So"))], tokenizer, max_length=200)
    assert supervised_texts(tokenizer, data.examples[0]) == ["Hello\n"]


def test_only_a_special_token_closes_an_answer():
    """Whether it was added as one or is named as one; other added tokens, as for tools, do not."""
    tokenizer = make_tokenizer(PLAIN)
    tokenizer.add_tokens(["<tool>", AddedToken("<stop>", special=True)])
    tokenizer.eos_token = "!"
    turns = [turn for answer in ("Hi<tool>", "Hi<stop>", "Hi!") for turn in (("user", "So"), ("assistant", answer))]
    example = encode([chat(*turns)], tokenizer, max_length=200).examples[0]
    assert ["Hi<tool>\n", "Hi<stop>", "Hi!"] == supervised_texts(tokenizer, example)


def test_tokens_that_cross_from_the_prompt_are_not_supervised():
    """A template may end its prompt in a letter that the tokenizer joins with the answer's first."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "u": 2, ":": 3, "ab": 4}, [("a", "b")]))
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)
    data = encode([chat(("user", "u:a"), ("assistant", "ba"))], wrapped, max_length=10)
    assert data.examples[0].input_ids.tolist() == [2, 3, 4, 0]
    assert data.examples[0].loss_mask.tolist() == [False, False, False, True]


@pytest.mark.parametrize("answer", ["Hello", "<think>Hello?</think>Hello", ""])
def test_thoughts_that_a_template_shows_before_the_last_answer_only_are_no_hindrance(answer):
    """As those of Qwen3 and of other models that think do."""
    chats = [chat(("user", "Hi"), ("assistant", answer), ("user", "Hello"), ("assistant", "Bye"))]
    tokenizer = make_tokenizer(FORGETFUL)
    example = encode(chats, tokenizer, max_length=200).examples[0]
    expected = [f"{answer.rpartition('>')[2]}<|im_end|>", "<think></think>Bye<|im_end|>"]
    assert expected == supervised_texts(tokenizer, example)


def test_an_earlier_answer_whose_blanks_the_template_strips_is_found():
    chats = [chat(("user", "Hi"), ("assistant", "Hello \n"), ("user", "Hello"), ("assistant", "Bye"))]
    tokenizer = make_tokenizer(FORGETFUL.replace("m['content']", "m['content'].strip()"))
    expected = ["Hello<|im_end|>", "<think></think>Bye<|im_end|>"]
    assert expected == supervised_texts(tokenizer, encode(chats, tokenizer, max_length=200).examples[0])


@pytest.mark.parametrize("change", ["upper", "title", "replace('o', '')"])
def test_a_template_that_rewrites_earlier_turns_is_refused_with_advice(change):
    template = FORGETFUL.replace("m['content']", f"(m['content'] if loop.last else m['content'].{change})")
    template = template.replace("upper)", "upper())").replace("title)", "title())")
    chats = [chat(("user", "hi"), ("assistant", "hello"), ("user", "SO"), ("assistant", "Bye"))]
    with pytest.raises(DataError) as caught:
        encode(chats, make_tokenizer(template), max_length=200)
    expected = (
        "chats.jsonl:7: message 2 cannot be found in the rendered conversation, because the chat template rewrites "
        "earlier text when a message is added. Put {% generation %} and {% endgeneration %} around what the assistant "
        "writes in the tokenizer's chat template."
    )
    assert expected == str(caught.value)


def test_a_conversation_that_starts_with_the_assistant_needs_tags():
    chats = [chat(("assistant", "Hello"), ("user", "Hi"))]
    with pytest.raises(DataError, match=r"chats\.jsonl:7: the first message is the assistant's"):
        encode(chats, make_tokenizer(), max_length=200)
    tagged = make_tokenizer(TAGGED)
    assert supervised_texts(tagged, encode(chats, tagged, max_length=200).examples[0]) == ["Hello<|im_end|>"]


def test_a_conversation_that_the_template_refuses_is_named():
    template = "{{ raise_exception('no system message, please') }}"
    with pytest.raises(DataError, match=r"chats\.jsonl:7: the chat template refuses the first 2 messages \(no system"):
        encode([chat(("system", "x"), ("user", "y"))], make_tokenizer(template), max_length=200)


def test_a_tokenizer_without_chat_template_is_refused():
    with pytest.raises(DataError, match=r"The target's tokenizer has no chat template of its own"):
        encode([chat(("user", "Hi"))], make_tokenizer(template=None), max_length=200)


def test_a_tokenizer_that_reports_no_offsets_is_refused():
    with pytest.raises(DataError, match=r"ByT5Tokenizer does not report where its tokens stand in the text\."):
        encode([chat(("user", "Hi"), ("assistant", "Hello"))], ByT5Tokenizer(), max_length=200)


def test_long_conversations_lose_their_end_and_empty_ones_are_dropped():
    tokenizer = make_tokenizer()
    chats = [
        chat(("user", "Hi"), ("assistant", "Hello, and more")),
        chat(("user", "A question that alone is longer than that"), ("assistant", "Hello")),
        chat(("user", "Hi")),
        chat(("user", "Hi"), ("assistant", "Ok")),
    ]
    data = encode(chats, tokenizer, max_length=32)
    assert [supervised_texts(tokenizer, e) for e in data.examples] == [["Hello, and "], ["Ok<|im_end|>"]]
    assert (data.num_dropped, data.num_truncated) == (2, 2)
    assert data.num_tokens == sum(len(example.input_ids) for example in data.examples)
    assert data.num_supervised == 11 + 3


def test_a_conversation_that_just_fits_is_whole():
    chats = [chat(("user", "Hi"), ("assistant", "Hello"))]
    length = encode(chats, make_tokenizer(), max_length=200).num_tokens
    truncated = [encode(chats, make_tokenizer(), max_length=length - less).num_truncated for less in (0, 1)]
    assert [0, 1] == truncated


def test_a_first_token_teaches_nothing_as_nothing_predicts_it():
    template = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    chats = [chat(("assistant", "Hello"))]
    assert 1 == len(encode(chats, make_tokenizer(template), max_length=2).examples)
    with pytest.raises(DataError, match="within the first 1 tokens"):
        encode(chats, make_tokenizer(template), max_length=1)


def test_nothing_to_learn_is_an_error():
    with pytest.raises(
        DataError, match=r"None of the 1 conversations has a token of the assistant within the first 99"
    ):
        encode([chat(("user", "Hi"))], make_tokenizer(), max_length=99)


def test_the_digest_tells_ids_masks_and_borders_apart():
    one = make_data([0, 1], [1, 1])
    assert one.digest == make_data([0, 1], [1, 1]).digest
    other_mask, other_border = make_data([0, 1], [0, 1]), make_data([0, 1, 1, 1])
    other_ids = EncodedData(examples=one.examples[::-1], num_dropped=0, num_truncated=0)
    assert len({data.digest for data in (one, other_mask, other_border, other_ids)}) == 4


def test_the_digest_does_not_run_ids_of_one_example_into_the_mask_of_another():
    zeros = [Example(input_ids=torch.zeros(n, dtype=torch.int64), loss_mask=torch.zeros(n).bool()) for n in (1, 1, 2)]
    two, one = (EncodedData(examples=tuple(part), num_dropped=0, num_truncated=0) for part in (zeros[:2], zeros[2:]))
    assert two.digest != one.digest


def write_chats(path, *answers):
    turns = '{{"messages": [{{"role": "user", "content": "Hi"}}, {{"role": "assistant", "content": "{}"}}]}}\n'
    path.write_text("".join(turns.format(answer) for answer in answers))
    return path


def kept(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_tokens_of_an_earlier_run_are_taken_from_the_cache(tmp_path, caplog):
    path, cache, tokenizer = write_chats(tmp_path / "chats.jsonl", "a", "bc"), TensorCache(tmp_path), make_tokenizer()
    first = load_tokens(path, tokenizer, max_length=90, cache=cache)
    again = load_tokens(path, tokenizer, max_length=90, cache=cache)
    assert 1 == caplog.text.count("are read from")
    assert (first.digest, str(first)) == (again.digest, str(again))
    assert {torch.int64, torch.bool} == {again.examples[0].input_ids.dtype, again.examples[0].loss_mask.dtype}


def test_other_data_another_template_and_another_length_have_their_own_tokens(tmp_path):
    cache, path = TensorCache(tmp_path / "cache"), write_chats(tmp_path / "chats.jsonl", "a", "bc")
    load_tokens(path, make_tokenizer(), max_length=90, cache=cache)
    load_tokens(path, make_tokenizer(), max_length=60, cache=cache)
    load_tokens(path, make_tokenizer(TAGGED), max_length=90, cache=cache)
    write_chats(path, "a", "bd")
    load_tokens(path, make_tokenizer(), max_length=90, cache=cache)
    assert 4 == len(kept(cache.folder))
    assert kept_tokens(path, make_tokenizer(), max_length=90, cache=cache) is not None
    named = make_tokenizer()
    named.eos_token = "!"
    assert kept_tokens(path, named, max_length=90, cache=cache) is None
    other_format = path.rename(path.with_suffix(".parquet"))
    assert kept_tokens(other_format, make_tokenizer(), max_length=90, cache=cache) is None


def test_a_damaged_cache_file_is_made_anew_and_reported(tmp_path, caplog):
    path, cache, tokenizer = write_chats(tmp_path / "chats.jsonl", "a"), TensorCache(tmp_path), make_tokenizer()
    first = load_tokens(path, tokenizer, max_length=90, cache=cache)
    (name,) = kept(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    assert first.digest == load_tokens(path, tokenizer, max_length=90, cache=cache).digest
    assert "cannot be read" in caplog.text
    assert first.digest == load_tokens(path, tokenizer, max_length=90, cache=cache).digest


def test_a_full_disk_leaves_no_part_of_a_cache_file(tmp_path, monkeypatch):
    """The kernel says so when the content is flushed to the disk."""

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    path = write_chats(tmp_path / "chats.jsonl", "a")
    with pytest.raises(DataError, match=r"tokens-.* cannot be written: No space left on device\. Free some space or"):
        load_tokens(path, make_tokenizer(), max_length=90, cache=TensorCache(tmp_path / "cache"))
    assert [] == [one for one in (tmp_path / "cache").iterdir() if one.suffix != ".lock"]


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path):
    path = write_chats(tmp_path / "chats.jsonl", "a")
    with pytest.raises(DataError, match=r"chats\.jsonl/cache cannot be written: Not a directory\."):
        load_tokens(path, make_tokenizer(), max_length=90, cache=TensorCache(path / "cache"))


def test_tools_and_conversations_of_nothing_else_are_counted():
    chats = [
        chat(("user", "Hi"), ("assistant", "Ok")),
        Conversation(messages=(), where="chats.jsonl:8", num_tools=3),
    ]
    data = encode(chats, make_tokenizer(), max_length=90)
    assert (1, 3) == (data.num_dropped, data.num_tools)
    assert str(data).endswith(
        "1 dropped without a token to learn, 0 cut short; 3 tool descriptions, calls and results left out"
    )


def test_packing_changes_the_digest_of_a_run_but_not_of_its_tokens():
    data = make_data([0, 1], [1, 1], [1, 0, 1])
    packed = data.packed(4)
    assert ((2,), (0, 1)) == packed.packed_rows
    assert (data.token_digest, False) == (packed.token_digest, data.digest == packed.digest)
    assert packed.digest != data.packed(5).digest
    assert packed.digest != replace(packed, packed_rows=((0, 1), (2,))).digest


@st.composite
def dialogues(draw):
    """Turns in any order, with texts that hold line breaks, brackets and what looks like a template's tokens."""
    text = st.text(st.sampled_from("ab \n<|>:{}\u00e9\u4e2d"), min_size=1, max_size=8).filter(str.strip)
    answers = draw(st.lists(st.tuples(text, text), min_size=1, max_size=4))
    system = [("system", draw(text))] if draw(st.booleans()) else []
    return system + [turn for ask, answer in answers for turn in (("user", ask), ("assistant", answer))]


@given(dialogues(), st.sampled_from([CHATML, TAGGED]))
def test_what_is_supervised_is_what_the_assistant_said_and_its_end_of_turn(turns, template):
    """Both ways to find it agree with the texts that went in, byte by byte."""
    tokenizer = make_tokenizer(template)
    example = encode([chat(*turns)], tokenizer, max_length=10_000).examples[0]
    expected = [content + "<|im_end|>" for role, content in turns if role == "assistant"]
    assert expected == supervised_texts(tokenizer, example)


@given(dialogues(), st.integers(2, 60))
def test_a_shorter_length_only_cuts_the_end(turns, max_length):
    tokenizer = make_tokenizer()
    whole = encode([chat(*turns)], tokenizer, max_length=10_000).examples[0]
    if not whole.loss_mask[1:max_length].any():
        with pytest.raises(DataError, match=f"within the first {max_length} tokens"):
            encode([chat(*turns)], tokenizer, max_length=max_length)
        return
    short = encode([chat(*turns)], tokenizer, max_length=max_length).examples[0]
    assert whole.input_ids[:max_length].tolist() == short.input_ids.tolist()
    assert whole.loss_mask[:max_length].tolist() == short.loss_mask.tolist()
