"""Tests for `eagle3.fused`: the step by hand against autograd."""

# Expected values stand on the left.

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle3.flat import FlatWeights
from eagle3.fused import FusedStep
from eagle3.graphs import GraphedStep, StepInputs, rounded
from eagle3.kernels.causal import Segments, causal_attention
from eagle3.kernels.heads import Heads, place_keys_values
from eagle3.kernels.rowwise import swiglu, swiglu_backward_
from eagle3.kernels.same_row import merge_same_row_
from eagle3.optimizer import FlatAdamW, clip_factor
from eagle3.pairs import padded, plan_pairs
from eagle3.teacher import TeacherHead
from eagle3.unroll import plan_rows
from eagle3_steps import autograd, check_equal, make_batch, make_draft, run_fused

MASK = [[0, 0, 1, 1, 1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0, 1, 0, 0]]


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_all_sums_and_gradients_are_those_of_autograd(num_steps):
    draft = make_draft()
    batch = make_batch(draft, MASK)
    expected = autograd(draft, batch, num_steps=num_steps)
    weights = FlatWeights(draft, dtype=torch.float64)
    step = FusedStep(draft, weights, num_steps=num_steps)
    check_equal(expected, run_fused(step, weights, batch, num_steps=num_steps), 1e-10)


@settings(max_examples=25, deadline=None)
@given(
    mask=st.integers(1, 9).flatmap(
        lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=3)
    ),
    num_steps=st.integers(1, 4),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 4), (8, 2)]),
)
def test_any_mask_gives_the_gradients_of_autograd(mask, num_steps, heads):
    draft = make_draft(heads=heads)
    batch = make_batch(draft, mask)
    expected = autograd(draft, batch, num_steps=num_steps)
    weights = FlatWeights(draft, dtype=torch.float64)
    check_equal(
        expected, run_fused(FusedStep(draft, weights, num_steps=num_steps), weights, batch, num_steps=num_steps), 1e-9
    )


@settings(max_examples=25, deadline=None)
@given(
    row=st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=2, max_size=12),
    num_steps=st.integers(1, 4),
)
def test_documents_side_by_side_give_the_gradients_of_autograd(row, num_steps):
    draft = make_draft()
    batch = make_batch(draft, [[masked for masked, _ in row]] * 2)
    documents = torch.tensor([[number for _, number in row]] * 2).sort(dim=1).values
    batch["documents_BT"] = documents
    expected = autograd(draft, batch, num_steps=num_steps)
    weights = FlatWeights(draft, dtype=torch.float64)
    step = FusedStep(draft, weights, num_steps=num_steps)
    check_equal(expected, run_fused(step, weights, batch, num_steps=num_steps), 1e-9)


def test_rows_and_pairs_that_only_fill_a_shape_change_nothing():
    draft = make_draft()
    batch = make_batch(draft, MASK)
    expected = autograd(draft, batch, num_steps=3)
    weights = FlatWeights(draft, dtype=torch.float64)
    step = FusedStep(draft, weights, num_steps=3)

    def fill(plan):
        return padded(plan, num_rows=len(plan.row_N) + 3, num_pairs=len(plan.step_P) + 5, num_teachers=20)

    check_equal(expected, run_fused(step, weights, batch, num_steps=3, change=fill), 1e-10)


def test_the_sums_without_gradients_are_the_same_and_leave_gradients_alone():
    draft = make_draft()
    batch = make_batch(draft, MASK)
    weights = FlatWeights(draft, dtype=torch.float64)
    step = FusedStep(draft, weights, num_steps=3)
    learned, _ = run_fused(step, weights, batch, num_steps=3)
    weights.grad.fill_(7.0)
    scored, grads = run_fused(step, weights, batch, num_steps=3, with_gradients=False)
    assert learned.loss_sum == scored.loss_sum
    assert learned.counts.as_tensor().tolist() == scored.counts.as_tensor().tolist()
    assert {7.0} == {value for grad in grads.values() for value in grad.unique().tolist()}


def test_gradients_are_handed_over_when_they_are_finished_each_once():
    draft = make_draft()
    weights = FlatWeights(draft, dtype=torch.float64)
    weights.grad.fill_(7.0)
    handed = []

    def keep(part):
        handed.append((part, part.clone()))

    run_fused(FusedStep(draft, weights, num_steps=3), weights, make_batch(draft, MASK), num_steps=3, on_gradients=keep)
    assert all(torch.equal(then, part) for part, then in handed)
    places = sorted((part.storage_offset(), len(part)) for part, _ in handed)
    assert len(weights.grad) == sum(size for _, size in places)
    assert [start + size for start, size in places[:-1]] == [start for start, _ in places[1:]]


def test_a_second_batch_with_another_mask_owes_nothing_to_the_first():
    draft = make_draft()
    batches = [make_batch(draft, MASK), make_batch(draft, [row[::-1] for row in MASK], seed=1)]
    expected = [autograd(draft, batch, num_steps=3) for batch in batches]
    weights = FlatWeights(draft, dtype=torch.float64)
    step = FusedStep(draft, weights, num_steps=3)
    for batch, result in zip(batches, expected, strict=True):
        check_equal(result, run_fused(step, weights, batch, num_steps=3), 1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_on_a_gpu_in_bfloat16_it_is_nearer_to_the_truth_than_plain_autograd(deterministic):
    """Both in bfloat16 on the same rounded weights and inputs, against autograd in float64."""
    draft = make_draft(hidden=256, heads=(8, 2), head_dim=64, vocab=1500, draft_vocab=1000, intermediate=512)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.copy_(parameter.bfloat16())
    mask = (torch.arange(300) % 90 >= 30).repeat(2, 1)
    mask[1] = mask[1].flip(0)
    batch = make_batch(draft, mask.tolist())
    batch = {name: x.bfloat16().double() if x.is_floating_point() else x for name, x in batch.items()}
    # One position mask for all: rounded logits would decide some greedy tokens otherwise.
    batch["hidden_BTE"] = 4 * batch["hidden_BTE"]
    expected, expected_grads = autograd(draft, batch, num_steps=5)
    weights = FlatWeights(draft.cuda().float(), dtype=torch.bfloat16)
    step = FusedStep(draft, weights, num_steps=5, deterministic=deterministic)
    result, grads = run_fused(step, weights, batch, num_steps=5)
    again, grads_again = run_fused(step, weights, batch, num_steps=5)
    plain = draft.bfloat16()
    moved = {name: x.cuda().bfloat16() if x.is_floating_point() else x.cuda() for name, x in batch.items()}
    _, plain_grads = autograd(plain, moved, num_steps=5)
    assert abs(float(result.loss_sum) / float(expected.loss_sum.detach()) - 1) < 1e-2
    for name, grad in expected_grads.items():
        error = ((grads[name].cpu().double() - grad).norm() / grad.norm()).item()
        plain_error = ((plain_grads[name].cpu().double() - grad).norm() / grad.norm()).item()
        assert error < max(3e-2, 1.5 * plain_error), f"{name}: {error}, plain bfloat16 {plain_error}"
        if deterministic:
            assert torch.equal(grads[name], grads_again[name])
    assert torch.equal(result.counts.supervised, again.counts.supervised)


def run_graphed(step, head, inputs):
    teacher = head.teach(inputs.hidden_LE.index_select(0, inputs.plan.teacher_rows_M))
    return step(inputs.plan, inputs.input_ids_L, inputs.aux_LA, teacher)


def on_gpu(batch, *, num_steps):
    """What a graphed step gets of a batch."""
    num_sequences, num_tokens = batch["loss_mask_BT"].shape
    plan = plan_pairs(plan_rows(batch["loss_mask_BT"], num_steps), num_sequences=num_sequences, num_tokens=num_tokens)
    return StepInputs(
        plan=rounded(plan),
        input_ids_L=batch["input_ids_BT"].cuda().flatten(),
        aux_LA=batch["aux_BTA"].cuda().bfloat16().flatten(0, 1),
        hidden_LE=batch["hidden_BTE"].cuda().bfloat16().flatten(0, 1),
    )


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("fp8", [False, True])
def test_a_step_waits_for_nothing_and_its_graph_gives_the_same(fp8):
    """Two masks in turn through one graph, and one through another that reads the same memory; waiting would raise."""
    draft = make_draft(hidden=256, heads=(8, 2), head_dim=64, vocab=1500, draft_vocab=1008, intermediate=512)
    weights = FlatWeights(draft.float().cuda(), dtype=torch.bfloat16, fp8=fp8)
    step = FusedStep(draft, weights, num_steps=3)
    optimizer = FlatAdamW(weights, lr=0.0)
    masks = [((torch.arange(400) + shift) % 90 >= 30).repeat(2, 1) for shift in (30, 45, 0)]
    batches = [make_batch(draft.cpu(), mask.tolist(), seed=seed) for seed, mask in enumerate(masks)]
    draft.cuda()
    head = TeacherHead(batches[0]["head_VE"].cuda().bfloat16(), draft.target_ids())

    def run(inputs):
        return run_graphed(step, head, inputs)

    graphed = GraphedStep(run)
    inputs = [on_gpu(batch, num_steps=3) for batch in batches]
    assert inputs[0].shape == inputs[1].shape != inputs[2].shape
    expected = []
    for part in inputs:
        result = run(part.uploaded())
        expected.append((result.loss_sum.item(), result.counts.as_tensor().tolist(), weights.grad.clone()))
    graphed(inputs[0])
    graphed(inputs[2])
    factor = torch.ones((), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = []
        for part in inputs:
            result = graphed(part)
            factor, _ = clip_factor(weights.grad, scale=factor, max_norm=1.0)
            optimizer.step(scale=factor)
            found.append((result, weights.grad.clone()))
            run(part.uploaded())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (loss, counts, grad), (result, graphed_grad) in zip(expected, found, strict=True):
        assert loss == pytest.approx(result.loss_sum.item(), rel=1e-5)
        assert counts == result.counts.as_tensor().tolist()
        assert (grad - graphed_grad).float().norm() < 1e-2 * grad.float().norm()


@pytest.mark.gpu
def test_a_graph_is_still_good_after_a_longer_batch():
    """Capturing gives unused memory back, so a graph that reads what it lost would meet an illegal address."""
    draft = make_draft(hidden=256, heads=(8, 2), head_dim=64, vocab=1500, draft_vocab=1000, intermediate=512).float()
    masks = [(torch.arange(length) % 90 >= 30).repeat(2, 1) for length in (100, 400, 1600)]
    batches = [make_batch(draft, mask.tolist()) for mask in masks]
    weights = FlatWeights(draft.cuda(), dtype=torch.bfloat16)
    step = FusedStep(draft, weights, num_steps=3)
    head = TeacherHead(batches[0]["head_VE"].cuda().bfloat16(), draft.target_ids())
    graphed = GraphedStep(lambda inputs: run_graphed(step, head, inputs))
    losses = [graphed(on_gpu(batch, num_steps=3)).loss_sum.item() for batch in batches * 2]
    assert losses[:3] == losses[3:]


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
def test_the_deterministic_step_repeats_to_the_bit_on_long_sequences(monkeypatch, fp8):
    """On short ones every step does."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    draft = make_draft(hidden=256, heads=(8, 2), head_dim=64, vocab=1500, draft_vocab=1008, intermediate=512)
    batch = make_batch(draft.float(), (torch.arange(4096) % 900 >= 300).repeat(1, 1).tolist())
    weights = FlatWeights(draft.cuda(), dtype=torch.bfloat16, fp8=fp8)
    step = FusedStep(draft, weights, num_steps=4, deterministic=True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        runs = [run_fused(step, weights, batch, num_steps=4) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(before)
    for result, grads in runs[1:]:
        assert torch.equal(runs[0][0].loss_sum, result.loss_sum)
        assert [] == [name for name in grads if not torch.equal(runs[0][1][name], grads[name])]


def test_twins_in_bfloat16_round_nothing_but_what_they_write():
    """As kernels do, whose reference they are: what they compute from is what float64 holds as well."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).bfloat16()

    def check(expected, actual):
        # Half a unit in the last place, and what float32 rounds.
        assert ((expected - actual.double()).abs() <= 2**-8 * expected.abs() + 1e-5).all()

    rows = torch.tensor([1, 3, 4], dtype=torch.int32)
    q, k, v, own_k, own_v = (normal(*shape) for shape in ((6, 4, 16), *[(6, 2, 16)] * 2, *[(3, 3, 2, 16)] * 2))
    segments = Segments(starts=torch.tensor([0, 6], dtype=torch.int32), longest=6, num_sequences=1)
    short = causal_attention(q, k, v, segments, scale=0.25, deterministic=True)
    exact = replace(short, q_LQd=q.double(), out_LQd=short.out_LQd.double(), lse_BQT=short.lse_BQT.double())
    outputs = [torch.empty(3, 4, 16, dtype=dtype) for dtype in (torch.float64, torch.bfloat16)]
    merge_same_row_(exact, k_JNKd=own_k.double(), v_JNKd=own_v.double(), row_N=rows, gathered_NQd=outputs[0])
    merge_same_row_(short, k_JNKd=own_k, v_JNKd=own_v, row_N=rows, gathered_NQd=outputs[1])
    check(*outputs)

    gate_up, grad = normal(5, 32), normal(5, 16)
    exact, actives = gate_up.double(), [torch.empty(5, 16, dtype=dtype) for dtype in (torch.float64, torch.bfloat16)]
    swiglu(exact, out_MI=actives[0])
    swiglu(gate_up, out_MI=actives[1])
    check(*actives)
    swiglu_backward_(exact, grad.double())
    swiglu_backward_(gate_up, grad)
    check(exact, gate_up)

    heads = Heads(num_queries=4, num_keys=2, head_dim=16, cos=torch.full((6, 8), 0.6), sin=torch.full((6, 8), 0.8))
    states, tokens = normal(6, 128), normal(6, 128)
    places = [
        (torch.empty(6, 2, 16, dtype=dtype), torch.empty(6, 2, 16, dtype=dtype))
        for dtype in (torch.float64, torch.bfloat16)
    ]
    at = {"token_M": torch.arange(6).int(), "position_M": torch.arange(6).int(), "heads": heads}
    place_keys_values(states.double(), tokens.double(), *places[0], **at)
    place_keys_values(states, tokens, *places[1], **at)
    for expected, actual in zip(*places, strict=True):
        check(expected, actual)
