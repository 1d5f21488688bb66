"""Tests for `eagle3.teacher`."""

# Expected values stand on the left.

import pytest
import torch

from eagle3.teacher import teach


def target(num_rows=7):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, 5, dtype=torch.float64, generator=generator)
    return hidden, torch.randn(9, 5, dtype=torch.float64, generator=generator)


def test_a_teacher_has_the_draft_rows_and_the_argmax_of_all_rows():
    hidden, head = target()
    ids = torch.tensor([0, 2, 3, 8])
    teacher = teach(hidden, head, ids)
    logits = hidden @ head.T
    torch.testing.assert_close(logits[:, ids], teacher.logits_MD, rtol=1e-12, atol=0)
    assert logits.argmax(dim=1).tolist() == teacher.argmax_M.tolist()
    assert [int(best) in ids.tolist() for best in logits.argmax(dim=1)] == teacher.in_vocab_M.tolist()
    assert {False, True} == set(teacher.in_vocab_M.tolist())


def test_the_mass_is_the_probability_of_the_draft_vocabulary():
    hidden, head = target()
    ids = torch.tensor([0, 2, 8])
    expected = (hidden @ head.T).softmax(dim=-1)[:, ids].sum(dim=-1)
    torch.testing.assert_close(expected, teach(hidden, head, ids, with_mass=True, chunk_size=3).mass_M)
    whole = teach(hidden, head, torch.arange(9), with_mass=True).mass_M
    torch.testing.assert_close(torch.ones(7, dtype=torch.float64), whole)
    assert teach(hidden, head, ids).mass_M is None


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_the_chunk_size_does_not_matter(chunk_size):
    hidden, head = target()
    ids = torch.tensor([1, 4])
    expected, actual = teach(hidden, head, ids), teach(hidden, head, ids, chunk_size=chunk_size)
    torch.testing.assert_close(expected.logits_MD, actual.logits_MD, rtol=1e-12, atol=1e-14)
    assert torch.equal(expected.argmax_M, actual.argmax_M)
    assert torch.equal(expected.in_vocab_M, actual.in_vocab_M)


def test_of_equal_logits_the_lowest_id_wins():
    hidden, head = torch.ones(1, 2), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    teacher = teach(hidden, head, torch.tensor([2, 3]))
    assert [1] == teacher.argmax_M.tolist()
    assert [False] == teacher.in_vocab_M.tolist()


def test_no_rows_make_an_empty_teacher():
    hidden, head = target(num_rows=0)
    teacher = teach(hidden, head, torch.tensor([1, 4]))
    assert (0, 2) == tuple(teacher.logits_MD.shape)
    assert (0, 0) == (len(teacher.argmax_M), len(teacher.in_vocab_M))


def test_a_teacher_is_outside_any_graph():
    hidden, head = target()
    assert not teach(hidden.requires_grad_(), head.requires_grad_(), torch.tensor([1])).logits_MD.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_keep_the_dtype_of_the_hidden_states(dtype):
    hidden, head = target()
    assert dtype == teach(hidden.to(dtype), head.to(dtype), torch.tensor([1])).logits_MD.dtype
