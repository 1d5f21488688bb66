"""Tests for the attention of `eagle3.unroll`."""

# Expected values stand on the left.

import pytest
import torch
from torch.nn import functional

from eagle3.unroll import row_attention


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 2), (6, 2), (3, 3)])
def test_at_step_zero_all_rows_together_are_causal_attention(num_heads, num_kv_heads):
    q, k, v = normal(2, 5, num_heads, 4), normal(2, 5, num_kv_heads, 4), normal(2, 5, num_kv_heads, 4) + 1
    expected = functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    actual = row_attention(q.flatten(0, 1), k, v, same_row_k=[], same_row_v=[], rows_N=torch.arange(10))
    torch.testing.assert_close(expected.flatten(0, 1), actual, rtol=1e-12, atol=1e-12)


def test_a_row_sees_step_zero_up_to_itself_and_its_own_later_keys():
    """With equal scores the result is the mean of the visible values."""
    q, k0 = torch.zeros(3, 1, 2, dtype=torch.float64), normal(2, 4, 1, 2)
    v0 = torch.tensor([[1.0, 2.0, 4.0, 8.0], [100.0, 200.0, 400.0, 800.0]], dtype=torch.float64)
    own_v = [torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64), torch.tensor([7.0, 8.0, 9.0], dtype=torch.float64)]
    attended = row_attention(
        q,
        k0,
        v0[..., None, None].expand(2, 4, 1, 2),
        same_row_k=[normal(3, 1, 2), normal(3, 1, 2)],
        same_row_v=[own[:, None, None].expand(3, 1, 2) for own in own_v],
        rows_N=torch.tensor([0, 2, 5]),
    )
    expected = [(1 + 10 + 7) / 3, (1 + 2 + 4 + 20 + 8) / 5, (100 + 200 + 30 + 9) / 4]
    torch.testing.assert_close(torch.tensor(expected, dtype=torch.float64), attended[:, 0, 0], rtol=1e-12, atol=0)


def test_gradients_are_right():
    q, k0, v0, k1, v1 = (
        tensor.requires_grad_()
        for tensor in (normal(3, 4, 2), normal(2, 3, 2, 2), normal(2, 3, 2, 2), *normal(2, 3, 2, 2))
    )
    rows = torch.tensor([1, 2, 4])
    assert torch.autograd.gradcheck(
        lambda q, k0, v0, k1, v1: row_attention(q, k0, v0, same_row_k=[k1], same_row_v=[v1], rows_N=rows),
        (q, k0, v0, k1.detach().requires_grad_(), v1.detach().requires_grad_()),
    )


def test_no_rows_leave_keys_and_values_in_the_graph():
    k0, v0 = (torch.ones(2, 3, 1, 2, requires_grad=True) for _ in range(2))
    attended = row_attention(
        torch.zeros(0, 2, 2), k0, v0, same_row_k=[], same_row_v=[], rows_N=torch.zeros(0, dtype=torch.int64)
    )
    assert (0, 2, 2) == tuple(attended.shape)
    attended.sum().backward()
    assert torch.equal(torch.zeros_like(k0), k0.grad)
    assert torch.equal(torch.zeros_like(v0), v0.grad)


def test_bfloat16_attention_takes_its_softmax_in_float32():
    q, k, v = normal(1, 64, 2, 8), normal(1, 64, 1, 8), normal(1, 64, 1, 8)
    arguments = {"same_row_k": [], "same_row_v": [], "rows_N": torch.arange(64)}
    rounded = [tensor.bfloat16() for tensor in (q.flatten(0, 1), k, v)]
    actual = row_attention(*rounded, **arguments)
    expected = row_attention(*(tensor.double() for tensor in rounded), **arguments)
    assert torch.bfloat16 == actual.dtype
    torch.testing.assert_close(expected, actual.double(), rtol=2e-2, atol=2e-2)
