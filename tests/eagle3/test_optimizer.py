"""How the learning rate goes, and how gradients are scaled and shortened."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from eagle3.config import TrainConfig
from eagle3.flat import FlatWeights
from eagle3.optimizer import DraftOptimizer, FlatAdamW, lr_factor, scale_and_clip_
from eagle3_steps import make_draft


def factors(num_steps, warmup_ratio):
    shares = [step / num_steps for step in range(num_steps + 1)]
    return [lr_factor(*pair, warmup_ratio=warmup_ratio) for pair in itertools.pairwise(shares)]


def test_the_learning_rate_rises_in_a_line_and_falls_as_a_cosine():
    assert [0.25, 0.5, 0.75, 1.0] == pytest.approx(factors(8, 0.5)[:4])
    expected = [1.0, 0.5 * (1 + 0.5**0.5), 0.5, 0.5 * (1 - 0.5**0.5)]
    assert expected == pytest.approx(factors(8, 0.5)[4:])
    assert expected == pytest.approx(factors(4, 0.0))


@given(st.integers(1, 60), st.floats(0, 0.99))
def test_no_step_stands_still_and_the_rate_has_one_peak(num_steps, warmup_ratio):
    rates = factors(num_steps, warmup_ratio)
    assert all(0 < rate <= 1 for rate in rates)
    peak = rates.index(max(rates))
    assert sorted(rates[: peak + 1]) == rates[: peak + 1]
    assert sorted(rates[peak:], reverse=True) == rates[peak:]


def gradients(*values):
    parameters = [nn.Parameter(torch.zeros(len(value))) for value in values]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = torch.tensor(value)
    return parameters


@pytest.mark.parametrize(("scale", "max_norm"), [(0.5, 1.0), (0.5, 100.0), (2.0, 10.0), (0.0, 1.0)])
def test_gradients_are_scaled_before_they_are_shortened(scale, max_norm):
    values = ([3.0, -4.0], [12.0])
    expected = gradients(*[[scale * x for x in value] for value in values])
    expected_norm = nn.utils.clip_grad_norm_(expected, max_norm)
    actual = gradients(*values)
    norm = scale_and_clip_(actual, scale=torch.tensor(scale), max_norm=max_norm)
    torch.testing.assert_close(expected_norm, norm)
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_norms_do_not_decay_and_matrices_do():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.RMSNorm(2))
    optimizer = DraftOptimizer(model, TrainConfig(lr=0.1, weight_decay=0.5, warmup_ratio=0.0))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    lr, norm = optimizer.step(scale=torch.tensor(1.0), seen_before=0.0, seen_after=0.5)
    assert (0.1, 0.0) == (lr, float(norm))
    matrix, vector = model.parameters()
    torch.testing.assert_close(before[0] * (1 - 0.1 * 0.5), matrix.detach())
    assert torch.equal(before[1], vector.detach())
    assert (None, None) == (matrix.grad, vector.grad)


def test_the_first_step_of_a_run_moves_by_the_rate_at_its_end():
    model = nn.Linear(2, 2)
    optimizer = DraftOptimizer(model, TrainConfig(lr=0.1, warmup_ratio=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    lr, _ = optimizer.step(scale=torch.tensor(1.0), seen_before=0.0, seen_after=0.25)
    assert 0.05 == lr == optimizer.adamw.param_groups[0]["lr"]


def test_frozen_parameters_are_not_moved():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    optimizer = DraftOptimizer(model, TrainConfig(lr=0.1, weight_decay=0.5, warmup_ratio=0.0))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(scale=torch.tensor(1.0), seen_before=0.0, seen_after=0.5)
    is_moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert [True, True, False, False] == is_moved


def test_the_flat_optimizer_goes_on_counting_steps_where_another_stopped():
    """Adam corrects its averages by the number of steps."""
    weights = [FlatWeights(make_draft(), dtype=torch.float64) for _ in range(2)]
    first, second = (FlatAdamW(part, lr=0.1) for part in weights)
    for part in weights:
        part.grad.fill_(1.0)
    first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.no_grad():
        weights[1].master.copy_(weights[0].master)
    first.step()
    second.step()
    for one, other in zip(*(part.parameters.values() for part in weights), strict=True):
        assert torch.equal(one, other)
    assert {2.0} == {float(state["step"]) for state in second.state_dict()["state"].values()}
