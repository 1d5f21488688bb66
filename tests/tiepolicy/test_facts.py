"""What counts as evidence: objects, memory on real devices, and neither where neither proves anything."""

import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.utils import parametrizations, parametrize
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.testing._internal.two_tensor import TwoTensor

import tiepolicy
from models import TiedPair
from strategies import FIELD_VOCAB_SIZES
from tiepolicy import Claim, Facts, Policy, Reason, hookimpl
from tiepolicy.errors import ObservationError


class ClaimPair:
    """Declares that the head is the embedding."""

    @hookimpl
    def tiepolicy_claims(self):
        return [Claim(("embed_tokens.weight", "lm_head.weight"), "declared", "a registry")]


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def groups_of(source):
    return [group.names for group in tiepolicy.plan(source).groups]


def test_a_parametrized_weight_is_seen_under_its_name_in_the_state_dict():
    model = TiedPair(tied=False)
    parametrize.register_parametrization(model.lm_head, "weight", Doubled())
    assert {"embed_tokens.weight", "lm_head.parametrizations.weight.original"} == set(tiepolicy.plan(model).tensors)
    assert set(model.state_dict()) == set(tiepolicy.plan(model).tensors)


def test_a_claim_on_a_parametrized_weight_is_refused_and_says_what_to_claim():
    model = TiedPair(tied=False)
    parametrize.register_parametrization(model.lm_head, "weight", Doubled())
    expected = (
        "lm_head.weight and embed_tokens.weight (12, 4) cannot be one tensor: lm_head.weight is computed by a "
        "parametrization from lm_head.parametrizations.weight.original; claim those instead; claimed by a registry"
    )
    plan = Policy(plugins=[ClaimPair()]).plan(model)
    assert [expected] == [str(refusal) for refusal in plan.refused]
    assert Reason.COMPUTED is plan.refused[0].verdict.reason


def test_weight_norm_is_refused_with_both_of_its_tensors():
    model = TiedPair(tied=False)
    parametrizations.weight_norm(model.lm_head)
    (refusal,) = Policy(plugins=[ClaimPair()]).plan(model).refused
    assert "original0 and lm_head.parametrizations.weight.original1" in refusal.verdict.detail


def test_the_weight_norm_of_old_leaves_no_weight_to_claim():
    model = TiedPair(tied=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model.lm_head)
    (refusal,) = Policy(plugins=[ClaimPair()]).plan(model).refused
    assert Reason.PARTNER_ABSENT is refusal.verdict.reason


def test_an_original_that_is_another_parameter_is_a_tie():
    model = TiedPair(tied=True)
    parametrize.register_parametrization(model.lm_head, "weight", Doubled())
    assert [("embed_tokens.weight", "lm_head.parametrizations.weight.original")] == groups_of(model)


def test_the_prefix_of_fsdp1_is_removed(mesh):
    model = TiedPair(tied=False)
    model.lm_head = FullyShardedDataParallel(model.lm_head, use_orig_params=True, device_id=torch.device("cpu"))
    assert "lm_head._fsdp_wrapped_module.weight" in dict(model.named_parameters())
    assert tiepolicy.plan(TiedPair(tied=False)).tensors.keys() == tiepolicy.plan(model).tensors.keys()


def test_a_module_that_contains_itself_is_refused():
    model = TiedPair()
    model.lm_head.parent = model
    with pytest.raises(ObservationError, match=r"the module at lm_head\.parent \(TiedPair\) contains itself"):
        tiepolicy.plan(model)


def test_a_deep_module_tree_is_no_cycle():
    model = nn.Linear(1, 1, bias=False)
    for _ in range(2000):
        model = nn.Sequential(model)
    assert 1 == len(tiepolicy.plan(model).tensors)


def test_a_lazy_module_that_was_never_called_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.ModuleDict({"head": nn.LazyLinear(3, bias=False)})
    with pytest.raises(ObservationError, match="head.weight has no shape yet: its module is lazy"):
        tiepolicy.plan(model)


@given(st.integers(1, 16), st.integers(1, 16))
def test_two_storages_over_one_buffer_are_one_memory(first, second):
    buffer = np.zeros(16, dtype=np.float32)
    tensors = {"a": torch.from_numpy(buffer[:first]), "b": torch.from_numpy(buffer[:second])}
    assert tensors["a"].untyped_storage()._cdata != tensors["b"].untyped_storage()._cdata
    expected = ("b", "a") if second > first else ("a", "b")
    assert [expected] == groups_of(tensors)
    expanded = tiepolicy.plan(tensors).expand(tiepolicy.plan(tensors).compact(tensors))
    assert all(torch.equal(tensors[name], expanded[name]) for name in tensors)


def test_a_freed_storage_still_is_one_storage():
    """FSDP1 frees the memory of unsharded parameters, and every pointer becomes 0."""
    weight, other = torch.zeros(4), torch.zeros(4)
    tensors = {"a": weight, "b": weight.detach(), "c": other}
    weight.untyped_storage().resize_(0)
    other.untyped_storage().resize_(0)
    assert [("a", "b")] == groups_of(tensors)


def test_partitioned_parameters_without_elements_are_tied_by_object_only():
    """ZeRO-3 leaves every parameter with no elements and the pointer 0."""
    model = TiedPair(tied=False)
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    assert [] == groups_of(model)
    model.lm_head.weight = model.embed_tokens.weight
    assert [("embed_tokens.weight", "lm_head.weight")] == groups_of(model)


@given(st.permutations(["a", "b", "c"]))
def test_a_wrapper_around_the_same_inner_tensors_is_the_same_tensor(names):
    left, right = torch.zeros(3), torch.ones(3)
    wrappers = [TwoTensor(left, right), TwoTensor(left, right), TwoTensor(left, right.clone())]
    tensors = dict(zip(names, wrappers, strict=True))
    assert [tuple(sorted(names[:2]))] == groups_of(tensors)
    plan = tiepolicy.plan(tensors)
    assert 2 == len(plan.compact(tensors))


def test_wrappers_that_lost_their_common_memory_are_compared_inside():
    weight = TwoTensor(torch.zeros(3), torch.ones(3))
    plan = tiepolicy.plan({"a": weight, "b": weight})
    equal = {"a": weight, "b": TwoTensor(torch.zeros(3), torch.ones(3))}
    assert ["a"] == list(plan.compact(equal))
    with pytest.raises(tiepolicy.errors.TieConflictError, match=r"first at \(2,\), 1.0 and 5.0"):
        plan.compact({"a": weight, "b": TwoTensor(torch.zeros(3), torch.tensor([1.0, 1.0, 5.0]))})


@pytest.fixture
def mesh():
    """A mesh of four ranks of which this process is the last; nothing is ever sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    yield init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


def sharded(local, mesh, rows):
    return DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size((rows, 2)), stride=(2, 1), run_check=False)


@pytest.mark.survey("T08")
def test_empty_local_shards_are_evidence_of_nothing_and_identity_decides(mesh):
    """Both pointers are 0 on this rank; on the others the two are plainly apart.

    NeMo takes them for one, see `tiepolicy_hf/test_survey_automodel.py`.
    """
    embed, head = (sharded(torch.empty(0, 2), mesh, 3) for _ in range(2))
    assert [] == groups_of({"embed": embed, "head": head})
    assert [("again", "embed")] == groups_of({"embed": embed, "head": head, "again": embed})


def test_shards_that_lie_in_one_memory_are_one_tensor_of_the_global_shape(mesh):
    embed = sharded(torch.zeros(1, 2), mesh, 4)
    plan = tiepolicy.plan({"embed": embed, "head": embed.detach(), "other": sharded(torch.zeros(1, 2), mesh, 4)})
    assert ([("embed", "head")], (4, 2)) == ([group.names for group in plan.groups], plan.tensors["head"].shape)


def test_a_shard_and_a_plain_tensor_over_one_memory_are_stored_apart(mesh):
    local = torch.zeros(1, 2)
    plan = tiepolicy.plan({"sharded": sharded(local, mesh, 4), "plain": local})
    assert ((), Reason.SHAPE_MISMATCH) == (plan.groups, plan.verdict("sharded", "plain").reason)


def test_tensors_that_are_sharded_differently_are_refused_with_both_placements(mesh):
    tensors = {
        "embed_tokens.weight": DTensor.from_local(torch.zeros(1, 2), mesh, [Shard(0)], run_check=False),
        "lm_head.weight": DTensor.from_local(torch.zeros(4, 2), mesh, [Replicate()], run_check=False),
    }
    (refusal,) = Policy(plugins=[ClaimPair()]).plan(tensors).refused
    assert "sharded differently (cpu(4,) (Replicate(),) and cpu(4,) (Shard(dim=0),))" in refusal.verdict.detail


def test_sparse_tensors_are_tied_by_object_only():
    sparse = torch.eye(3).to_sparse()
    plan = tiepolicy.plan({"a": sparse, "b": sparse, "c": torch.eye(3).to_sparse(), "d": torch.zeros(2)})
    assert [("a", "b")] == [group.names for group in plan.groups]
    assert {"a", "c", "d"} == set(plan.compact({"a": sparse, "b": sparse, "c": sparse, "d": torch.zeros(2)}))


def test_quantized_tensors_are_tied_by_object_only():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    assert [("a", "b")] == groups_of({"a": weight, "b": weight, "raw": weight.int_repr()})


def test_a_tensor_and_its_lazy_conjugate_are_two_tensors():
    """They have one storage, offset, shape and stride, and other values."""
    weight = torch.tensor([1 + 2j])
    assert [] == groups_of({"weight": weight, "conjugate": weight.conj(), "imaginary": weight.conj().imag})


def test_a_subclass_without_a_dispatch_of_its_own_lies_where_its_memory_lies():
    class Named(torch.Tensor):
        pass

    weight = torch.zeros(3)
    assert [("named", "plain")] == groups_of({"plain": weight, "named": weight.as_subclass(Named)})


def test_tensors_on_different_devices_are_refused_with_both():
    model = TiedPair(tied=False)
    model.lm_head.to("meta")
    (refusal,) = Policy(plugins=[ClaimPair()]).plan(model).refused
    assert (Reason.PLACEMENT_MISMATCH, "they lie on different devices (meta and cpu)") == (
        refusal.verdict.reason,
        refusal.verdict.detail,
    )


@pytest.mark.parametrize("vocab_size", FIELD_VOCAB_SIZES)
def test_claims_that_go_in_a_circle_are_one_group_with_the_first_name_stored(vocab_size):
    class Circle:
        @hookimpl
        def tiepolicy_claims(self):
            return [Claim(pair, "declared", "a ring") for pair in (("b", "a"), ("c", "b"), ("a", "c"))]

    with torch.device("meta"):
        weight = torch.empty(vocab_size, 8)
    plan = Policy(plugins=[Circle()]).plan({"a": weight, "b": weight, "c": weight})
    assert ([("a", "b", "c")], ()) == ([group.names for group in plan.groups], plan.refused)


def test_a_plan_tells_what_was_there_when_it_was_made():
    weight = torch.zeros(3, 2)
    tensors = {"a": weight, "b": weight}
    plan = tiepolicy.plan(tensors)
    tensors["b"] = torch.zeros(7)
    weight.resize_(1)
    assert {"a": (3, 2), "b": (3, 2)} == {name: spec.shape for name, spec in plan.tensors.items()}


def test_a_plan_keeps_no_tensor_alive():
    import gc
    import weakref

    weight = torch.zeros(3)
    alive = weakref.ref(weight)
    plan = tiepolicy.plan({"a": weight, "b": weight})
    del weight
    gc.collect()
    assert (None, 1) == (alive(), len(plan.groups))


def test_a_plan_that_memory_alone_settles_makes_no_fact_and_no_spec(monkeypatch):
    made = []
    build = tiepolicy._observe._fact
    monkeypatch.setattr(tiepolicy._observe, "_fact", lambda *arguments: made.append(arguments[0]) or build(*arguments))
    tensors = {f"w{index}": torch.zeros(2) for index in range(100)}
    plan = tiepolicy.plan(tensors | {"again": tensors["w7"], "part": tensors["w8"][1:]})
    assert ([], 2) == (made, len(plan.groups))
    assert plan.tensors._rows is None


def test_facts_name_all_that_is_one_object():
    weight = torch.zeros(1)
    assert ["a", "c"] == Facts({"c": weight, "b": weight.detach(), "a": weight}).names_of(weight)
