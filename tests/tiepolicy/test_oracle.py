"""The plan against the slow, obvious way to decide the same."""

import torch
from hypothesis import example, given
from torch import nn

import oracle
import tiepolicy
from strategies import ALL_DTYPES, flagged_pairs, memory_dicts, small_sizes, tied_modules, view_dicts


def bits(tensor: torch.Tensor) -> bytes:
    dense = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return dense.view(-1).view(torch.uint8).numpy().tobytes()


def assert_agrees(source: nn.Module | dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    plan = tiepolicy.plan(source)
    assert oracle.stored(tensors) == set(plan.stored())
    for group in plan.groups:
        for alias in group.aliases:
            assert oracle.rebuildable(tensors[group.canonical], tensors[alias.name])


SHARED = torch.arange(12.0)


@given(memory_dicts())
@example({"bits": SHARED.view(torch.int32), "a": SHARED, "b": SHARED})  # the widest is of another dtype
@example({"gaps": SHARED[::2], "front": SHARED[:6], "part": SHARED[1:3]})  # the farthest-reaching has gaps
@example({"left": SHARED[:8], "right": SHARED[1:9], "both": SHARED[1:5]})  # a part of two that overlap
@example({"turned": SHARED.view(3, 4).t(), "whole": SHARED.view(3, 4), "row": SHARED})
@example({"value": torch.zeros(2, dtype=torch.complex64), "conj": torch.zeros(2, dtype=torch.complex64).conj()})
def test_the_plan_of_any_mapping_agrees_with_the_oracle(tensors):
    assert_agrees(tensors, tensors)


@given(view_dicts())
def test_the_plan_of_views_agrees_with_the_oracle(tensors):
    assert_agrees(tensors, tensors)


@given(tied_modules())
def test_the_plan_of_any_module_agrees_with_the_oracle(model):
    assert_agrees(model, dict(model.named_parameters(remove_duplicate=False)))


@given(flagged_pairs(sizes=small_sizes()))
def test_the_plan_of_any_flagged_pair_stores_what_the_oracle_stores(model):
    assert_agrees(model, dict(model.named_parameters(remove_duplicate=False)))


@given(memory_dicts())
def test_any_memory_survives_the_round_trip_bit_for_bit(tensors):
    plan = tiepolicy.plan(tensors)
    expanded = plan.expand(plan.compact(tensors))
    assert {name: (t.shape, t.dtype, bits(t)) for name, t in tensors.items()} == {
        name: (t.shape, t.dtype, bits(t)) for name, t in expanded.items()
    }


@given(memory_dicts())
def test_clones_of_tied_tensors_are_compared_and_left_out(tensors):
    plan = tiepolicy.plan(tensors)
    clones = {name: tensor.clone() for name, tensor in tensors.items()}
    assert list(plan.compact(tensors)) == list(plan.compact(clones))


def test_every_dtype_that_is_written_is_tied_viewed_compared_and_given_back():
    for dtype in ALL_DTYPES:
        row = torch.arange(64, dtype=torch.uint8).view(dtype) if dtype is not torch.bool else torch.ones(8).bool()
        tensors = {"a": row, "b": row.detach(), "part": row[2:4]}
        plan = tiepolicy.plan(tensors)
        assert [("a", "b", "part")] == [group.names for group in plan.groups], dtype
        clones = {name: tensor.clone() for name, tensor in tensors.items()}
        expanded = plan.expand(plan.compact(clones))
        assert {name: bits(t) for name, t in tensors.items()} == {name: bits(t) for name, t in expanded.items()}
        assert plan == tiepolicy.TiePlan.from_manifest(plan.to_manifest())
