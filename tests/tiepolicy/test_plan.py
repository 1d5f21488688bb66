"""What can be done with a plan: compact, expand, verify, compare, print."""

import pytest
import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from hypothesis import given
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

import tiepolicy
from models import HeadFirst, TiedPair, tiny_llama
from strategies import flagged_pairs, small_sizes, tied_modules, view_dicts
from tiepolicy.errors import BrokenTieError, MissingTensorError, ShapeMismatchError, TieConflictError


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@given(view_dicts())
def test_expand_gives_back_what_compact_left_out_bit_for_bit(state_dict):
    plan = tiepolicy.plan(state_dict)
    expanded = plan.expand(plan.compact(state_dict))
    assert {name: (tensor.shape, tensor.dtype, bits(tensor)) for name, tensor in state_dict.items()} == {
        name: (tensor.shape, tensor.dtype, bits(tensor)) for name, tensor in expanded.items()
    }


@given(flagged_pairs(sizes=small_sizes()))
def test_the_state_of_any_flagged_pair_survives_the_round_trip(model):
    state_dict = model.state_dict()
    plan = tiepolicy.plan(model)
    expanded = plan.expand(plan.compact(state_dict))
    assert {name: bits(tensor) for name, tensor in state_dict.items()} == {
        name: bits(tensor) for name, tensor in expanded.items()
    }


@given(view_dicts())
def test_a_compact_state_holds_every_element_once_or_is_not_smaller_than_need_be(state_dict):
    """What is stored never exceeds the tensors given, and a double of a stored tensor is never stored."""
    plan = tiepolicy.plan(state_dict)
    compacted = plan.compact(state_dict)
    places = [
        (t.untyped_storage().data_ptr(), t.storage_offset(), t.shape, t.stride(), t.dtype)
        for t in compacted.values()
        if t.numel()
    ]
    assert len(places) == len(set(places))


@given(view_dicts())
def test_compacting_and_expanding_twice_is_the_same_as_once(state_dict):
    plan = tiepolicy.plan(state_dict)
    compacted = plan.compact(state_dict)
    expanded = plan.expand(compacted)
    assert list(compacted) == list(plan.compact(compacted))
    assert {name: bits(t) for name, t in expanded.items()} == {
        name: bits(t) for name, t in plan.expand(expanded).items()
    }


@given(view_dicts())
def test_the_plan_does_not_depend_on_the_order_of_names(state_dict):
    backwards = dict(reversed(state_dict.items()))
    assert tiepolicy.plan(state_dict) == tiepolicy.plan(backwards)
    assert tiepolicy.plan(state_dict).digest == tiepolicy.plan(backwards).digest


def test_the_plan_does_not_depend_on_the_order_of_registration():
    assert tiepolicy.plan(TiedPair()) == tiepolicy.plan(HeadFirst())


@given(tied_modules())
def test_a_module_and_its_state_dict_have_the_same_groups(model):
    assert tiepolicy.plan(model).groups == tuple(
        tiepolicy.TieGroup(
            canonical=group.canonical,
            aliases=tuple(
                tiepolicy.Alias(name=alias.name, reason=tiepolicy.Reason.SAME_OBJECT) for alias in group.aliases
            ),
        )
        for group in tiepolicy.plan(model.state_dict()).groups
    )


def test_compact_copies_nothing_and_leaves_its_argument_alone():
    model = TiedPair()
    state_dict = model.state_dict()
    compacted = tiepolicy.plan(model).compact(state_dict)
    assert ["embed_tokens.weight"] == list(compacted)
    assert compacted["embed_tokens.weight"] is state_dict["embed_tokens.weight"]
    assert 2 == len(state_dict)


def test_cloned_tensors_of_a_tie_are_left_out_when_their_bits_are_equal():
    model = TiedPair()
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert ["embed_tokens.weight"] == list(tiepolicy.plan(model).compact(gathered))


def test_different_values_under_a_tie_stop_the_compaction_and_are_located():
    model = TiedPair()
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gathered["lm_head.weight"][2, 1] += 1
    gathered["lm_head.weight"][3, 0] += 1
    with pytest.raises(TieConflictError, match=r"first at \(2, 1\), .* and .*, 2 of 48 elements in all") as caught:
        tiepolicy.plan(model).compact(gathered)
    assert ("lm_head.weight", "embed_tokens.weight") == caught.value.names


def test_tensors_without_data_are_not_taken_for_equal():
    """They were one when planned; whether they still are cannot be read."""
    meta = {name: torch.empty(12, 4, device="meta") for name in ("embed_tokens.weight", "lm_head.weight")}
    with pytest.raises(TieConflictError, match="they have no data to compare"):
        tiepolicy.plan(TiedPair()).compact(meta)


def test_nan_equals_itself_under_a_tie():
    """A diverged run can still be saved: bits are compared, not numbers."""
    model = TiedPair()
    nn.init.constant_(model.embed_tokens.weight, float("nan"))
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert ["embed_tokens.weight"] == list(tiepolicy.plan(model).compact(gathered))


def test_an_alias_stays_where_the_canonical_tensor_is_not_in_the_mapping():
    model = TiedPair()
    only_head = {"lm_head.weight": model.lm_head.weight}
    assert only_head == tiepolicy.plan(model).compact(only_head)


def test_expand_refuses_a_tensor_of_another_shape():
    with pytest.raises(ShapeMismatchError, match=r"embed_tokens.weight has shape \(3, 4\), but was \(12, 4\)"):
        tiepolicy.plan(TiedPair()).expand({"embed_tokens.weight": torch.zeros(3, 4)})


def test_expand_never_lets_one_of_two_different_values_win():
    state_dict = {"embed_tokens.weight": torch.zeros(12, 4), "lm_head.weight": torch.ones(12, 4)}
    with pytest.raises(TieConflictError, match="their values differ"):
        tiepolicy.plan(TiedPair()).expand(state_dict)


def test_verify_accepts_the_model_of_the_plan():
    model = TiedPair()
    plan = tiepolicy.plan(model)
    plan.verify(model.half())
    assert model.lm_head.weight is model.embed_tokens.weight


def test_verify_names_the_pair_and_the_step_that_broke_it():
    with torch.device("meta"):
        model = TiedPair()
    plan = tiepolicy.plan(model)
    model.to_empty(device="cpu")
    message = "lm_head.weight and embed_tokens.weight were one tensor before to_empty\\(\\) and no longer are"
    with pytest.raises(BrokenTieError, match=message):
        plan.verify(model, after="to_empty()")


def test_verify_tells_two_parameters_over_one_memory_from_one_parameter():
    model = TiedPair()
    plan = tiepolicy.plan(model)
    model.load_state_dict(model.state_dict(), assign=True)
    message = (
        "lm_head.weight and embed_tokens.weight share memory after assign=True but are two parameters, and were one: "
        "each would have a gradient and an optimizer state of its own. Call retie before the optimizer is built"
    )
    with pytest.raises(BrokenTieError) as caught:
        plan.verify(model, after="assign=True")
    assert message == str(caught.value)
    assert ("lm_head.weight", "embed_tokens.weight") == caught.value.names
    plan.verify(model.state_dict())


def test_verify_finds_two_parameters_on_one_storage_without_memory():
    plan = tiepolicy.plan(TiedPair())
    with init_empty_weights():
        model = TiedPair()
    with pytest.raises(BrokenTieError, match="share memory but are two parameters, and were one"):
        plan.verify(model)


@pytest.fixture
def process_group():
    dist.init_process_group("cpu:gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:`_get_pg_default_device`")
def test_verify_finds_what_a_full_load_into_a_model_without_data_left_as_two_parameters():
    with torch.device("meta"):
        model = TiedPair()
    plan = tiepolicy.plan(model)
    set_model_state_dict(model, TiedPair().state_dict(), options=StateDictOptions(full_state_dict=True))
    with pytest.raises(BrokenTieError, match="share memory after set_model_state_dict but are two parameters"):
        plan.verify(model, after="set_model_state_dict")
    plan.retie(model)
    plan.verify(model)
    assert model.lm_head.weight is model.embed_tokens.weight


def test_parameters_that_were_two_over_one_memory_when_planned_may_stay_two():
    model = TiedPair(tied=False)
    model.lm_head.weight = nn.Parameter(model.embed_tokens.weight.data)
    plan = tiepolicy.plan(model)
    plan.verify(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.data.clone())
    with pytest.raises(BrokenTieError, match="no longer are"):
        plan.verify(model)


def test_verify_says_when_a_tied_name_is_gone():
    with pytest.raises(MissingTensorError, match="lm_head.weight of the tied"):
        tiepolicy.plan(TiedPair()).verify(nn.ModuleDict({"embed_tokens": nn.Embedding(12, 4)}))


def test_a_plan_survives_a_manifest_and_equal_plans_have_equal_hashes():
    plan = tiepolicy.plan(tiny_llama(tie_word_embeddings=True))
    again = tiepolicy.TiePlan.from_manifest(plan.to_manifest())
    assert (plan, hash(plan), plan.digest) == (again, hash(again), again.digest)


def test_the_table_shows_groups_savings_and_refusals():
    model = tiny_llama(tie_word_embeddings=True)
    expected = """\
12 tensors, 1 tied group (6.14 kB saved), 0 claims refused

stored                     also named      shape     dtype    saved    because
model.embed_tokens.weight  lm_head.weight  (96, 16)  float32  6.14 kB  same-object"""
    assert expected == str(tiepolicy.plan(model))
