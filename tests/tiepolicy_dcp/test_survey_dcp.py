"""Failures of the field that concern DCP and state dicts: what torch does today, and what happens here.

A test whose name says `today` pins torch's behaviour; when it fails, torch was fixed.
"""

import json

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

import tiepolicy
import tiepolicy_dcp
from models import FlaggedPair, HeadFirst, TiedPair, train_steps
from plain_dcp import num_bytes, plain_load, plain_save
from tiepolicy import TiePlan
from tiepolicy.errors import (
    MissingTensorError,
    TieConflictError,
)
from tiepolicy_dcp import ModelState

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"


class LastStage(nn.Module):
    """The end of a pipeline: a head whose embedding is on another rank."""

    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(4, 12, bias=False)


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone, for what torch does only in one."""
    dist.init_process_group("cpu:gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# One copy, many names


def test_today_dcp_writes_a_tied_tensor_once_for_each_name(tmp_path):
    model = TiedPair(vocab_size=4096, hidden_size=16)
    plain_save(model.state_dict(), tmp_path / "plain")
    assert 2 * model.lm_head.weight.nbytes < num_bytes(tmp_path / "plain")


@pytest.mark.survey("T10")
def test_a_tied_tensor_is_written_once_with_ones_own_dcp_save(tmp_path):
    model = TiedPair(vocab_size=4096, hidden_size=16)
    plain_save({"model": ModelState(model)}, tmp_path / "own")
    ours = tiepolicy_dcp.save(tmp_path / "ours", model=model)
    for folder in (tmp_path / "own", ours):
        assert model.lm_head.weight.nbytes < num_bytes(folder) < 1.05 * model.lm_head.weight.nbytes


def test_today_the_converter_to_one_file_loses_the_alias(tmp_path):
    model = TiedPair()
    plain_save(model.state_dict(), tmp_path / "c")
    dcp_to_torch_save(tmp_path / "c", tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    assert loaded[EMBED].data_ptr() != loaded[HEAD].data_ptr()


@pytest.mark.survey("T21")
def test_the_manifest_makes_a_converted_state_dict_one_tensor_again(tmp_path):
    model = TiedPair(vocab_size=4096)
    folder = tiepolicy_dcp.save(tmp_path / "c", model=model)
    dcp_to_torch_save(folder, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=True)["model"]
    plan = TiePlan.from_manifest((folder / "manifest.json").read_text())
    whole = plan.expand(plan.compact(loaded))
    assert whole[EMBED].data_ptr() == whole[HEAD].data_ptr()
    assert torch.equal(model.lm_head.weight, whole[HEAD])
    torch.save(whole, tmp_path / "again.pt")
    assert (tmp_path / "again.pt").stat().st_size < 1.05 * model.lm_head.weight.nbytes


def test_today_the_hugging_face_writer_refuses_a_tied_state_dict(tmp_path):
    with pytest.warns(UserWarning, match="disabled"), pytest.raises(CheckpointException, match="share memory"):
        dcp.save(TiedPair().state_dict(), storage_writer=HuggingFaceStorageWriter(str(tmp_path)))


@pytest.mark.survey("T22")
def test_the_hugging_face_writer_takes_the_state_of_a_tied_model(tmp_path):
    model = TiedPair()
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save(ModelState(model).state_dict(), storage_writer=HuggingFaceStorageWriter(str(tmp_path)))
    (file,) = tmp_path.glob("*.safetensors")
    assert [EMBED] == list(load_file(file))
    assert torch.equal(model.lm_head.weight, load_file(file)[EMBED])


def consolidate(state, folder, mapping):
    writer = HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=mapping, save_distributed=True, enable_consolidation=True
    )
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save(state, storage_writer=writer)


def test_today_a_mapping_that_lists_what_is_not_written_makes_an_unreadable_file(tmp_path):
    model = TiedPair()
    consolidate({EMBED: model.embed_tokens.weight.detach()}, tmp_path, {EMBED: 1, HEAD: 2})
    with pytest.raises(SafetensorError, match="header"):
        load_file(tmp_path / "model-00002-of-00002.safetensors")


@pytest.mark.survey("T23")
def test_a_mapping_of_what_the_plan_stores_makes_files_that_are_whole(tmp_path):
    """The files of the original checkpoint listed both names."""
    model = TiedPair()
    plan = tiepolicy.plan(model)
    original = {EMBED: 1, HEAD: 2}
    mapping = {name: index for name, index in original.items() if name in plan.stored()}
    consolidate(plan.compact(model.state_dict()), tmp_path, mapping)
    listed = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert {EMBED} == set(listed)
    assert torch.equal(model.lm_head.weight, load_file(tmp_path / listed[EMBED])[EMBED])


# One of two names is there


@pytest.mark.parametrize("make", [TiedPair, HeadFirst])
def test_today_a_checkpoint_of_the_embedding_alone_crashes_the_load_into_a_tied_model(tmp_path, make):
    plain_save({"model": {EMBED: torch.ones(12, 4)}}, tmp_path)
    with pytest.raises(CheckpointException, match=f"Missing key in checkpoint state_dict: model.{HEAD}"):
        plain_load({"model": make().state_dict()}, tmp_path)
    assert not issubclass(CheckpointException, Exception)


@pytest.mark.survey("T11")
@pytest.mark.parametrize("make", [TiedPair, HeadFirst])
@pytest.mark.parametrize("name", [EMBED, HEAD])
def test_one_of_two_names_in_a_plain_folder_fills_a_tied_model(tmp_path, make, name):
    plain_save({"model": {name: torch.full((12, 4), 5.0)}}, tmp_path)
    model = make()
    tiepolicy_dcp.load(tmp_path, model=model)
    assert {5.0} == set(model.embed_tokens.weight.flatten().tolist())
    assert model.lm_head.weight is model.embed_tokens.weight


def test_today_the_hugging_face_reader_cannot_read_a_normal_tied_checkpoint(tmp_path):
    save_file({EMBED: torch.ones(12, 4)}, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="disabled"), pytest.raises(CheckpointException, match=f"Missing key.*{HEAD}"):
        dcp.load(TiedPair().state_dict(), storage_reader=HuggingFaceStorageReader(str(tmp_path)))


@pytest.mark.survey("T73")
@pytest.mark.parametrize("make", [TiedPair, HeadFirst])
def test_the_hugging_face_reader_fills_the_state_of_a_tied_model(tmp_path, make):
    save_file({EMBED: torch.full((12, 4), 5.0)}, tmp_path / "model.safetensors")
    state = ModelState(make())
    tensors = state.state_dict()
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(tmp_path)))
    state.load_state_dict(tensors)
    assert {5.0} == set(state.model.lm_head.weight.flatten().tolist())


def test_today_a_stage_that_has_only_the_head_crashes_or_stays_random(tmp_path):
    plain_save({"model": {EMBED: torch.ones(12, 4)}}, tmp_path)
    stage = LastStage()
    before = stage.lm_head.weight.detach().clone()
    with pytest.raises(CheckpointException, match=f"Missing key in checkpoint state_dict: model.{HEAD}"):
        plain_load({"model": stage.state_dict()}, tmp_path)
    state = {"model": stage.state_dict()}
    plain_load(state, tmp_path, planner=DefaultLoadPlanner(allow_partial_load=True))
    assert "<All keys matched successfully>" == str(stage.load_state_dict(state["model"]))
    assert torch.equal(before, stage.lm_head.weight)


@pytest.mark.survey("T35")
def test_a_stage_that_has_only_the_head_reads_it_from_the_stored_name(tmp_path):
    """Through us, and through a plain dcp.load of the same folder."""
    whole = TiedPair()
    folder = tiepolicy_dcp.save(tmp_path / "c", model=whole)
    stage, plain = LastStage(), LastStage()
    tiepolicy_dcp.load(folder, model=stage)
    plain_load({"model": ModelState(plain)}, folder)
    assert torch.equal(whole.lm_head.weight, stage.lm_head.weight)
    assert torch.equal(whole.lm_head.weight, plain.lm_head.weight)


@pytest.mark.survey("T07")
def test_a_stage_whose_head_nothing_holds_is_refused_and_stays_as_it_was(tmp_path):
    """Today what happens to be in memory passes for loaded; in NeMo always, see `test_survey_automodel.py`."""
    plain_save({"model": {"norm.weight": torch.ones(4)}}, tmp_path)
    stage = LastStage()
    before = stage.lm_head.weight.detach().clone()
    state = {"model": stage.state_dict()}
    plain_load(state, tmp_path, planner=DefaultLoadPlanner(allow_partial_load=True))
    assert "<All keys matched successfully>" == str(stage.load_state_dict(state["model"]))
    with pytest.raises(
        MissingTensorError, match=r"lm_head.weight \(12, 4\) is not in the checkpoint, under its own name"
    ):
        tiepolicy_dcp.load(tmp_path, model=stage)
    assert torch.equal(before, stage.lm_head.weight)


def test_today_assigning_one_of_two_names_leaves_the_other_stale_behind_a_complete_report():
    model = TiedPair()
    missing = model.load_state_dict({EMBED: torch.full((12, 4), 5.0)}, strict=False, assign=True).missing_keys
    assert [HEAD] == missing == TiedPair().load_state_dict({EMBED: torch.ones(12, 4)}, strict=False).missing_keys
    assert {5.0} != set(model.lm_head.weight.flatten().tolist())


@pytest.mark.survey("T76")
@pytest.mark.parametrize("name", [EMBED, HEAD])
def test_one_of_two_names_reaches_both_and_the_optimizer_keeps_its_parameter(tmp_path, name):
    plain_save({"model": {name: torch.full((12, 4), 5.0)}}, tmp_path)
    model = TiedPair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tiepolicy_dcp.load(tmp_path, model=model)
    assert [{5.0}, {5.0}] == [set(tensor.flatten().tolist()) for tensor in model.state_dict().values()]
    assert model.lm_head.weight is optimizer.param_groups[0]["params"][0]


# Two values for one tensor


def two_values():
    return {EMBED: torch.full((12, 4), 1.0), HEAD: torch.full((12, 4), 2.0)}


def test_today_one_of_two_values_is_lost_with_all_keys_matched(tmp_path):
    plain_save({"model": two_values()}, tmp_path)
    model = TiedPair()
    state = {"model": model.state_dict()}
    plain_load(state, tmp_path)
    assert "<All keys matched successfully>" == str(model.load_state_dict(state["model"]))
    assert {2.0} == set(model.embed_tokens.weight.flatten().tolist())


@pytest.mark.survey("T12")
@pytest.mark.parametrize("make", [TiedPair, HeadFirst])
def test_two_values_in_a_plain_folder_are_a_conflict_in_any_order_of_registration(tmp_path, make):
    plain_save({"model": two_values()}, tmp_path)
    model = make()
    before = model.lm_head.weight.detach().clone()
    with pytest.raises(
        TieConflictError, match=r"their values differ: first at \(0, 0\), 1.0 and 2.0, 48 of 48 elements"
    ):
        tiepolicy_dcp.load(tmp_path, model=model)
    assert torch.equal(before, model.lm_head.weight)


@pytest.mark.survey("T36")
def test_copies_that_drifted_apart_on_two_stages_are_never_merged(tmp_path):
    """Each stage trained its copy of one tensor without the gradient of the other."""
    stages = TiedPair(tied=False)
    stages.lm_head.weight.data.copy_(stages.embed_tokens.weight.data)
    train_steps(stages, torch.optim.SGD(stages.parameters(), lr=0.1), num_steps=3)
    plain_save({"model": stages.state_dict()}, tmp_path / "joint")
    with pytest.raises(
        TieConflictError, match="Untie the model to keep both, delete one of the two from the checkpoint"
    ):
        tiepolicy_dcp.load(tmp_path / "joint", model=TiedPair())
    untied = TiedPair(tied=False)
    tiepolicy_dcp.load(tmp_path / "joint", model=untied)
    assert [True, True] == [torch.equal(stages.state_dict()[name], untied.state_dict()[name]) for name in (EMBED, HEAD)]


def test_a_trained_head_is_not_thrown_away_for_a_flag(tmp_path):
    """The flag tied the model that is to be served; the checkpoint knows better."""
    trained = FlaggedPair(flag=True, vocab_size=12, draft_vocab_size=12, hidden_size=4)
    tiepolicy_dcp.save(tmp_path / "c", model=trained)
    served = FlaggedPair(flag=True, vocab_size=12, draft_vocab_size=12, hidden_size=4, tied=True)
    with pytest.raises(TieConflictError, match="lm_head.weight and embed_tokens.weight are one tensor in the model"):
        tiepolicy_dcp.load(tmp_path / "c", model=served)
    untied = FlaggedPair(flag=True, vocab_size=12, draft_vocab_size=12, hidden_size=4)
    tiepolicy_dcp.load(tmp_path / "c", model=untied)
    assert torch.equal(trained.lm_head.weight, untied.lm_head.weight)


# Ties that a load breaks


#: torch's own call.
deprecated_inside = pytest.mark.filterwarnings("ignore:`_get_pg_default_device`|Multiple backends:UserWarning")


def full_state_into_meta(model):
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, TiedPair().state_dict(), options=options)


@deprecated_inside
def test_today_a_full_state_dict_unties_a_model_on_meta(one_rank):
    with torch.device("meta"):
        model = TiedPair()
    full_state_into_meta(model)
    assert 2 == len(list(model.parameters()))


@deprecated_inside
@pytest.mark.survey("T18")
def test_what_a_full_state_dict_untied_is_tied_again_before_the_optimizer_is_built(one_rank):
    with torch.device("meta"):
        model = TiedPair()
    plan = tiepolicy.plan(model)
    full_state_into_meta(model)
    plan.retie(model)
    plan.verify(model)
    assert 1 == len(list(model.parameters()))
    assert not model.lm_head.weight.is_meta


# Names


def test_today_the_prefix_of_a_wrapper_on_one_name_makes_keys_missing_and_unexpected():
    model = TiedPair()
    model.embed_tokens = torch.compile(model.embed_tokens)
    with pytest.raises(RuntimeError, match=r"Missing key.*embed_tokens.weight[\s\S]*Unexpected key.*_orig_mod"):
        TiedPair().load_state_dict(model.state_dict())


@pytest.mark.survey("T24")
@pytest.mark.parametrize(("compiled_when_saved", "compiled_when_loaded"), [(True, False), (False, True)])
def test_a_wrapper_on_one_of_two_names_changes_nothing(tmp_path, compiled_when_saved, compiled_when_loaded):
    def build(*, compiled):
        model = TiedPair()
        if compiled:
            model.embed_tokens = torch.compile(model.embed_tokens)
        return model

    model, resumed = build(compiled=compiled_when_saved), build(compiled=compiled_when_loaded)
    tiepolicy_dcp.save(tmp_path / "c", model=model)
    tiepolicy_dcp.load(tmp_path / "c", model=resumed)
    assert torch.equal(model.lm_head.weight, resumed.lm_head.weight)
    assert resumed.lm_head.weight is resumed.embed_tokens.weight
