"""Tests for `eagle3.loss`."""

# Expected values stand on the left.

import math

import pytest
import torch
from torch.nn import functional

from eagle3.loss import Objective, StepCounts, head_loss


def case(num_pairs=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    states, head, teacher, weight = (
        torch.randn(*shape, dtype=dtype, generator=generator)
        for shape in ((num_pairs, 4), (6, 4), (3, 6), (num_pairs,))
    )
    index = torch.randint(3, (num_pairs,), generator=generator)
    return {
        "states_PH": states.requires_grad_(),
        "head_DH": head.requires_grad_(),
        "teacher_logits_MD": 3 * teacher,
        "teacher_index_P": index,
        "weight_P": weight.abs(),
    }


def plain(states_PH, head_DH, teacher_logits_MD, teacher_index_P, weight_P):
    p = teacher_logits_MD[teacher_index_P].softmax(dim=-1)
    logits = states_PH @ head_DH.T
    return (weight_P * functional.cross_entropy(logits, p, reduction="none")).sum(), logits.argmax(dim=-1)


def plain_acceptance(states_PH, head_DH, teacher_logits_MD, teacher_index_P, weight_P, *, mass_M, objective):
    p = teacher_logits_MD[teacher_index_P].softmax(dim=-1)
    q = (states_PH @ head_DH.T).softmax(dim=-1)
    accepted = torch.minimum(p * mass_M[teacher_index_P, None], q).sum(dim=-1)
    if objective.kind == "lk_alpha":
        return (weight_P * -accepted.log()).sum()
    share = (-objective.lk_decay * accepted.detach()).exp()
    divergence = functional.kl_div(q.log(), p, reduction="none").sum(dim=-1)
    return (weight_P * (share * divergence + (1 - share) * (1 - accepted))).sum()


def gradients(loss, tensors):
    return torch.autograd.grad(loss, (tensors["states_PH"], tensors["head_DH"]))


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 100])
def test_loss_and_gradients_are_those_of_plain_autograd(chunk_size):
    """Several pairs share a teacher row, and the last chunk may be short."""
    tensors = case()
    expected, expected_argmax = plain(**tensors)
    loss, argmax = head_loss(**tensors, chunk_size=chunk_size)
    torch.testing.assert_close(expected, loss, rtol=1e-12, atol=0)
    assert expected_argmax.tolist() == argmax.tolist()
    for one, other in zip(gradients(expected, tensors), gradients(loss, tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
@pytest.mark.parametrize("objective", [Objective(kind="lk_alpha"), Objective(kind="lk_lambda", lk_decay=1.5)])
def test_losses_of_the_acceptance_rate_have_the_gradients_of_plain_autograd(objective, chunk_size):
    tensors, mass_M = case(), torch.tensor([1.0, 0.9, 0.2], dtype=torch.float64)
    expected = plain_acceptance(**tensors, mass_M=mass_M, objective=objective)
    loss, _ = head_loss(**tensors, mass_M=mass_M, objective=objective, chunk_size=chunk_size)
    torch.testing.assert_close(expected, loss, rtol=1e-12, atol=0)
    for one, other in zip(gradients(expected, tensors), gradients(loss, tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_acceptance_rate_counts_what_lies_outside_the_draft_vocabulary_as_refused():
    """Half of the target's mass is outside; the draft proposes what is inside in the same proportions."""
    even = {"states_PH": torch.zeros(1, 4), "head_DH": torch.ones(6, 4), "teacher_logits_MD": torch.zeros(1, 6)}
    index, weight = torch.tensor([0]), torch.tensor([2.0])
    loss, _ = head_loss(
        **even, teacher_index_P=index, weight_P=weight, mass_M=torch.tensor([0.5]), objective=Objective(kind="lk_alpha")
    )
    assert 2 * math.log(2) == pytest.approx(loss.item())


def test_a_draft_that_is_never_accepted_adds_nothing_to_lk_alpha():
    """Its logarithm would be infinite, and there is no slope to follow."""
    head = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    loss, _ = head_loss(
        torch.ones(1, 1),
        head,
        torch.tensor([[-200.0, 200.0]]),
        torch.tensor([0]),
        torch.ones(1),
        mass_M=torch.ones(1),
        objective=Objective(kind="lk_alpha"),
    )
    loss.backward()
    assert (0.0, [[0.0], [0.0]]) == (loss.item(), head.grad.tolist())


def test_bfloat16_losses_of_the_acceptance_rate_stay_near_those_of_float64():
    tensors = {name: t.detach().bfloat16() if t.is_floating_point() else t for name, t in case(num_pairs=3000).items()}
    for name in ("states_PH", "head_DH"):
        tensors[name].requires_grad_()
    exact = {
        name: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for name, t in tensors.items()
    }
    mass_M = torch.tensor([1.0, 0.9, 0.2])
    for objective in (Objective(kind="lk_alpha"), Objective(kind="lk_lambda")):
        loss, _ = head_loss(**tensors, mass_M=mass_M, objective=objective)
        expected = plain_acceptance(**exact, mass_M=mass_M.double(), objective=objective)
        assert expected.item() == pytest.approx(loss.item(), rel=2e-3)
        for one, other in zip(gradients(expected, exact), gradients(loss, tensors), strict=True):
            assert 1e-2 * one.norm().item() > (one - other.double()).norm().item()


def test_chunks_of_bfloat16_add_up_in_float32():
    """In bfloat16, a sum would stop growing after 256 equal addends."""
    head_DH = torch.zeros(2, 1, dtype=torch.bfloat16).requires_grad_()
    loss, _ = head_loss(
        states_PH=torch.ones(1024, 1, dtype=torch.bfloat16),
        head_DH=head_DH,
        teacher_logits_MD=torch.tensor([[0.0, 3.0]], dtype=torch.bfloat16),
        teacher_index_P=torch.zeros(1024, dtype=torch.int64),
        weight_P=torch.ones(1024),
        chunk_size=1,
    )
    loss.backward()
    expected = 1024 * (0.5 - 1 / (1 + math.exp(3)))
    assert [expected, -expected] == pytest.approx(head_DH.grad[:, 0].tolist(), rel=1e-2)


def test_the_gradient_is_scaled_by_what_comes_from_above():
    tensors = case()
    expected = gradients(head_loss(**tensors)[0], tensors)
    scaled = gradients(-2.5 * head_loss(**tensors)[0], tensors)
    for one, other in zip(expected, scaled, strict=True):
        torch.testing.assert_close(-2.5 * one, other, rtol=1e-12, atol=1e-14)


def test_backward_may_run_twice():
    tensors = case()
    loss, _ = head_loss(**tensors)
    loss.backward(retain_graph=True)
    once = tensors["head_DH"].grad.clone()
    loss.backward()
    torch.testing.assert_close(2 * once, tensors["head_DH"].grad, rtol=1e-12, atol=0)


def test_no_pairs_give_zero_loss_and_zero_gradients():
    tensors = case(num_pairs=0)
    loss, argmax = head_loss(**tensors)
    assert (0.0, 0) == (loss.item(), len(argmax))
    states_grad, head_grad = gradients(loss, tensors)
    assert (0, 4) == tuple(states_grad.shape)
    assert torch.equal(torch.zeros(6, 4, dtype=torch.float64), head_grad)


def test_without_grad_the_loss_is_the_same():
    tensors = case()
    expected, _ = head_loss(**tensors)
    with torch.no_grad():
        loss, _ = head_loss(**tensors)
    assert expected.item() == loss.item()
    assert not loss.requires_grad


def test_a_frozen_head_gets_no_gradient():
    tensors = case()
    tensors["head_DH"].requires_grad_(False)
    head_loss(**tensors)[0].backward()
    assert tensors["head_DH"].grad is None
    assert tensors["states_PH"].grad is not None


def test_extreme_logits_stay_finite():
    tensors = case()
    tensors["teacher_logits_MD"] = 1e4 * tensors["teacher_logits_MD"]
    tensors["states_PH"] = (1e4 * tensors["states_PH"]).detach().requires_grad_()
    loss, _ = head_loss(**tensors)
    expected, _ = plain(**tensors)
    torch.testing.assert_close(expected, loss, rtol=1e-12, atol=0)
    assert all(grad.isfinite().all() for grad in gradients(loss, tensors))


def test_bfloat16_sums_in_float32():
    tensors = {name: t.detach().bfloat16() if t.is_floating_point() else t for name, t in case(num_pairs=3000).items()}
    for name in ("states_PH", "head_DH"):
        tensors[name].requires_grad_()
    exact = {
        name: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for name, t in tensors.items()
    }
    loss, _ = head_loss(**tensors, chunk_size=64)
    expected, _ = plain(**exact)
    assert torch.float32 == loss.dtype
    assert expected.item() == pytest.approx(loss.item(), rel=2e-3)
    for one, other in zip(gradients(expected, exact), gradients(loss, tensors), strict=True):
        assert torch.bfloat16 == other.dtype
        assert 1e-2 * one.norm().item() > (one - other.double()).norm().item()


def test_autocast_multiplies_in_its_dtype_and_returns_gradients_of_the_weights_dtype():
    tensors = case(dtype=torch.float32)
    expected, _ = plain(**tensors)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = head_loss(**tensors)
    assert expected.item() == pytest.approx(loss.item(), rel=1e-2)
    assert expected.item() != loss.item()
    assert [torch.float32] * 2 == [grad.dtype for grad in gradients(loss, tensors)]


def hand_made():
    """Three steps of five rows; the last row is supervised again after a gap."""
    supervised = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 1]], dtype=torch.bool)
    hits = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 0, 0, 0], [0, 1, 0, 0, 1]], dtype=torch.bool)
    return StepCounts.count(supervised, hits)


def test_counts_follow_rows_through_the_steps():
    counts = hand_made()
    assert [5, 3, 3] == counts.supervised.tolist()
    assert [3, 2, 2] == counts.hits.tolist()
    assert [5, 3, 2] == counts.chain_rows.tolist()
    assert [3, 1, 0] == counts.chain_hits.tolist()


def test_accept_length_counts_joint_prefixes():
    """The product of accuracies would give 3/5 + 3/5 * 2/3 + 3/5 * 2/3 * 2/3."""
    counts = hand_made()
    assert 3 / 5 + 1 / 3 + 0 / 2 == pytest.approx(counts.accept_length())
    assert [3 / 5, 2 / 3, 2 / 3] == pytest.approx(counts.accuracy())


def test_an_unsupervised_hit_does_not_count():
    counts = StepCounts.count(torch.tensor([[False, True]]), torch.tensor([[True, True]]))
    assert ([1], [1]) == (counts.hits.tolist(), counts.chain_hits.tolist())


def test_counts_of_nothing_are_zero():
    counts = StepCounts.count(torch.zeros(2, 0, dtype=torch.bool), torch.zeros(2, 0, dtype=torch.bool))
    assert [0.0, 0.0] == counts.accuracy()
    assert 0.0 == counts.accept_length()


def test_counts_add():
    counts = hand_made()
    double = counts + counts
    assert [10, 6, 6] == double.supervised.tolist()
    assert counts.accept_length() == pytest.approx(double.accept_length())


def test_counts_travel_as_one_tensor():
    counts = hand_made()
    tensor = counts.as_tensor()
    assert ((4, 3), torch.int64) == (tuple(tensor.shape), tensor.dtype)
    assert tensor.tolist() == StepCounts.from_tensor(tensor).as_tensor().tolist()
