"""One process saves and loads: each tied tensor once, into any model that can hold it, and nothing half done."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import tiepolicy
import tiepolicy_dcp
import tiepolicy_hf._plugin
from models import FlaggedPair, HeadFirst, TiedPair, train_steps
from tiepolicy import Policy, Resolution, Verdict, hookimpl
from tiepolicy.errors import (
    DtypeMismatchError,
    MissingTensorError,
    ShapeMismatchError,
    TieConflictError,
    UnsafeVerdictError,
)
from tiepolicy_dcp import CheckpointError, ModelState, OptimizerState

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def plain_dcp_save(state, folder):
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save(state, checkpoint_id=folder)


def test_a_tied_tensor_is_written_once(tmp_path):
    model = TiedPair(vocab_size=4096, hidden_size=16)
    folder = tiepolicy_dcp.save(tmp_path / "ours", model=model)
    unique = model.embed_tokens.weight.nbytes
    plain_dcp_save(model.state_dict(), tmp_path / "plain")
    size = {name: sum(path.stat().st_size for path in (tmp_path / name).iterdir()) for name in ("ours", "plain")}
    assert unique < size["ours"] < 1.05 * unique
    assert 2 * unique < size["plain"]
    assert folder == tmp_path / "ours"


def test_a_model_whose_state_is_a_copy_is_filled_too(tmp_path):
    """As hooks make one that gather, cast or unpack; what is read into the copy has yet to come to the model."""

    def copied(module, state, prefix, _):
        for name in list(state):
            state[name] = state[name].clone()

    saved, model = TiedPair(), TiedPair()
    model.register_state_dict_post_hook(copied)
    tiepolicy_dcp.save(tmp_path / "c", model=saved)
    tiepolicy_dcp.load(tmp_path / "c", model=model)
    assert torch.equal(saved.lm_head.weight, model.lm_head.weight)
    assert model.lm_head.weight is model.embed_tokens.weight


@pytest.mark.parametrize("tied", [True, False])
def test_plain_dcp_finds_both_names_of_what_was_written_once(tmp_path, tied):
    """Into a tied and into an untied model, by code that knows nothing of ties."""
    model = TiedPair(vocab_size=4096)
    folder = tiepolicy_dcp.save(tmp_path / "c", model=model)
    assert (folder / "__0_0.distcp").stat().st_size < 1.1 * model.embed_tokens.weight.nbytes
    plain = TiedPair(tied=tied, vocab_size=4096)
    state = {"model": plain.state_dict()}
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.load(state, checkpoint_id=folder)
    plain.load_state_dict(state["model"])
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    assert torch.equal(model.lm_head.weight, plain.embed_tokens.weight)


def test_torchs_own_converter_finds_both_names(tmp_path):
    model = TiedPair()
    folder = tiepolicy_dcp.save(tmp_path / "c", model=model)
    dcp_to_torch_save(folder, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {EMBED, HEAD} == set(loaded["model"])
    assert torch.equal(model.lm_head.weight, loaded["model"][HEAD])


def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(tmp_path):
    model = TiedPair()
    optimizer = adamw(model)
    train_steps(model, optimizer, num_steps=3)
    tiepolicy_dcp.save(tmp_path / "c", model=model, optimizer=optimizer, extra={"step": 3})
    expected = train_steps(model, optimizer, num_steps=4, seed=1)

    resumed = TiedPair()
    resumed_optimizer = torch.optim.AdamW(resumed.parameters(), lr=99.0)
    restored = tiepolicy_dcp.load(tmp_path / "c", model=resumed, optimizer=resumed_optimizer)
    assert 3 == restored.extra["step"]
    assert expected == train_steps(resumed, resumed_optimizer, num_steps=4, seed=1)
    assert torch.equal(model.lm_head.weight, resumed.lm_head.weight)


def test_the_order_in_which_modules_were_registered_does_not_matter_to_the_optimizer(tmp_path):
    model = HeadFirst()
    optimizer = adamw(model)
    train_steps(model, optimizer, num_steps=2)
    tiepolicy_dcp.save(tmp_path / "c", model=model, optimizer=optimizer)
    resumed = TiedPair()
    resumed_optimizer = adamw(resumed)
    tiepolicy_dcp.load(tmp_path / "c", model=resumed, optimizer=resumed_optimizer)
    assert train_steps(model, optimizer, num_steps=2) == train_steps(resumed, resumed_optimizer, num_steps=2)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop])
def test_optimizers_of_other_kinds_are_restored_too(tmp_path, make):
    model = TiedPair()
    optimizer = make(model.parameters(), lr=0.1)
    train_steps(model, optimizer, num_steps=2)
    tiepolicy_dcp.save(tmp_path / "c", model=model, optimizer=optimizer)
    resumed = TiedPair()
    resumed_optimizer = make(resumed.parameters(), lr=0.5)
    tiepolicy_dcp.load(tmp_path / "c", model=resumed, optimizer=resumed_optimizer)
    assert train_steps(model, optimizer, num_steps=2) == train_steps(resumed, resumed_optimizer, num_steps=2)


def test_a_shrunken_head_under_an_inherited_flag_is_kept(tmp_path):
    """The first failure: the head was dropped for its flag and could not be rebuilt."""
    model = FlaggedPair(flag=True, vocab_size=64, draft_vocab_size=8, hidden_size=4)
    tiepolicy_dcp.save(tmp_path / "c", model=model)
    resumed = FlaggedPair(flag=True, vocab_size=64, draft_vocab_size=8, hidden_size=4)
    tiepolicy_dcp.load(tmp_path / "c", model=resumed)
    assert torch.equal(model.lm_head.weight, resumed.lm_head.weight)
    assert (8, 4) == tuple(resumed.lm_head.weight.shape)


def test_the_flag_trusting_rule_is_stopped_before_anything_is_written(tmp_path):
    class FlagTrusting:
        @hookimpl
        def tiepolicy_decide(self, claim):
            return Verdict.alias("same-storage") if claim.source == "declared" else None

    model = FlaggedPair(flag=True, vocab_size=64, draft_vocab_size=8, hidden_size=4)
    policy = Policy(plugins=[tiepolicy_hf._plugin, FlagTrusting()])
    with pytest.raises(UnsafeVerdictError, match="Saving would lose lm_head.weight; nothing was written"):
        tiepolicy_dcp.save(tmp_path / "c", model=model, plan=policy.plan(model))
    assert [] == list(tmp_path.iterdir())


def test_a_tie_that_was_lost_and_drifted_stops_the_save_and_leaves_nothing(tmp_path):
    model = TiedPair()
    plan = tiepolicy.plan(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    with pytest.raises(TieConflictError, match="their values differ"):
        tiepolicy_dcp.save(tmp_path / "c", model=model, plan=plan)
    assert [] == list(tmp_path.iterdir())


def test_a_tied_checkpoint_fills_both_tensors_of_an_untied_model(tmp_path):
    model = TiedPair()
    tiepolicy_dcp.save(tmp_path / "c", model=model)
    untied = TiedPair(tied=False)
    restored = tiepolicy_dcp.load(tmp_path / "c", model=untied)
    assert torch.equal(model.lm_head.weight, untied.lm_head.weight)
    assert torch.equal(model.lm_head.weight, untied.embed_tokens.weight)
    assert untied.lm_head.weight is not untied.embed_tokens.weight
    assert ["", "lm_head.weight and embed_tokens.weight were one tensor when saved; each gets its values"] == [
        action.note for action in restored.actions
    ]


@pytest.mark.parametrize("kept", ["embed_tokens.weight", "lm_head.weight"])
def test_which_of_two_values_a_plugin_keeps_is_among_the_actions(kept, tmp_path):
    class Keeps:
        @hookimpl
        def tiepolicy_resolve(self):
            return Resolution.keep(kept)

    stored, model = TiedPair(tied=False), TiedPair()
    tiepolicy_dcp.save(tmp_path / "c", model=stored)
    restored = tiepolicy_dcp.load(tmp_path / "c", model=model, plan=Policy(plugins=[Keeps()]).plan(model))
    assert torch.equal(stored.get_parameter(kept), model.embed_tokens.weight)
    assert [
        ("load", kept, "embed_tokens.weight", f"of two values, a plugin keeps that of {kept}"),
        ("compare", "lm_head.weight", "lm_head.weight", "one tensor with embed_tokens.weight in the model"),
    ] == [(action.kind, action.saved, action.name, action.note) for action in restored.actions]


def test_two_stored_values_for_one_live_tensor_are_a_conflict_and_the_model_is_untouched(tmp_path):
    tiepolicy_dcp.save(tmp_path / "c", model=TiedPair(tied=False))
    model = TiedPair()
    before = model.lm_head.weight.clone()
    message = "lm_head.weight and embed_tokens.weight are one tensor in the model, but their values differ: first at"
    with pytest.raises(TieConflictError, match=message):
        tiepolicy_dcp.load(tmp_path / "c", model=model)
    assert torch.equal(before, model.lm_head.weight)


@pytest.mark.parametrize("kept", [EMBED, HEAD])
def test_a_plugin_may_choose_which_of_two_stored_values_is_loaded(tmp_path, kept):
    class Chooses:
        @hookimpl
        def tiepolicy_resolve(self, conflict):
            return Resolution.keep(kept)

    saved = TiedPair(tied=False)
    tiepolicy_dcp.save(tmp_path / "c", model=saved)
    model = TiedPair()
    tiepolicy_dcp.load(tmp_path / "c", model=model, plan=Policy(plugins=[Chooses()]).plan(model))
    assert torch.equal(saved.state_dict()[kept], model.lm_head.weight)
    assert model.lm_head.weight is model.embed_tokens.weight


def test_a_plugin_cannot_untie_a_live_model_by_loading(tmp_path):
    class Unties:
        @hookimpl
        def tiepolicy_resolve(self):
            return Resolution.untie()

    tiepolicy_dcp.save(tmp_path / "c", model=TiedPair(tied=False))
    model = TiedPair()
    with pytest.raises(TieConflictError, match="untie the model before its plan is made. Nothing was loaded"):
        tiepolicy_dcp.load(tmp_path / "c", model=model, plan=Policy(plugins=[Unties()]).plan(model))


class Embedding(torch.nn.Module):
    """What a checkpoint without a head was made of."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(12, 4)


@pytest.mark.parametrize("answer", [Resolution.take(EMBED), Resolution.leave()])
def test_a_plugin_may_say_what_becomes_of_a_missing_tensor(tmp_path, answer):
    class Says:
        @hookimpl
        def tiepolicy_resolve(self):
            return answer

    saved, model = Embedding(), TiedPair(tied=False)
    before = model.lm_head.weight.clone()
    tiepolicy_dcp.save(tmp_path / "c", model=saved)
    tiepolicy_dcp.load(tmp_path / "c", model=model, plan=Policy(plugins=[Says()]).plan(model))
    assert torch.equal(saved.embed_tokens.weight, model.embed_tokens.weight)
    expected = saved.embed_tokens.weight if answer.name else before
    assert torch.equal(expected, model.lm_head.weight)


def test_two_stored_names_with_equal_bits_load_into_a_tie(tmp_path):
    untied = TiedPair(tied=False)
    untied.lm_head.weight.data.copy_(untied.embed_tokens.weight.data)
    tiepolicy_dcp.save(tmp_path / "c", model=untied)
    model = TiedPair()
    tiepolicy_dcp.load(tmp_path / "c", model=model)
    assert torch.equal(untied.lm_head.weight, model.lm_head.weight)
    assert model.lm_head.weight is model.embed_tokens.weight


def test_a_folder_of_plain_dcp_loads_too(tmp_path):
    source = TiedPair()
    plain_dcp_save({"model": source.state_dict()}, tmp_path / "plain")
    model = TiedPair()
    tiepolicy_dcp.load(tmp_path / "plain", model=model)
    assert torch.equal(source.lm_head.weight, model.lm_head.weight)


def test_the_stateful_wrappers_work_with_plain_dcp(tmp_path):
    model = TiedPair()
    optimizer = adamw(model)
    train_steps(model, optimizer, num_steps=2)
    plain_dcp_save({"model": ModelState(model), "optimizer": OptimizerState(model, optimizer)}, tmp_path / "c")
    resumed = HeadFirst()
    resumed_optimizer = adamw(resumed)
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.load(
            {"model": ModelState(resumed), "optimizer": OptimizerState(resumed, resumed_optimizer)},
            checkpoint_id=tmp_path / "c",
        )
    assert train_steps(model, optimizer, num_steps=2) == train_steps(resumed, resumed_optimizer, num_steps=2)


def test_the_consolidated_file_holds_each_tensor_once_as_other_tools_read_it(tmp_path):
    model = TiedPair()
    folder = tiepolicy_dcp.save(tmp_path / "c", model=model, consolidated=True)
    tensors = load_file(folder / "model.safetensors")
    assert [EMBED] == list(tensors)
    assert torch.equal(model.embed_tokens.weight, tensors[EMBED])
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {"format": "pt"} == file.metadata()


def test_extra_state_comes_back_with_its_tensors(tmp_path):
    rng_state = torch.get_rng_state()
    extra = {"step": 3, "rng": [rng_state, {"cuda": None}], "name": "epoch_1_step_3", "lr": 0.1}
    tiepolicy_dcp.save(tmp_path / "c", model=TiedPair(), extra=extra)
    restored = dict(tiepolicy_dcp.load(tmp_path / "c", model=TiedPair()).extra)
    state, rest = restored.pop("rng")
    assert torch.equal(rng_state, state)
    assert ({"cuda": None}, {"step": 3, "name": "epoch_1_step_3", "lr": 0.1}) == (rest, restored)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (
            lambda: TiedPair(vocab_size=9),
            ShapeMismatchError,
            r"\(12, 4\) in the checkpoint, the model expects \(9, 4\)",
        ),
        (lambda: TiedPair().double(), DtypeMismatchError, "convert the model with .to"),
        (lambda: torch.nn.Linear(2, 2), MissingTensorError, r"bias \(2,\) is not in the checkpoint"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_it_is_touched(tmp_path, model, error, message):
    tiepolicy_dcp.save(tmp_path / "c", model=TiedPair())
    live = model()
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    with pytest.raises(error, match=message):
        tiepolicy_dcp.load(tmp_path / "c", model=live)
    assert all(torch.equal(before[name], tensor) for name, tensor in live.state_dict().items())


def test_parameter_groups_of_other_parameters_are_refused(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))

    def grouped(first, second):
        return torch.optim.AdamW([{"params": first.parameters()}, {"params": second.parameters(), "lr": 0.5}])

    tiepolicy_dcp.save(tmp_path / "c", model=model, optimizer=grouped(model[0], model[1]))
    with pytest.raises(CheckpointError, match="parameter group 0 holds other parameters than when it was saved"):
        tiepolicy_dcp.load(tmp_path / "c", model=model, optimizer=grouped(model[1], model[0]))


def test_a_checkpoint_is_never_written_over_another(tmp_path):
    tiepolicy_dcp.save(tmp_path / "c", model=TiedPair())
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    with pytest.raises(CheckpointError, match="exists already, and a checkpoint is never written over another"):
        tiepolicy_dcp.save(tmp_path / "c", model=TiedPair())
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot make a folder for the checkpoint .*file/c: "):
        tiepolicy_dcp.save(tmp_path / "file" / "c", model=TiedPair())


def test_extra_state_that_is_no_json_leaves_nothing_behind(tmp_path):
    with pytest.raises(CheckpointError, match="extra state can hold tensors and what JSON can"):
        tiepolicy_dcp.save(tmp_path / "c", model=TiedPair(), extra={"optimizer": object()})
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ({"scheduler": {"milestones": {30: 1}}}, "30, a key of /scheduler/milestones, would come back as a string"),
        ([1], "extra must be a dict, not a list"),
    ],
)
def test_extra_state_that_would_come_back_as_something_else_is_refused(tmp_path, extra, problem):
    with pytest.raises(CheckpointError, match=problem):
        tiepolicy_dcp.save(tmp_path / "c", model=TiedPair(), extra=extra)


def test_tensors_of_extra_state_stay_apart_whatever_their_keys(tmp_path):
    extra = {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}}
    restored = tiepolicy_dcp.load(tiepolicy_dcp.save(tmp_path / "c", model=TiedPair(), extra=extra), model=TiedPair())
    assert (0, 1) == (restored.extra["a/b"].item(), restored.extra["a"]["b"].item())


def test_the_state_of_an_optimizer_in_its_place_is_refused(tmp_path):
    model = TiedPair()
    state = torch.optim.SGD(model.parameters()).state_dict()
    with pytest.raises(CheckpointError, match="optimizer is a dict: hand over the optimizer itself"):
        tiepolicy_dcp.save(tmp_path / "c", model=model, optimizer=state)


def test_an_unknown_way_to_verify_is_refused(tmp_path):
    folder = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair())
    with pytest.raises(CheckpointError, match="verify is 'Full', but must be one of full, size, off"):
        tiepolicy_dcp.load(folder, model=TiedPair(), verify="Full")


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="is no checkpoint: it has no .metadata file"):
        tiepolicy_dcp.load(tmp_path, model=TiedPair())
