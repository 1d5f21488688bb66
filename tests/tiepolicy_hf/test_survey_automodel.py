"""Failures of the field in NeMo Automodel, which these tests hold to its own functions where it is installed.

It wants releases of its own of what the project tests with, but the functions that decide on ties need torch and
transformers alone: `pip install --no-deps nemo-automodel`. 0.7.0 was tried. What happens here instead is shown by the
tests of the same rows of the survey, which need no NeMo.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import tiepolicy
from models import tiny_llama

shared = pytest.importorskip(
    "nemo_automodel.shared.tied_weights", reason="NeMo Automodel is not installed: pip install --no-deps nemo-automodel"
)
from nemo_automodel.components.checkpoint.stateful_wrappers import ModelState  # noqa: E402 - what was asked for above
from nemo_automodel.components.checkpoint.utils import materialize_missing_tied_lm_head  # noqa: E402

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def flagged(num_rows):
    """A model whose config says tied, with a head of its own."""
    model = tiny_llama(tie_word_embeddings=True)
    model.lm_head = nn.Linear(16, num_rows, bias=False)
    return model


def last_stage():
    model = flagged(96)
    model.model = nn.Identity()
    return model


@pytest.mark.parametrize("num_rows", [32, 96])
def test_a_head_of_its_own_is_no_longer_left_out_for_a_flag(num_rows):
    """Rows T05 and T09: up to its pull request 2319, flag and name decided."""
    assert {EMBED, HEAD} <= set(ModelState(flagged(num_rows)).state_dict())


def test_today_an_embedding_of_other_rows_is_put_in_the_place_of_a_missing_head():
    """Row T06: the error then is about shapes, not about what is missing."""
    model = flagged(32)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != HEAD}
    with pytest.raises(RuntimeError, match=rf"size mismatch for {HEAD}.*\[96, 16\].*\[32, 16\]"):
        ModelState(model).load_state_dict(state)
    assert (96, 16) == tuple(state[HEAD].shape)


def test_today_a_last_stage_keeps_its_random_head_through_a_strict_load():
    """Row T07."""
    stage = last_stage()
    before = stage.lm_head.weight.detach().clone()
    ModelState(stage).load_state_dict({}, strict=True)
    assert torch.equal(before, stage.lm_head.weight)
    assert not materialize_missing_tied_lm_head({}, stage), "only that wrapper asks for it"


def test_today_empty_shards_pass_for_one_tensor():
    """Row T08: on the ranks that have none of the rows, here the last of four that share three."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    mesh = init_device_mesh("cpu", (4,))
    model = tiny_llama(tie_word_embeddings=True, vocab_size=3)
    for module in (model.model.embed_tokens, model.lm_head):
        rows = DTensor.from_local(torch.empty(0, 16), mesh, [Shard(0)], shape=(3, 16), stride=(16, 1), run_check=False)
        module.weight = nn.Parameter(rows)
    assert shared.has_local_tied_lm_head(model)
    assert () == tiepolicy.plan(model).groups
    dist.destroy_process_group()
