"""Tensors that are more, or less, than elements in a memory: each gets a right plan or one sentence."""

import re
from dataclasses import dataclass

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.testing._internal.two_tensor import TwoTensor

import tiepolicy
from tiepolicy import content_digest, first_difference
from tiepolicy._values import fingerprint
from tiepolicy.errors import ObservationError, TieConflictError, TiePolicyError

NESTED = "is nested, so it has no shape, and a plan needs every size as a whole number; plan its values and offsets"


class Packed(torch.Tensor):
    """Integers and a scale, as quantization libraries wrap them; `note` is what it says beside its tensors."""

    @staticmethod
    def __new__(cls, numbers, scale, note=None):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.float32)

    def __init__(self, numbers, scale, note=None):
        self.numbers, self.scale, self.note = numbers, scale, note

    def __tensor_flatten__(self):
        return ["numbers", "scale"], self.note

    @staticmethod
    def __tensor_unflatten__(inner, note, size, stride):
        return Packed(inner["numbers"], inner["scale"], note)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


class Silent(Packed):
    def __tensor_flatten__(self):
        raise RuntimeError("packed for another device")


class Refusing(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError("not now")


@dataclass
class Recipe:
    block_sizes: list[int]


def groups_of(source):
    return [group.names for group in tiepolicy.plan(source).groups]


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused_by_name_wherever_it_is_met(layout):
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=layout)
    tensors = {"dense": torch.ones(2), "ragged": nested, "again": nested.detach()}
    with pytest.raises(ObservationError, match=f"^ragged {NESTED}, or pad it$"):
        tiepolicy.plan(tensors)
    with pytest.raises(ObservationError, match=f"^ragged {NESTED}, or pad it$"):
        tiepolicy.observe(tensors)["ragged"]
    with pytest.raises(ObservationError, match=f"^twice {NESTED}, or pad it$"):
        tiepolicy.plan({"a": nested.values(), "twice": nested, "wholly": nested})
    owner = tiepolicy.plan({"a": torch.ones(1)}, external={"other": {"values": nested.values()}})
    assert () == owner.external


def test_the_values_and_offsets_of_a_nested_tensor_are_planned_as_any_others():
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)
    tensors = {"values": nested.values(), "offsets": nested.offsets(), "same": nested.detach().values()}
    assert [("same", "values")] == groups_of(tensors)


@pytest.mark.filterwarnings("ignore")
def test_a_size_that_is_not_known_yet_is_refused():
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        unknown = torch.nonzero(torch.ones(4))
    message = (
        "a has the symbolic shape (u0, 1), and a plan needs every size as a whole number; plan the model where it is "
        "not traced"
    )
    with pytest.raises(ObservationError, match=f"^{re.escape(message)}$"):
        tiepolicy.plan({"a": unknown, "b": unknown})


def test_a_subclass_that_raises_when_it_is_looked_at_is_named():
    message = "b is a {}; plan the tensors that it is made of"
    silent = Silent(torch.ones(3), torch.ones(1))
    for tensor, problem in (
        (silent, "Silent that does not say what it holds: RuntimeError: packed for another device"),
        (
            TwoTensor(silent, silent),
            "TwoTensor that does not say what it holds: RuntimeError: packed for another device",
        ),
        (torch.ones(3).as_subclass(Refusing), "Refusing that does not say what it holds: RuntimeError: not now"),
    ):
        with pytest.raises(ObservationError, match=f"^{message.format(problem)}$") as caught:
            tiepolicy.plan({"a": torch.ones(3), "b": tensor})
        assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch._mkldnn])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_tensors_of_other_layouts_are_tied_by_object_only(layout):
    dense = torch.eye(4)
    blocks = (2, 2) if layout is torch.sparse_bsr else None
    packed = dense.to_mkldnn() if layout is torch._mkldnn else dense.to_sparse(layout=layout, blocksize=blocks)
    plan = tiepolicy.plan({"a": packed, "b": packed, "c": packed.detach(), "d": dense})
    assert [("a", "b")] == [group.names for group in plan.groups]
    with pytest.raises(TieConflictError, match=f"they cannot be compared bit by bit \\({layout} torch.float32\\)"):
        plan.compact({"a": packed, "b": packed.clone()})


@pytest.mark.parametrize(
    "notes", [([2, 2], [2, 2]), ({"a": 1, "b": [2]}, {"b": [2], "a": 1}), (Recipe([1]), Recipe([1]))]
)
def test_wrappers_that_say_the_same_in_lists_mappings_or_dataclasses_are_one_tensor(notes):
    numbers, scale = torch.ones(3, dtype=torch.int8), torch.ones(1)
    plan = tiepolicy.plan({"a": Packed(numbers, scale, notes[0]), "b": Packed(numbers, scale, notes[1])})
    assert [("a", "b")] == [group.names for group in plan.groups]
    assert ["a"] == list(
        plan.compact({"a": Packed(numbers, scale, notes[0]), "b": Packed(numbers + 0, scale, notes[1])})
    )


@pytest.mark.parametrize("notes", [([2, 2], [2, 3]), ({"a": 1}, {"a": 2}), (Recipe([1]), Recipe([2])), ((1,), [1])])
def test_wrappers_that_say_different_things_are_two_tensors(notes):
    numbers, scale = torch.ones(3, dtype=torch.int8), torch.ones(1)
    assert [] == groups_of({"a": Packed(numbers, scale, notes[0]), "b": Packed(numbers, scale, notes[1])})


def test_tensors_that_a_wrapper_has_in_its_context_are_told_apart_by_the_object():
    """Comparing them would read them, and has no one answer."""
    numbers, zeros = torch.ones(3, dtype=torch.int8), torch.zeros(3)
    a, b, c = (Packed(numbers, numbers, (point,)) for point in (zeros, zeros, zeros.clone()))
    assert [("a", "b")] == groups_of({"a": a, "b": b, "c": c})
    assert "one is a Packed, the other a Packed of another kind" == first_difference(a, c)


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad])
def test_inside_a_function_transform_nothing_has_elements_to_read(transform):
    said = []

    def function(tensor):
        said.append(first_difference(tensor, tensor * 1))
        for read in (content_digest, fingerprint):
            with pytest.raises(TiePolicyError, match=r"has no elements to make a digest of; give it as it was"):
                read(tensor)
        return tensor.sum()

    transform(function)(torch.ones(3))
    assert ["they cannot be compared bit by bit (torch.strided torch.float32)"] == said


def test_memory_that_was_freed_is_not_read():
    freed, weight = torch.ones(3), torch.ones(3)
    freed.untyped_storage().resize_(0)
    assert "they cannot be compared bit by bit (torch.strided torch.float32)" == first_difference(freed, weight)
    with pytest.raises(TiePolicyError, match="has no elements to make a digest of"):
        content_digest(freed)


def test_tensors_without_elements_are_tied_by_object_only_and_have_a_digest():
    empty = torch.empty(0, 4)
    plan = tiepolicy.plan({"a": empty, "b": empty, "c": empty.detach(), "d": torch.empty(4, 0)})
    assert [("a", "b")] == [group.names for group in plan.groups]
    assert ["a"] == list(plan.compact({"a": empty, "b": empty.clone()}))
    assert content_digest(torch.empty(0)) == content_digest(empty)
