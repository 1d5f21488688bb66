import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from eagle3.data import (
    BatchOrder,
    Conversation,
    EncodedData,
    Example,
    Message,
    batches,
    collate,
    encode,
    load_conversations,
)
from eagle3.errors import DataError

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
    "{{ m['content'] + '<|im_end|>' }}{% endfor %}"
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
    with pytest.raises(DataError, match=r"chats\.jsonl cannot be read: No such file or directory\."):
        load_conversations(tmp_path / "chats.jsonl")


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


def test_tokens_that_cross_from_the_prompt_are_not_supervised():
    """A template may end its prompt in a letter that the tokenizer joins with the answer's first."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "u": 2, ":": 3, "ab": 4}, [("a", "b")]))
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)
    data = encode([chat(("user", "u:a"), ("assistant", "ba"))], wrapped, max_length=10)
    assert data.examples[0].input_ids.tolist() == [2, 3, 4, 0]
    assert data.examples[0].loss_mask.tolist() == [False, False, False, True]


def test_a_template_that_rewrites_earlier_turns_is_refused_with_advice():
    chats = [chat(("user", "Hi"), ("assistant", "Hello"), ("user", "So"), ("assistant", "Bye"))]
    with pytest.raises(DataError) as caught:
        encode(chats, make_tokenizer(FORGETFUL), max_length=200)
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
    with pytest.raises(DataError, match=r"chats\.jsonl:7: the chat template refuses the first 2 messages: no system"):
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


def test_padding_stands_on_the_right_and_is_not_supervised():
    batch = collate(make_data([0, 1, 1], [1]).examples, pad_id=9)
    assert batch.input_ids_BT.tolist() == [[0, 0, 0], [1, 9, 9]]
    assert batch.loss_mask_BT.tolist() == [[False, True, True], [True, False, False]]
    assert (batch.input_ids_BT.dtype, batch.loss_mask_BT.dtype) == (torch.int64, torch.bool)


@st.composite
def layouts(draw):
    """How many examples a run has, and how they are split."""
    return draw(st.integers(1, 40)), draw(st.integers(1, 4)), draw(st.integers(1, 5))


@given(layouts(), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_counts_every_example_once_over_all_ranks(layout, seed, epoch):
    num_examples, batch_size, world_size = layout
    orders = [
        BatchOrder(num_examples, batch_size=batch_size, rank=rank, world_size=world_size, seed=seed)
        for rank in range(world_size)
    ]
    steps = [list(order.epoch(epoch)) for order in orders]
    assert {-(-num_examples // (batch_size * world_size))} == {len(own) for own in steps}
    assert {batch_size} == {len(picks) for own in steps for picks in own}
    counted = sorted(pick.index for own in steps for picks in own for pick in picks if pick.supervised)
    assert list(range(num_examples)) == counted


@given(layouts(), st.integers(0, 12))
def test_a_later_start_continues_the_same_epoch(layout, start_step):
    num_examples, batch_size, world_size = layout
    order = BatchOrder(num_examples, batch_size=batch_size, rank=0, world_size=world_size, seed=1)
    assert list(order.epoch(2))[start_step:] == list(order.epoch(2, start_step=start_step))


@given(st.integers(1, 40))
def test_a_step_holds_the_same_examples_however_many_ranks_split_it(num_examples):
    def counted(world_size):
        per_rank = [
            list(BatchOrder(num_examples, batch_size=4 // world_size, rank=r, world_size=world_size, seed=5).epoch(0))
            for r in range(world_size)
        ]
        return [{pick.index for picks in step for pick in picks} for step in zip(*per_rank, strict=True)]

    assert counted(1) == counted(2) == counted(4)


def test_seed_and_epoch_both_change_the_order():
    def indices(seed, epoch):
        order = BatchOrder(50, batch_size=50, rank=0, world_size=1, seed=seed)
        return tuple(pick.index for pick in next(order.epoch(epoch)))

    assert len({indices(0, 0), indices(0, 1), indices(1, 0), indices(1, 1)}) == 4


def test_repeats_that_fill_the_last_step_are_not_supervised():
    data = make_data([1, 1], [1, 1, 1], [1, 1])
    order = BatchOrder(3, batch_size=2, rank=0, world_size=1, seed=0)
    first, last = batches(data, order=order, epoch=0, pad_id=9)
    repeated = first.input_ids_BT[0, 0]
    assert repeated == last.input_ids_BT[1, 0]
    assert last.loss_mask_BT[0].any()
    assert not last.loss_mask_BT[1].any()
    assert data.examples[repeated].loss_mask.all()


def test_reading_batches_leaves_the_global_random_numbers_alone():
    state = torch.random.get_rng_state()
    list(batches(make_data([0, 1]), order=BatchOrder(1, batch_size=1, rank=0, world_size=1, seed=0), epoch=0, pad_id=0))
    assert torch.equal(state, torch.random.get_rng_state())
