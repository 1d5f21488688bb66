"""Failures of the field that concern optimizer state across ties: what torch does today, and what happens here.

A test whose name says `today` pins torch's behaviour; when it fails, torch was fixed.
"""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import tiepolicy_dcp
from models import HeadFirst, TiedPair, train_steps
from tiepolicy import ActionKind, Moment, Policy, Resolution, hookimpl
from tiepolicy.errors import MissingTensorError, TieConflictError
from tiepolicy_dcp import CheckpointError, ModelState, OptimizerState

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"
FLAT, NESTED = StateDictOptions(flatten_optimizer_state_dict=True), StateDictOptions()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def momentum(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


MAKERS = pytest.mark.parametrize("make", [adamw, momentum])


def trained(model, make):
    optimizer = make(model)
    train_steps(model, optimizer, num_steps=2)
    return optimizer


def plain_dcp(call, state, folder):
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        call(state, checkpoint_id=folder)


def states(optimizer, parameter):
    return {key: value for key, value in optimizer.state[parameter].items() if value is not None}


def assert_same_state(expected, actual):
    assert set(expected) == set(actual)
    assert [True] * len(expected) == [torch.equal(value, actual[key]) for key, value in expected.items()]


def test_today_the_flat_state_of_a_tied_adamw_crashes_an_untied_one_with_a_type_error():
    tied, untied = TiedPair(), TiedPair(tied=False)
    state = get_optimizer_state_dict(tied, trained(tied, adamw), options=FLAT)
    with pytest.raises(TypeError, match="float()"):
        set_optimizer_state_dict(untied, adamw(untied), state, options=FLAT)


def test_today_the_flat_state_of_a_tied_sgd_leaves_an_untied_one_that_cannot_step():
    tied, untied = TiedPair(), TiedPair(tied=False)
    state = get_optimizer_state_dict(tied, trained(tied, momentum), options=FLAT)
    optimizer = momentum(untied)
    set_optimizer_state_dict(untied, optimizer, state, options=FLAT)
    with pytest.raises(AttributeError, match="'dict' object"):
        train_steps(untied, optimizer, num_steps=1)


@MAKERS
def test_today_the_nested_state_of_a_tied_model_is_refused_by_an_untied_one(make):
    tied, untied = TiedPair(), TiedPair(tied=False)
    state = get_optimizer_state_dict(tied, trained(tied, make), options=NESTED)
    with pytest.raises(RuntimeError, match=f"Missing optimizer state for parameter '{HEAD}'"):
        set_optimizer_state_dict(untied, make(untied), state, options=NESTED)


@pytest.mark.survey("T14", "T15")
@MAKERS
def test_both_parameters_get_the_state_that_was_one_when_saved_and_that_is_reported(tmp_path, make):
    tied, untied = TiedPair(), TiedPair(tied=False)
    saved = trained(tied, make)
    tiepolicy_dcp.save(tmp_path / "c", model=tied, optimizer=saved)
    optimizer = make(untied)
    restored = tiepolicy_dcp.load(tmp_path / "c", model=untied, optimizer=optimizer)
    expected = states(saved, tied.embed_tokens.weight)
    assert_same_state(expected, states(optimizer, untied.embed_tokens.weight))
    assert_same_state(expected, states(optimizer, untied.lm_head.weight))
    copied = [action for action in restored.optimizer_actions if action.kind is ActionKind.COPY]
    assert [f"state.{HEAD}.{key}" for key in expected] == [action.name for action in copied]
    assert {f"{HEAD} and {EMBED} were one parameter when saved; each gets its state"} == {a.note for a in copied}
    train_steps(untied, optimizer, num_steps=2)
    assert not torch.equal(untied.embed_tokens.weight, untied.lm_head.weight)


@MAKERS
def test_plain_dcp_gives_both_parameters_the_state_that_was_one_when_saved(tmp_path, make):
    tied, untied = TiedPair(), TiedPair(tied=False)
    saved = trained(tied, make)
    folder = tiepolicy_dcp.save(tmp_path / "c", model=tied, optimizer=saved)
    optimizer = make(untied)
    plain_dcp(dcp.load, {"model": ModelState(untied), "optimizer": OptimizerState(untied, optimizer)}, folder)
    expected = states(saved, tied.embed_tokens.weight)
    assert_same_state(expected, states(optimizer, untied.embed_tokens.weight))
    assert_same_state(expected, states(optimizer, untied.lm_head.weight))
    assert torch.equal(tied.lm_head.weight, untied.lm_head.weight)


@pytest.mark.parametrize("options", [FLAT, NESTED])
@MAKERS
def test_today_the_state_of_an_untied_model_is_refused_by_a_tied_one_without_a_name(make, options):
    untied, tied = TiedPair(tied=False), TiedPair()
    state = get_optimizer_state_dict(untied, trained(untied, make), options=options)
    with pytest.raises(ValueError, match="parameter group that doesn't match the size") as caught:
        set_optimizer_state_dict(tied, make(tied), state, options=options)
    assert EMBED not in str(caught.value)


def untied_with_equal_values(make):
    """Weights that could be one tensor, with optimizer states that could not."""
    model = TiedPair(tied=False)
    optimizer = trained(model, make)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.embed_tokens.weight)
    return model, optimizer


@pytest.mark.survey("T16")
@MAKERS
def test_two_states_for_one_parameter_are_a_conflict_that_names_it_and_nothing_is_loaded(tmp_path, make):
    untied, saved = untied_with_equal_values(make)
    tiepolicy_dcp.save(tmp_path / "c", model=untied, optimizer=saved)
    tied = TiedPair()
    optimizer = make(tied)
    before = tied.lm_head.weight.detach().clone()
    with pytest.raises(TieConflictError, match=f"{HEAD} and {EMBED} are one parameter of the optimizer, but their"):
        tiepolicy_dcp.load(tmp_path / "c", model=tied, optimizer=optimizer)
    assert torch.equal(before, tied.lm_head.weight)


@pytest.mark.parametrize("kept", [EMBED, HEAD])
@MAKERS
def test_a_plugin_chooses_which_of_two_states_a_tied_parameter_gets(tmp_path, make, kept):
    moments = []

    class Chooses:
        @hookimpl
        def tiepolicy_resolve(self, conflict):
            moments.append(conflict.moment)
            return Resolution.keep(kept)

    untied, saved = untied_with_equal_values(make)
    tiepolicy_dcp.save(tmp_path / "c", model=untied, optimizer=saved)
    tied = TiedPair()
    optimizer = make(tied)
    plan = Policy(plugins=[Chooses()]).plan(tied)
    restored = tiepolicy_dcp.load(tmp_path / "c", model=tied, optimizer=optimizer, plan=plan)
    filled = {action.note for action in restored.optimizer_actions if action.kind is ActionKind.LOAD and action.note}
    assert {f"of two states, a plugin keeps that of {kept}"} == filled
    expected = states(saved, dict(untied.named_parameters())[kept])
    assert_same_state(expected, states(optimizer, tied.embed_tokens.weight))
    assert [Moment.OPTIMIZER] == moments


def test_a_plugin_cannot_untie_a_parameter_by_loading_its_state(tmp_path):
    class Unties:
        @hookimpl
        def tiepolicy_resolve(self):
            return Resolution.untie()

    untied, saved = untied_with_equal_values(adamw)
    tiepolicy_dcp.save(tmp_path / "c", model=untied, optimizer=saved)
    tied = TiedPair()
    with pytest.raises(TieConflictError, match="untied, but they are one tensor in the model: untie the model before"):
        tiepolicy_dcp.load(
            tmp_path / "c", model=tied, optimizer=adamw(tied), plan=Policy(plugins=[Unties()]).plan(tied)
        )


def test_two_equal_states_become_one(tmp_path):
    """As in the first checkpoint after a model was untied."""
    tied, untied = TiedPair(), TiedPair(tied=False)
    saved, between = trained(tied, adamw), adamw(untied)
    tiepolicy_dcp.save(tmp_path / "tied", model=tied, optimizer=saved)
    tiepolicy_dcp.load(tmp_path / "tied", model=untied, optimizer=between)
    tiepolicy_dcp.save(tmp_path / "untied", model=untied, optimizer=between)
    again = TiedPair()
    optimizer = adamw(again)
    tiepolicy_dcp.load(tmp_path / "untied", model=again, optimizer=optimizer)
    assert train_steps(tied, saved, num_steps=2) == train_steps(again, optimizer, num_steps=2)


def test_plain_dcp_refuses_two_states_for_one_parameter_since_it_looks_at_one_only(tmp_path):
    untied, saved = untied_with_equal_values(adamw)
    folder = tiepolicy_dcp.save(tmp_path / "c", model=untied, optimizer=saved)
    tied = TiedPair()
    state = {"model": ModelState(tied), "optimizer": OptimizerState(tied, adamw(tied))}
    with pytest.warns(UserWarning, match="disabled"), pytest.raises(CheckpointError, match="had 2 parameters when"):
        dcp.load(state, checkpoint_id=folder)


@pytest.mark.parametrize("options", [FLAT, NESTED])
@MAKERS
def test_today_another_order_of_registration_cannot_resume(tmp_path, make, options):
    first, second = HeadFirst(), TiedPair()
    plain_dcp(dcp.save, {"o": get_optimizer_state_dict(first, trained(first, make), options=options)}, tmp_path / "c")
    state = {"o": get_optimizer_state_dict(second, trained(second, make), options=options)}
    with pytest.warns(UserWarning, match="disabled"), pytest.raises(CheckpointException, match=f"Missing key.*{EMBED}"):
        dcp.load(state, checkpoint_id=tmp_path / "c")


@pytest.mark.survey("T17")
@MAKERS
@pytest.mark.parametrize(("first", "second"), [(HeadFirst, TiedPair), (TiedPair, HeadFirst)])
def test_any_order_of_registration_resumes_any_other(tmp_path, make, first, second):
    """Through us, and through a plain dcp.load of the same folder."""
    model, resumed, plain = first(), second(), second()
    optimizer, resumed_optimizer, plain_optimizer = trained(model, make), make(resumed), make(plain)
    folder = tiepolicy_dcp.save(tmp_path / "c", model=model, optimizer=optimizer)
    tiepolicy_dcp.load(folder, model=resumed, optimizer=resumed_optimizer)
    plain_dcp(dcp.load, {"model": ModelState(plain), "optimizer": OptimizerState(plain, plain_optimizer)}, folder)
    losses = train_steps(model, optimizer, num_steps=2)
    assert losses == train_steps(resumed, resumed_optimizer, num_steps=2)
    assert losses == train_steps(plain, plain_optimizer, num_steps=2)


@pytest.mark.parametrize("make_model", [TiedPair, HeadFirst])
def test_a_tie_in_two_groups_of_parameters_is_refused_by_its_group(tmp_path, make_model):
    """Whether the head decays is nothing that a tied checkpoint could know."""
    tied, untied = make_model(), make_model(tied=False)
    tiepolicy_dcp.save(tmp_path / "c", model=tied, optimizer=trained(tied, adamw))
    groups = [{"params": [untied.embed_tokens.weight]}, {"params": [untied.lm_head.weight], "weight_decay": 0.0}]
    with pytest.raises(
        MissingTensorError, match="param_groups.1 is not in the checkpoint: the optimizer was of another"
    ):
        tiepolicy_dcp.load(tmp_path / "c", model=untied, optimizer=torch.optim.AdamW(groups, lr=0.1))


def test_two_parameters_on_one_storage_keep_a_state_each(tmp_path):
    """The weight is stored once; what two steps made of two states is not merged."""

    def shared():
        model = TiedPair(tied=False)
        model.lm_head.weight = torch.nn.Parameter(model.embed_tokens.weight.data)
        return model

    model, resumed = shared(), shared()
    optimizer, resumed_optimizer = trained(model, adamw), adamw(resumed)
    tiepolicy_dcp.save(tmp_path / "c", model=model, optimizer=optimizer)
    tiepolicy_dcp.load(tmp_path / "c", model=resumed, optimizer=resumed_optimizer)
    for name, parameter in resumed.named_parameters():
        assert_same_state(states(optimizer, dict(model.named_parameters())[name]), states(resumed_optimizer, parameter))
    assert not torch.equal(*(resumed_optimizer.state[p]["exp_avg"] for p in resumed.parameters()))


def test_hyperparameters_that_plain_dcp_pickled_are_named_and_not_run(tmp_path):
    model = TiedPair()
    optimizer = trained(model, adamw)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    plain_dcp(dcp.save, state, tmp_path / "c")
    with pytest.raises(MissingTensorError, match="its param_groups are pickled objects, and pickles are never run"):
        tiepolicy_dcp.load(tmp_path / "c", model=model, optimizer=optimizer)


def with_empty_group(model, lr):
    return torch.optim.AdamW([{"params": []}, {"params": list(model.parameters())}], lr=lr)


def test_today_a_group_without_parameters_loses_its_learning_rate():
    model = TiedPair()
    optimizer = with_empty_group(model, 0.1)
    set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, optimizer))
    assert "lr" not in optimizer.param_groups[0]


def test_a_group_without_parameters_is_restored(tmp_path):
    model, resumed = TiedPair(), TiedPair()
    optimizer = with_empty_group(resumed, 0.5)
    tiepolicy_dcp.save(tmp_path / "c", model=model, optimizer=with_empty_group(model, 0.1))
    tiepolicy_dcp.load(tmp_path / "c", model=resumed, optimizer=optimizer)
    assert [0.1, 0.1] == [group["lr"] for group in optimizer.param_groups]
    train_steps(resumed, optimizer, num_steps=1)


def test_hyperparameters_that_are_no_json_are_refused(tmp_path):
    model = TiedPair()
    optimizer = adamw(model)
    optimizer.param_groups[0]["schedule"] = object()
    with pytest.raises(
        CheckpointError, match="the hyperparameters of parameter group 0 are no JSON: Object of type object"
    ):
        tiepolicy_dcp.save(tmp_path / "c", model=model, optimizer=optimizer)
    assert [] == list(tmp_path.iterdir())


def test_an_optimizer_of_parameters_that_the_model_lost_is_refused():
    """As after a load that replaced the parameters behind the optimizer."""
    model = TiedPair()
    optimizer = adamw(model)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    with pytest.raises(CheckpointError, match="holds 1 parameter that the model does not have: the model's were repl"):
        OptimizerState(model, optimizer).state_dict()


def test_a_checkpoint_without_an_optimizer_says_so(tmp_path):
    model = TiedPair()
    tiepolicy_dcp.save(tmp_path / "c", model=model)
    with pytest.raises(MissingTensorError, match="is not in the checkpoint: the checkpoint holds no optimizer"):
        tiepolicy_dcp.load(tmp_path / "c", model=model, optimizer=adamw(model))


def frozen_pair():
    model = TiedPair()
    model.norm = torch.nn.LayerNorm(4)
    model.embed_tokens.weight.requires_grad_(False)
    return model


def test_today_leaving_out_frozen_parameters_leaves_out_one_of_two_names():
    kept = get_model_state_dict(frozen_pair(), options=StateDictOptions(ignore_frozen_params=True))
    assert {HEAD, "norm.weight", "norm.bias"} == set(kept)


@pytest.mark.survey("T20")
def test_a_frozen_tie_that_another_model_owns_is_left_out_under_both_names(tmp_path):
    model = frozen_pair()
    owner = TiedPair()
    owner.load_state_dict({EMBED: model.embed_tokens.weight, HEAD: model.embed_tokens.weight})
    model.embed_tokens.weight = model.lm_head.weight = owner.embed_tokens.weight
    state = ModelState(model, external={"owner": owner})
    assert {"norm.weight", "norm.bias"} == set(state.state_dict())
