from collections import Counter

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from eagle3.errors import ConfigError, DataError
from eagle3.files import TensorCache
from eagle3.tokens import EncodedData, Example
from eagle3.vocab import DraftVocab, choose_draft_vocab, count_supervised, draft_vocab, forced_ids, require_coverage


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
    assert (0, 1, 2, 3) == forced_ids(tokenizer, counts, end_ids=[-1, 1, 9])


def test_added_special_tokens_that_the_assistant_writes_are_forced():
    """A template may end a turn with another token than the tokenizer's end of sequence."""
    words = {"<s>": 0, "word": 1, "</s>": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<s>")), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_tokens([AddedToken("<end>", special=True), AddedToken("<never>", special=True)])
    counts = torch.tensor([0, 9, 1, 4, 0])
    assert (0, 2, 3) == forced_ids(tokenizer, counts)


@pytest.mark.parametrize(("coverage", "refused"), [(0.49, True), (0.5, False)])
def test_a_vocabulary_that_holds_too_little_of_the_data_is_refused(coverage, refused):
    vocab = DraftVocab(ids_D=torch.arange(3), target_size=9, coverage=coverage)
    if not refused:
        require_coverage(vocab, 0.5)
        return
    with pytest.raises(ConfigError) as caught:
        require_coverage(vocab, 0.5)
    expected = (
        "The draft's 3 tokens are only 49.00% of what the assistant wrote, below draft.min_coverage "
        "50.00%; the draft could never propose the rest. Raise draft.vocab_size, or lower draft.min_coverage if that "
        "is meant."
    )
    assert expected == str(caught.value)


def test_a_vocabulary_is_kept_with_both_maps_under_a_digest_of_what_it_depends_on(tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    example = Example(input_ids=torch.tensor([0, 3, 3, 5]), loss_mask=torch.tensor([False, True, True, True]))
    data = EncodedData(examples=(example,), num_dropped=0, num_truncated=0)
    options = {"target_vocab_size": 7, "end_ids": (6,), "cache": TensorCache(tmp_path)}
    vocab = draft_vocab(data, tokenizer, size=3, **options)
    (path,) = tmp_path.glob("vocab-*.safetensors")
    kept = load_file(path)
    assert [3, 5, 6] == vocab.ids_D.tolist() == (torch.arange(3) + kept["d2t"]).tolist()
    assert vocab.t2d_V.tolist() == kept["t2d"].tolist()
    assert [0, 0, 0, 2, 0, 1, 0] == kept["counts"].tolist()
    draft_vocab(data, tokenizer, size=3, **options)
    assert 1 == len(list(tmp_path.glob("vocab-*.safetensors")))
    draft_vocab(data, tokenizer, size=4, **options)
    assert 2 == len(list(tmp_path.glob("vocab-*.safetensors")))
