"""The decision on a GPU and on pinned memory; needs one."""

import pytest
import torch
from torch import nn

import tiepolicy
from models import TiedPair
from tiepolicy import Reason

pytestmark = pytest.mark.gpu


def test_a_tie_survives_the_way_to_the_gpu_and_is_the_same_plan_there():
    model = TiedPair()
    on_cpu = tiepolicy.plan(model)
    assert on_cpu == tiepolicy.plan(model.cuda())
    on_cpu.verify(model, after="cuda()")


def test_views_of_one_gpu_tensor_are_rebuilt_bit_for_bit():
    fused = torch.randn(12, 4, device="cuda")
    state_dict = {"qkv": fused, "q": fused[:4], "k": fused[4:8], "t": fused[8:].t(), "own": torch.randn(4, 4).cuda()}
    plan = tiepolicy.plan(state_dict)
    expanded = plan.expand(plan.compact(state_dict))
    assert [("qkv", "k", "q", "t")] == [group.names for group in plan.groups]
    assert [True] * len(state_dict) == [torch.equal(tensor, expanded[name]) for name, tensor in state_dict.items()]


def test_a_copy_on_another_device_is_refused_for_where_it_lies():
    model = TiedPair(tied=False)
    model.config = type("Config", (), {"tie_word_embeddings": True})
    model.get_input_embeddings, model.get_output_embeddings = lambda: model.embed_tokens, lambda: model.lm_head
    model.lm_head.cuda()
    verdict = tiepolicy.plan(model).verdict("embed_tokens.weight", "lm_head.weight")
    assert (Reason.PLACEMENT_MISMATCH, "they lie on different devices (cuda:0 and cpu)") == (
        verdict.reason,
        verdict.detail,
    )


def test_pinned_memory_is_memory():
    whole = torch.randn(8, 4).pin_memory()
    assert whole.is_pinned()
    plan = tiepolicy.plan({"whole": whole, "same": whole.detach(), "part": whole[2:4], "other": whole.clone()})
    assert [("same", "part", "whole")] == [group.names for group in plan.groups]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_planning_does_not_wait_for_the_gpu():
    model = nn.Sequential(*(TiedPair(vocab_size=64) for _ in range(8))).cuda()
    try:
        torch.cuda.set_sync_debug_mode("error")
        assert 8 == len(tiepolicy.plan(model).groups)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gathered_copies_on_the_cpu_are_compared_with_the_gpu_tensor():
    model = TiedPair().cuda()
    gathered = {"embed_tokens.weight": model.embed_tokens.weight, "lm_head.weight": model.lm_head.weight.cpu()}
    assert ["embed_tokens.weight"] == list(tiepolicy.plan(model).compact(gathered))
