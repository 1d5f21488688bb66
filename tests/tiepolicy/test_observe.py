"""What is seen of a model: names without wrappers, and no tensor data."""

import copy

import pytest
import torch
from hypothesis import given
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode

import tiepolicy
from models import TiedPair, tiny_llama
from strategies import memory_dicts
from tiepolicy.errors import ObservationError


class CountedOperations(TorchDispatchMode):
    """Counts every operation that reaches a tensor."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


def test_wrappers_change_no_name():
    plain = TiedPair()
    wrapped = copy.deepcopy(plain)
    wrapped.embed_tokens = checkpoint_wrapper(wrapped.embed_tokens)
    compiled = torch.compile(wrapped)
    parallel = nn.DataParallel(compiled)
    assert tiepolicy.plan(plain) == tiepolicy.plan(parallel)


def test_a_module_called_module_keeps_its_name():
    model = nn.ModuleDict({"module": nn.Linear(2, 2, bias=False)})
    assert ["module.weight"] == list(tiepolicy.plan(model).tensors)


def test_two_tensors_that_get_one_name_are_refused():
    model = nn.ModuleDict(
        {"a": nn.Linear(2, 2, bias=False), "_orig_mod": nn.ModuleDict({"a": nn.Linear(2, 2, bias=False)})}
    )
    with pytest.raises(ObservationError, match="two different tensors are both named a.weight"):
        tiepolicy.plan(model)


def test_persistent_buffers_are_seen_and_others_are_not():
    model = nn.Module()
    model.register_buffer("kept", torch.zeros(2))
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    assert ["kept"] == list(tiepolicy.plan(model).tensors)


def test_a_buffer_that_is_a_parameter_is_a_tie():
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2))
    model.register_buffer("shadow", model.weight.data)
    assert [("shadow", "weight")] == [group.names for group in tiepolicy.plan(model).groups]


def test_a_module_registered_twice_ties_all_it_holds():
    block = nn.Linear(2, 2)
    model = nn.ModuleDict({"first": block, "second": block})
    groups = [group.names for group in tiepolicy.plan(model).groups]
    assert [("first.bias", "second.bias"), ("first.weight", "second.weight")] == groups


def test_ties_on_the_meta_device_are_ties_of_objects():
    """Every pointer is 0 there, so pointers would tie everything to everything."""
    with torch.device("meta"):
        model = tiny_llama(tie_word_embeddings=True)
    assert [("model.embed_tokens.weight", "lm_head.weight")] == [g.names for g in tiepolicy.plan(model).groups]


def test_fake_tensors_are_told_apart():
    with torch._subclasses.FakeTensorMode():
        state_dict = {"a": torch.zeros(3), "b": torch.zeros(3)}
        state_dict["c"] = state_dict["a"].detach()
        assert [("a", "c")] == [group.names for group in tiepolicy.plan(state_dict).groups]


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad])
def test_tensors_that_a_function_transform_wraps_are_told_apart_by_the_object(transform):
    plans = []

    def function(tensor):
        plans.append(tiepolicy.plan({"a": tensor, "b": tensor, "c": tensor * 1}))
        return tensor.sum()

    transform(function)(torch.ones(3))
    assert [["a", "b"]] == [list(group.names) for group in plans[0].groups]


def test_planning_reads_no_data():
    model = tiny_llama(tie_word_embeddings=True)
    with CountedOperations() as counted:
        tiepolicy.plan(model)
    assert [] == counted.operations


@given(memory_dicts())
def test_planning_any_memory_reads_no_data(tensors):
    owner = {"owner": next(iter(tensors.values()))}
    with CountedOperations() as counted:
        plan = tiepolicy.plan(tensors, external={"other": owner})
        plan.to_manifest()
        plan.verify(tensors)
    assert [] == counted.operations


def test_planning_synchronises_no_device(monkeypatch):
    waits = []
    for module in (torch.cuda, torch.accelerator, torch.cpu):
        monkeypatch.setattr(module, "synchronize", lambda *arguments, **options: waits.append(arguments))
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: waits.append(tensor))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: waits.append(tensor))
    tiepolicy.plan(tiny_llama(tie_word_embeddings=True))
    assert [] == waits


def test_leaving_out_what_still_is_one_tensor_reads_no_data():
    state_dict = tiny_llama(tie_word_embeddings=True).state_dict()
    with CountedOperations() as counted:
        plan = tiepolicy.plan(state_dict)
        plan.expand(plan.compact(state_dict))
    assert [] == counted.operations


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({1: torch.zeros(1)}, "the name 1 is a int; names of tensors are strings"),
        ({"step": 3}, "step is a int, not a tensor"),
    ],
)
def test_a_mapping_with_anything_else_is_refused(mapping, message):
    with pytest.raises(ObservationError, match=message):
        tiepolicy.plan(mapping)


@pytest.mark.parametrize("source", [None, [torch.zeros(1)], torch.zeros(1), "model.safetensors"])
def test_what_is_neither_a_module_nor_a_mapping_is_refused(source):
    message = f"a {type(source).__name__} has no names of tensors; plan a module, or a mapping of names to tensors"
    with pytest.raises(ObservationError, match=f"^{message}$"):
        tiepolicy.plan(source)


def test_where_a_model_is_changed_a_mapping_is_refused():
    state_dict = TiedPair().state_dict()
    for change in (tiepolicy.tie, tiepolicy.plan(state_dict).retie):
        with pytest.raises(ObservationError, match="^a OrderedDict is no module; hand over the model itself$"):
            change(state_dict | {"lm_head.weight": torch.zeros(12, 4)})


def test_where_a_state_is_expected_anything_else_is_refused():
    model = TiedPair()
    plan = tiepolicy.plan(model)
    for read in (plan.compact, plan.expand):
        with pytest.raises(ObservationError, match=r"a TiedPair is no state dict; hand over model.state_dict\(\)"):
            read(model)
    with pytest.raises(ObservationError, match="embed_tokens.weight is a ndarray, not a tensor"):
        plan.compact({name: tensor.numpy() for name, tensor in model.state_dict().items()})


def test_facts_are_not_gathered_again():
    facts = tiepolicy.observe(TiedPair())
    assert facts is tiepolicy.observe(facts)
