"""Tests for `eagle3.kernels` on a GPU: each kernel against its torch twin, which the CPU runs in float64."""

# Expected values stand on the left.

from dataclasses import replace

import pytest
import torch

from eagle3.kernels.causal import Segments, causal_attention, causal_attention_backward, takes_heads
from eagle3.kernels.heads import Heads, place_keys_values, place_queries, sum_by_token, unrotate_
from eagle3.kernels.optimizer import adamw_
from eagle3.kernels.rowwise import (
    RowGradients,
    SecondNorm,
    add_rms_norm,
    rms_norm_backward,
    swiglu,
    swiglu_backward_,
    weight_gradient_parts,
)
from eagle3.kernels.same_row import merge_same_row_, same_row_backward_
from eagle3.kernels.soft_ce import row_max, row_stats, soft_cross_entropy_

pytestmark = pytest.mark.gpu

#: Relative error of a tensor that was rounded to bfloat16 a few times.
TOLERANCE = 1.2e-2


def normal(*shape, seed=0):
    """A tensor whose values bfloat16 holds exactly, in float64."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).bfloat16().double()


def on_gpu(tensor):
    return tensor.cuda() if not tensor.is_floating_point() else tensor.bfloat16().cuda()


def check(expected, actual, tolerance=TOLERANCE):
    error = (expected.double() - actual.double().cpu()).norm()
    assert error <= tolerance * expected.double().norm(), f"{error} of {expected.double().norm()}"


def index(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("width", [96, 2048, 4096])
def test_added_and_normed_rows_and_their_gradients(width):
    num_rows = 700
    x, add, grad_sum, grad_normed = (normal(num_rows, width, seed=seed) for seed in range(4))
    weights = [1 + 0.1 * normal(width, seed=seed).bfloat16().double() for seed in (5, 6)]
    weights = [weight.bfloat16().double() for weight in weights]
    place = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0)).int()
    place[::3] = -1
    some = normal(num_rows, width, seed=9)
    outputs = []
    for move in (lambda tensor: tensor, on_gpu):
        out = move(torch.zeros(num_rows, width, dtype=torch.float64))
        second = SecondNorm(weight_H=move(weights[1]), out_RH=out, index_M=move(place))
        parts = weight_gradient_parts(out.device)
        grad_weights = [
            torch.ones(parts, width, dtype=torch.promote_types(torch.float32, out.dtype), device=out.device)
            for _ in range(2)
        ]
        total, normed = add_rms_norm(move(x), move(add), move(weights[0]), eps=1e-5, second=second)
        grad = rms_norm_backward(
            *(move(x), move(grad_normed), move(weights[0]), grad_weights[0]),
            eps=1e-5,
            grad_sum_MH=move(grad_sum),
            second=SecondNorm(
                weight_H=move(weights[1]), out_RH=move(some), index_M=move(place), grad_weight_GH=grad_weights[1]
            ),
            rows=RowGradients(normed_RH=move(some), sum_RH=move(some), index_M=move(place)),
        )
        # They are added to what is there.
        grads = [grad_weight_GH.sum(dim=0) - parts for grad_weight_GH in grad_weights]
        outputs.append((total, normed, out, grad, *grads))
    for expected, actual in zip(*outputs, strict=True):
        check(expected, actual)


def test_the_gated_activation_and_its_gradient():
    gate_up, grad = normal(300, 2 * 1500), normal(300, 1500, seed=1)
    gpu, out, gpu_out = (
        on_gpu(gate_up),
        torch.empty(300, 1500, dtype=torch.float64),
        on_gpu(torch.empty(300, 1500).double()),
    )
    swiglu(gate_up, out_MI=out)
    swiglu(gpu, out_MI=gpu_out)
    check(out, gpu_out)
    swiglu_backward_(gate_up, grad)
    swiglu_backward_(gpu, on_gpu(grad))
    check(gate_up, gpu)


@pytest.mark.parametrize(("num_queries", "num_keys", "head_dim"), [(32, 8, 128), (32, 8, 64), (6, 3, 80)])
def test_heads_are_placed_and_taken_back(num_queries, num_keys, head_dim):
    angle = torch.rand(100, head_dim // 2, generator=torch.Generator().manual_seed(0))
    on_cpu = Heads(num_queries=num_queries, num_keys=num_keys, head_dim=head_dim, cos=angle.cos(), sin=angle.sin())
    num_rows, num_all = 50, 90
    state, token = normal(num_rows, on_cpu.width), normal(num_all, on_cpu.width, seed=1)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(num_all, (num_rows,), generator=generator).int()
    positions = torch.randint(100, (num_rows,), generator=generator).int()
    rows = torch.randperm(num_all, generator=generator)[:num_rows].int()
    outputs = []
    for move in (lambda tensor: tensor, on_gpu):
        device = move(tokens).device
        heads = replace(on_cpu, cos=on_cpu.cos.to(device), sin=on_cpu.sin.to(device))
        q = move(torch.zeros(num_all, num_queries, head_dim).double())
        k, v = (move(torch.zeros(num_rows, num_keys, head_dim).double()) for _ in "kv")
        shared = {"token_M": move(tokens), "position_M": move(positions), "heads": heads}
        place_queries(move(state), move(token), q, row_M=move(rows), **shared)
        place_keys_values(move(state), move(token), k, v, **shared)
        only = torch.zeros_like(k)
        place_keys_values(move(state)[:, -2 * num_keys * head_dim :].contiguous(), move(token), only, v, **shared)
        back = move(torch.zeros(num_rows, on_cpu.width).double())
        grads = {
            "queries_MQd": q[:num_rows],
            "keys_MKd": k.double() if device.type == "cpu" else k.float(),
            "values_MKd": v,
        }
        unrotate_(back, position_M=move(positions), heads=heads, **grads)
        narrow = move(torch.zeros(num_rows, 2 * num_keys * head_dim).double())
        grads["queries_MQd"] = None
        unrotate_(narrow, position_M=move(positions), heads=heads, **grads)
        outputs.append((q, k, v, only, back, narrow))
    for expected, actual in zip(*outputs, strict=True):
        check(expected, actual)


def test_gradients_of_a_token_are_summed_over_rows_and_steps():
    num_steps, num_rows, width, num_all = 3, 20, 2048, 60
    rows, first = normal(num_steps, num_rows, width), normal(num_all, 700, seed=1)
    row_of_token = torch.full((num_all,), -1, dtype=torch.int32)
    places = torch.randperm(num_all, generator=torch.Generator().manual_seed(0))[:num_rows].sort().values
    row_of_token[places] = torch.arange(num_rows, dtype=torch.int32)
    time = torch.arange(30, dtype=torch.int32).repeat(2)
    expected = sum_by_token(rows, first, row_of_token_L=row_of_token, time_L=time)
    actual = sum_by_token(on_gpu(rows), on_gpu(first), row_of_token_L=row_of_token.cuda(), time_L=time.cuda())
    check(expected, actual)


ATTENTIONS = {
    "sequences": (Segments(starts=index(0, 256, 512), longest=256, num_sequences=2), False),
    "deterministic": (Segments(starts=index(0, 256, 512), longest=256, num_sequences=2), True),
    "documents": (Segments(starts=index(0, 100, 110, 400, 512), longest=290, num_sequences=None), False),
}


@pytest.mark.parametrize("deterministic", [False, True])
def test_heads_have_kernels_up_to_a_size(deterministic):
    taken = [takes_heads(size, torch.device("cuda"), deterministic=deterministic) for size in (16, 64, 128, 264, 512)]
    assert [True, True, True, False, False] == taken


@pytest.mark.parametrize("num_later", [0, 1, 5])
@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize(("num_queries", "num_keys", "head_dim"), [(32, 8, 128), (8, 2, 64)])
def test_merged_attention_and_all_its_gradients(kind, num_queries, num_keys, head_dim, num_later):
    segments, deterministic = ATTENTIONS[kind]
    num_all, rows = 512, torch.arange(3, 512, 2).int()
    num_rows, scale = len(rows), head_dim**-0.5
    q, k, v = normal(num_all, num_queries, head_dim), *(normal(num_all, num_keys, head_dim, seed=s) for s in (1, 2))
    own_k, own_v = (normal(num_later, num_rows, num_keys, head_dim, seed=seed) for seed in (3, 4))
    grad_rows = normal(num_rows, num_queries, head_dim, seed=5)
    outputs = []
    for move in (lambda tensor: tensor, on_gpu):
        here = Segments(starts=move(segments.starts), longest=segments.longest, num_sequences=segments.num_sequences)
        q_, k_, v_, own_k_, own_v_, grad_ = (move(x) for x in (q, k, v, own_k, own_v, grad_rows))
        result = causal_attention(q_, k_, v_, here, scale=scale, deterministic=deterministic)
        gathered = torch.empty_like(grad_)
        own = {"k_JNKd": own_k_, "v_JNKd": own_v_, "row_N": move(rows)}
        merge_same_row_(result, gathered_NQd=gathered, **own)
        grad_full = torch.zeros_like(q_)
        grad_full[move(rows).long()] = grad_
        grad_q, grad_k, grad_v = causal_attention_backward(grad_full, result)
        precise = torch.float64 if grad_.device.type == "cpu" else torch.float32
        grad_own_k, grad_own_v = (torch.zeros_like(own_k_, dtype=precise) for _ in "kv")
        grad_q_rows = torch.empty_like(grad_)
        same_row_backward_(
            result,
            grad_q,
            out_NQd=gathered,
            grad_out_NQd=grad_,
            grad_k_JNKd=grad_own_k,
            grad_v_JNKd=grad_own_v,
            grad_q_NQd=grad_q_rows,
            **own,
        )
        outputs.append((gathered, grad_q_rows, grad_k, grad_v, grad_own_k, grad_own_v))
    for expected, actual in zip(*outputs, strict=True):
        check(expected, actual)


def test_the_soft_cross_entropy_of_a_chunk():
    width, num_pairs, num_teachers = 32000, 300, 40
    logits, teacher = 2 * normal(num_pairs, width), 2 * normal(num_teachers, width, seed=1)
    rows = torch.randint(num_teachers, (num_pairs,), generator=torch.Generator().manual_seed(0)).int()
    weight = torch.rand(num_pairs, generator=torch.Generator().manual_seed(1)).float()
    weight[::4] = 0
    outputs = []
    for move in (lambda tensor: tensor, on_gpu):
        logits_, teacher_ = move(logits.clone()), move(teacher)
        stats = row_stats(teacher_)
        weight_ = weight.double() if logits_.device.type == "cpu" else weight.cuda()
        loss, argmax = torch.empty_like(weight_), torch.empty_like(weight_, dtype=torch.int32)
        soft_cross_entropy_(
            *(logits_, teacher_, stats.lse_M),
            teacher_C=move(rows),
            weight_C=weight_,
            loss_C=loss,
            argmax_C=argmax,
        )
        assert torch.equal(move(logits).argmax(dim=-1).int(), argmax)
        assert torch.equal(teacher.argmax(dim=-1).int(), stats.argmax_M.cpu())
        for expected, actual in zip(stats[:2], row_max(teacher_), strict=True):
            assert torch.equal(expected, actual)
        outputs.append((loss, logits_, stats.lse_M, stats.max_M))
    for expected, actual in zip(*outputs, strict=True):
        check(expected, actual)


def test_adamw_is_that_of_torch():
    num = 5000
    start, grads = torch.randn(num, generator=torch.Generator().manual_seed(0)), [torch.randn(num) for _ in range(3)]
    expected = torch.nn.Parameter(start.double())
    reference = torch.optim.AdamW([expected], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    master = start.cuda()
    moments = [torch.zeros_like(master) for _ in range(2)]
    copy = torch.empty_like(master, dtype=torch.bfloat16)
    step = torch.zeros((), device="cuda")
    for grad in grads:
        expected.grad = 0.5 * grad.double()
        reference.step()
        step += 1
        adamw_(
            *(master, *moments, grad.cuda(), copy),
            scale=torch.tensor(0.5, device="cuda"),
            lr=torch.tensor(1e-2, device="cuda"),
            step=step,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.1,
        )
    check(expected.detach() - start, master.cpu() - start, 1e-4)
    assert torch.equal(master.bfloat16(), copy)
