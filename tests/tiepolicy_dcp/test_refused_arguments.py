"""What cannot be saved, or loaded into, is refused in a sentence before anything is written."""

import pytest
import torch

import tiepolicy
import tiepolicy_dcp
from models import TiedPair
from tiepolicy.errors import MissingTensorError
from tiepolicy_dcp import CheckpointError


@pytest.mark.parametrize("act", [tiepolicy_dcp.save, tiepolicy_dcp.load])
def test_a_state_dict_in_the_place_of_the_model_is_refused(tmp_path, act):
    folder = tmp_path / "checkpoint"
    if act is tiepolicy_dcp.load:
        tiepolicy_dcp.save(folder, model=TiedPair())
    with pytest.raises(CheckpointError, match=r"^model is of the type OrderedDict, not a module: hand over the model"):
        act(folder, model=TiedPair().state_dict())
    assert folder.exists() == (act is tiepolicy_dcp.load)


@pytest.mark.parametrize("act", [tiepolicy_dcp.save, tiepolicy_dcp.load])
def test_a_plan_that_does_not_know_a_tensor_is_refused(tmp_path, act):
    """It would write what no load accepts, and leave a tensor as it is without a word."""
    model, folder = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)), tmp_path / "c"
    if act is tiepolicy_dcp.load:
        tiepolicy_dcp.save(folder, model=model)
    with pytest.raises(CheckpointError, match=r"^the plan does not know 1\.weight: it is of another model, or older"):
        act(folder, model=model, plan=tiepolicy.plan(model[:1]))
    assert folder.exists() == (act is tiepolicy_dcp.load)


@pytest.mark.parametrize("act", [tiepolicy_dcp.save, tiepolicy_dcp.load])
def test_a_model_without_memory_is_refused(tmp_path, act):
    folder = tmp_path / "c"
    if act is tiepolicy_dcp.load:
        tiepolicy_dcp.save(folder, model=TiedPair())
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight \(12, 4\) is on the meta device, where no values"):
        act(folder, model=TiedPair().to("meta"))
    assert folder.exists() == (act is tiepolicy_dcp.load)


def test_a_parameter_in_two_groups_of_its_optimizer_is_named(tmp_path):
    model = TiedPair()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [model.lm_head.weight]})
    with pytest.raises(
        CheckpointError, match=r"parameter group 1 of the optimizer holds embed_tokens\.weight, which an"
    ):
        tiepolicy_dcp.save(tmp_path / "c", model=model, optimizer=optimizer)


def test_the_state_of_another_kind_of_optimizer_is_refused_as_that(tmp_path):
    model = TiedPair()
    tiepolicy_dcp.save(tmp_path / "c", model=model, optimizer=torch.optim.AdamW(model.parameters()))
    sgd = torch.optim.SGD(model.parameters(), momentum=0.9)
    with pytest.raises(MissingTensorError, match=r"momentum_buffer is not .*: the optimizer was of another kind"):
        tiepolicy_dcp.load(tmp_path / "c", model=model, optimizer=sgd)
