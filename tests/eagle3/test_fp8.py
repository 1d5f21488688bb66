"""Tests for `eagle3.kernels.fp8` and the step that computes in it: bounds on errors, against float64."""

# Expected values stand on the left.

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eagle3.flat import FlatWeights
from eagle3.fused import FusedStep
from eagle3.kernels.fp8 import (
    E4M3,
    E5M2,
    Scaled,
    factor_of,
    library_product,
    product,
    quantise_rows,
    quantise_weight,
    swiglu_backward_rows,
    swiglu_rows,
    transpose,
    transposed,
    weight_gradient,
)
from eagle3.optimizer import FlatAdamW
from eagle3_steps import autograd, make_batch, make_draft, run_fused

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def normal(*shape, seed=0, device="cpu"):
    """In float64 on the CPU, in bfloat16 on a GPU; rows differ in size by powers of ten."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(shape, generator=generator) * 10 ** (2 * torch.rand(shape[0], 1, generator=generator) - 1)
    return x.bfloat16().to(device, torch.float64 if device == "cpu" else None)


def empty(num_rows, width, device):
    return Scaled(
        values_MK=torch.empty(num_rows, width, dtype=E4M3, device=device),
        scale=torch.empty(num_rows, 1, device=device),
    )


def quantised(x):
    out = empty(*x.shape, x.device)
    quantise_rows(x, out=out)
    return out


def value(scaled):
    return scaled.values_MK.cpu().double() * scaled.scale.cpu().double()


def check_rounded(expected, actual, *, bits=3):
    """Nothing is off by more than half a unit in its last place, or of the smallest number of its row."""
    expected = expected.cpu().double()
    floor = expected.abs().amax(dim=-1, keepdim=True) * 2.0**-16
    # Kernels round once more, to float32, and the exponential of a GPU is not exact.
    error = (expected - value(actual)).abs() - (2.0 ** -(bits + 1) + 1e-5) * expected.abs()
    assert (error <= floor).all(), error.max()


@given(st.floats(2.0**-40, 2.0**80, width=32))
def test_a_factor_is_the_largest_power_of_two_that_fits(peak):
    factor = factor_of(torch.tensor(peak)).item()
    assert math.frexp(factor)[0] == 0.5
    assert factor * peak <= 448 * (1 + 1e-6)
    assert 2 * factor * peak > 448 * (1 - 1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [16, 4096, 14336])
def test_numbers_keep_four_bits_and_rows_their_size(device, width):
    x = normal(37, width, device=device)
    x[5] = 0
    check_rounded(x, quantised(x))


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_finite_stays_so(device):
    x = torch.ones(3, 16, device=device)
    x[0, 3], x[1, 3] = math.inf, math.nan
    assert [False, False, True] == value(quantised(x)).sum(dim=-1).isfinite().tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_the_gated_activation_and_its_gradient_are_rounded_once(device):
    width = 1520
    gate_up, grad = normal(300, 2 * width, device=device), normal(300, width, seed=1, device=device)
    scale = torch.ldexp(torch.ones(300, 1), torch.arange(300)[:, None] % 7 - 3).to(device)
    active, back = empty(300, width, device), empty(300, 2 * width, device)
    swiglu_rows(gate_up, out=active)
    swiglu_backward_rows(gate_up, grad, scale, out=back)
    exact = gate_up.cpu().double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    expected.backward(grad.cpu().double() * scale.cpu())
    check_rounded(expected.detach(), active)
    check_rounded(exact.grad, back)


@pytest.mark.parametrize("device", DEVICES)
def test_a_weight_and_its_transpose_are_the_same_numbers(device):
    weight = normal(272, 400, device=device)
    factor = factor_of(weight.abs().max())
    values, back = (torch.empty(shape, dtype=E4M3, device=device) for shape in [(272, 400), (400, 272)])
    quantise_weight(weight, factor, out_NK=values, transposed_KN=back)
    assert torch.equal(values.float(), back.float().T)
    # One scale for all rows: what is small beside the largest of all loses bits.
    error = (weight.cpu().double() - values.cpu().double() / factor.item()).abs()
    assert (error <= 2.0**-4 * weight.cpu().abs() + weight.abs().max().item() * 2.0**-16).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_transpose_is_filled_up_with_zeros(device, dtype):
    x = normal(300, 144, device=device).float().to(dtype)
    out = torch.full((144, 1000), 7.0, device=device).to(dtype)
    transpose(x, out_KU=out[:, 320:624])
    assert torch.equal(x.float().T, out[:, 320:620].float())
    assert torch.equal(torch.zeros(144, 4, device=device), out[:, 620:624].float())
    assert torch.equal(torch.full((144, 320), 7.0, device=device), out[:, :320].float())


@pytest.mark.parametrize("device", DEVICES)
def test_the_factors_of_a_transpose_round_nothing(device):
    x = quantised(normal(50, 48, device=device)).values_MK
    factor = torch.ldexp(torch.ones(50), -(torch.arange(50) % 4)).to(device)
    expected = torch.zeros(48, 64, device=device)
    expected[:, :50] = (x.float() * factor[:, None]).T
    smallest = 2.0**-9
    difference = (expected - transposed(x, factor).float()).abs()
    assert (difference <= torch.where(expected.abs() < 2.0**-6, smallest / 2, 0)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("uniform", [False, True])
def test_products_are_those_of_the_numbers_that_were_kept(device, uniform):
    a, b = quantised(normal(100, 512, device=device)), quantised(normal(160, 512, seed=1, device=device))
    if uniform:
        a = Scaled(values_MK=a.values_MK, scale=torch.tensor(0.25, device=device))
    b = Scaled(values_MK=b.values_MK, scale=torch.tensor(2.0, device=device))
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    expected = value(a) @ value(b).T
    actual = product(a, b, dtype=dtype).cpu()
    # The GPU rounds to bfloat16, and its sums of FP8 products have 14 bits.
    tolerance = 1e-12 if device == "cpu" else 6e-3
    assert (expected - actual).norm() <= tolerance * expected.norm()
    if not uniform:
        alone = product(a, b, dtype=dtype, with_row_scale=False)
        assert torch.equal(actual, (alone * a.scale.to(dtype)).cpu())


def test_the_private_product_of_torch_takes_what_it_is_given_on_a_gpu():
    """Torch has it on the CPU, too, and there nobody calls it but this test."""
    scales = torch.tensor(0.25), torch.tensor(2.0)
    a, b = (
        Scaled(values_MK=quantised(normal(96, 512, seed=i)).values_MK, scale=scale) for i, scale in enumerate(scales)
    )
    out = torch.empty(96, 96, dtype=torch.bfloat16)
    library_product(a.values_MK, b.values_MK, *scales, out=out)
    torch.testing.assert_close(product(a, b, dtype=torch.bfloat16), out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("widths", [(64, 208), (208, 64)])
@pytest.mark.parametrize("num_rows", [0, 1, 300])
def test_a_weight_gradient_sums_over_rows_of_all_sizes(device, widths, num_rows):
    a, b = (quantised(normal(num_rows, width, seed=width, device=device)) for width in widths)
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    out = torch.full(widths, math.nan, dtype=dtype, device=device)
    weight_gradient(a, b, out_NK=out)
    expected = value(a).T @ value(b)
    # Rows that are small beside the largest lose bits of what they add.
    assert (expected - out.cpu()).norm() <= 1e-2 * expected.norm()


def make_wide_draft():
    return make_draft(hidden=64, heads=(4, 2), head_dim=16, vocab=160, draft_vocab=96, intermediate=112)


MASKS = {
    "spans": (torch.arange(120) % 40 >= 15).repeat(2, 1),
    "one token": torch.arange(120).repeat(2, 1) == 60,
    "nothing": torch.zeros(2, 120),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mask", MASKS)
def test_a_step_in_fp8_has_nearly_the_gradients_of_float64(device, mask):
    draft = make_wide_draft()
    batch = make_batch(draft, MASKS[mask].tolist())
    batch["hidden_BTE"] *= 2
    expected, expected_grads = autograd(draft, batch, num_steps=3)
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    weights = FlatWeights(draft.to(device), dtype=dtype, fp8=True)
    result, grads = run_fused(FusedStep(draft, weights, num_steps=3), weights, batch, num_steps=3)
    assert expected.loss_sum.item() == pytest.approx(result.loss_sum.item(), rel=2e-2)
    assert expected.counts.supervised.tolist() == result.counts.supervised.tolist()
    for name, grad in expected_grads.items():
        error = (grad - grads[name].cpu().double()).norm()
        assert error <= 0.2 * grad.norm(), f"{name}: {error / grad.norm()}"


def test_a_step_in_fp8_is_nothing_else_than_rounded(monkeypatch):
    """With wider numbers in the place of FP8 it is the step without: so no scale is lost on the way."""
    draft = make_wide_draft()
    batch = make_batch(draft, MASKS["spans"].tolist())
    expected, expected_grads = autograd(draft, batch, num_steps=3)
    for place in ("flat.E4M3", "layers.E4M3", "layers.E5M2"):
        monkeypatch.setattr(f"eagle3.{place}", torch.float64)
    weights = FlatWeights(draft, dtype=torch.float64, fp8=True)
    result, grads = run_fused(FusedStep(draft, weights, num_steps=3), weights, batch, num_steps=3)
    # Transposes go through float32.
    assert expected.loss_sum.item() == pytest.approx(result.loss_sum.item(), rel=1e-12)
    for name, grad in expected_grads.items():
        assert (grad - grads[name]).norm() <= 1e-6 * grad.norm(), name


def test_weights_in_fp8_follow_the_optimizer():
    draft = make_wide_draft()
    weights = FlatWeights(draft, dtype=torch.float32, fp8=True)
    weights.grad.normal_(generator=torch.Generator().manual_seed(0))
    FlatAdamW(weights, lr=0.1).step()
    followed = weights.fp8.gate_up.forward, weights.fp8.down.backward, weights.fp8.head.forward
    exact = weights.copies.gate_up_2IH, weights.copies.down_HI.T, weights.copies.head_DH
    for scaled, weight in zip(followed, exact, strict=True):
        assert (value(scaled) - weight.double()).norm() <= 0.04 * weight.norm()
    assert torch.equal(weights.copies.post_norm_H, weights.fp8.post_norm_H * weights.fp8.post_scale)


@pytest.mark.gpu
def test_a_gpu_is_as_near_to_the_truth_as_its_imitation():
    """In another order, and in bfloat16 between products: roundings differ, errors agree in size."""
    draft = make_draft(hidden=256, heads=(8, 2), head_dim=64, vocab=1520, draft_vocab=1008, intermediate=512)
    batch = make_batch(draft, (torch.arange(300) % 90 >= 30).repeat(2, 1).tolist())
    batch["hidden_BTE"] *= 4
    exact, exact_grads = autograd(draft, batch, num_steps=5)
    errors = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        weights = FlatWeights(draft.to(device), dtype=dtype, fp8=True)
        result, grads = run_fused(FusedStep(draft, weights, num_steps=5), weights, batch, num_steps=5)
        assert exact.loss_sum.item() == pytest.approx(result.loss_sum.item(), rel=1e-2)
        errors.append({name: (exact_grads[name] - grad.cpu().double()).norm() for name, grad in grads.items()})
    for name, grad in exact_grads.items():
        imitated, real = (error[name] / grad.norm() for error in errors)
        assert real <= 1.2 * imitated + 2e-2, f"{name}: {imitated}, on a GPU {real}"
