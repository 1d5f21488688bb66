from collections import Counter

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from eagle3.errors import ConfigError, DataError
from eagle3.tokens import Example
from eagle3.vocab import choose_draft_vocab, count_supervised, forced_ids


@st.composite
def choices(draw):
    """Counts of a vocabulary, ids forced into the draft's, and a size with room for them."""
    counts = draw(st.lists(st.integers(0, 3), min_size=1, max_size=30))
    forced = draw(st.sets(st.integers(0, len(counts) - 1)))
    size = draw(st.integers(max(1, len(forced)), len(counts)))
    return counts, forced, size


def slow_choice(counts, forced, size):
    free = sorted((-count, index) for index, count in enumerate(counts) if index not in forced)
    return sorted([*forced, *(index for _, index in free[: size - len(forced)])])


@given(choices())
@example(([0, 0, 0], set(), 2))
@example(([0, 5, 5, 5], {0, 3}, 3))
def test_the_most_frequent_ids_are_kept_and_ties_go_to_the_lower_id(choice):
    counts, forced, size = choice
    vocab = choose_draft_vocab(torch.tensor(counts), size=size, forced_ids=forced)
    assert slow_choice(counts, forced, size) == vocab.ids_D.tolist()


@given(choices())
def test_both_maps_and_the_coverage_follow_from_the_kept_ids(choice):
    counts, forced, size = choice
    vocab = choose_draft_vocab(torch.tensor(counts), size=size, forced_ids=forced)
    kept = vocab.ids_D.tolist()
    assert size == vocab.size == len(kept)
    assert torch.int64 == vocab.ids_D.dtype == vocab.d2t_D.dtype
    assert kept == [j + offset for j, offset in enumerate(vocab.d2t_D.tolist())]
    assert [index in kept for index in range(len(counts))] == vocab.t2d_V.tolist()
    inside = sum(counts[index] for index in kept)
    assert pytest.approx(inside / sum(counts) if sum(counts) else 1.0) == vocab.coverage


def test_no_size_keeps_the_whole_vocabulary():
    vocab = choose_draft_vocab(torch.tensor([0, 7, 0]), size=None, forced_ids=[2])
    assert vocab.ids_D.tolist() == [0, 1, 2]
    assert vocab.d2t_D.tolist() == [0, 0, 0]
    assert vocab.coverage == 1.0


def test_a_draft_vocabulary_larger_than_the_targets_is_refused():
    expected = (
        "draft.vocab_size is 4, but it must be at least 1 to hold the 0 special tokens, and at most 3, the target's "
        "vocabulary."
    )
    with pytest.raises(ConfigError) as caught:
        choose_draft_vocab(torch.tensor([1, 1, 1]), size=4, forced_ids=[])
    assert expected == str(caught.value)


def test_a_draft_vocabulary_without_room_for_the_special_tokens_is_refused():
    with pytest.raises(ConfigError, match=r"draft.vocab_size is 1, but it must be at least 2 to hold the 2 special"):
        choose_draft_vocab(torch.tensor([1, 1, 1]), size=1, forced_ids=[0, 2])


def test_a_forced_id_outside_the_vocabulary_is_refused():
    with pytest.raises(ConfigError, match=r"Forced ids \[0, 3\] must lie in the target's vocabulary of 3 tokens\."):
        choose_draft_vocab(torch.tensor([1, 1, 1]), size=3, forced_ids=[0, 3])


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1), min_size=1))
def test_only_tokens_of_the_assistant_are_counted(rows):
    examples = [
        Example(input_ids=torch.tensor([i for i, _ in row]), loss_mask=torch.tensor([flag for _, flag in row]))
        for row in rows
    ]
    expected = Counter(index for row in rows for index, flag in row if flag)
    assert [expected[index] for index in range(10)] == count_supervised(examples, 10).tolist()


def test_an_id_that_the_embedding_lacks_is_refused():
    examples = [Example(input_ids=torch.tensor([1, 12]), loss_mask=torch.tensor([True, True]))]
    with pytest.raises(DataError, match=r"Token id 12 is in the data, but the target's embedding has 10 rows\."):
        count_supervised(examples, 10)


def test_special_tokens_below_the_vocabulary_size_are_forced():
    words = {"<s>": 0, "word": 1, "</s>": 2, "<tool>": 3, "<late>": 4}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<s>")),
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<tool>", "<late>"],
    )
    counts = torch.zeros(4, dtype=torch.int64)
    assert (0, 2, 3) == forced_ids(tokenizer, counts)
    assert (0, 1, 2, 3) == forced_ids(tokenizer, counts, end_ids=[1, 9])
