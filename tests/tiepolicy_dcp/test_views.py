"""Aliases that are views: rows are found by plain DCP, every view comes back through us, all written once."""

import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import tiepolicy
import tiepolicy_dcp
from tiepolicy import ActionKind, TiePlan
from tiepolicy._verify import find_problems
from tiepolicy.errors import MissingTensorError

BASE = torch.arange(24.0).view(6, 4)


def module(**tensors):
    """A module with the tensors as parameters."""
    model = nn.Module()
    for name, tensor in tensors.items():
        setattr(model, name, nn.Parameter(tensor))
    return model


def blank(model):
    """The same names and shapes, with the same views of other memory."""
    return tiepolicy.plan(model).expand({"whole": torch.full_like(model.whole, -1.0).detach()})


def plain_load(state, folder):
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.load(state, checkpoint_id=folder)


ROWS = {
    "blocks that share no row": lambda base: {"q": base[:2], "k": base[2:4], "v": base[4:]},
    "blocks that overlap": lambda base: {"a": base[:4], "b": base[1:6]},
    "one row": lambda base: {"last": base[5:]},
    "nearly all": lambda base: {"head": base[1:]},
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_plain_dcp_finds_views_of_whole_rows(tmp_path, rows):
    base = BASE.clone()
    model = module(whole=base, **rows(base))
    folder = tiepolicy_dcp.save(tmp_path / "c", model=model)
    state = {"model": {name: torch.zeros_like(tensor).contiguous() for name, tensor in model.state_dict().items()}}
    plain_load(state, folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state["model"][name]), name
    dcp_to_torch_save(folder, tmp_path / "model.pt")
    converted = torch.load(tmp_path / "model.pt", weights_only=True)["model"]
    assert [True] * len(converted) == [torch.equal(model.state_dict()[name], converted[name]) for name in converted]


def test_the_bytes_of_views_lie_there_once(tmp_path):
    base = torch.zeros(4096, 16)
    model = module(whole=base, q=base[:1024], k=base[1024:2048], v=base[2048:])
    folder = tiepolicy_dcp.save(tmp_path / "c", model=model)
    assert (folder / "__0_0.distcp").stat().st_size < 1.05 * base.nbytes


OTHERS = {
    "transposed": lambda base: {"turned": base.t()},
    "every second row": lambda base: {"even": base[::2]},
    "a column": lambda base: {"first": base[:, :1]},
    "rows in another shape": lambda base: {"flat": base[2:4].view(8)},
    "elements that begin within a row": lambda base: {"tail": base.view(-1)[2:10].view(2, 4)},
}


@pytest.mark.parametrize("views", OTHERS.values(), ids=OTHERS)
def test_plain_dcp_says_that_it_misses_any_other_view_and_finds_the_rest(tmp_path, views):
    """Such a view is no box of the stored tensor; writing it too would double the bytes."""
    base = BASE.clone()
    model = module(whole=base, **views(base))
    folder = tiepolicy_dcp.save(tmp_path / "c", model=model)
    (name,) = views(base)
    with pytest.warns(UserWarning, match="disabled"), pytest.raises(CheckpointException, match=f"Missing key.*{name}"):
        dcp.load({"model": model.state_dict()}, checkpoint_id=folder)
    state = {"model": {"whole": torch.zeros(6, 4)}}
    plain_load(state, folder)
    assert torch.equal(BASE, state["model"]["whole"])


EVERY = ROWS | OTHERS


@pytest.mark.parametrize("views", EVERY.values(), ids=EVERY)
def test_every_view_comes_back_and_shares_its_memory_again(tmp_path, views):
    base = BASE.clone()
    model = module(whole=base, **views(base))
    folder = tiepolicy_dcp.save(tmp_path / "c", model=model)
    resumed = module(**blank(model))
    tiepolicy_dcp.load(folder, model=resumed)
    for name, tensor in model.state_dict().items():
        loaded = getattr(resumed, name)
        assert torch.equal(tensor, loaded), name
        assert (tensor.shape, tensor.stride()) == (loaded.shape, loaded.stride())
        assert tensor.data_ptr() - base.data_ptr() == loaded.data_ptr() - resumed.whole.data_ptr()
    assert TiePlan.from_manifest((folder / "manifest.json").read_text()) == tiepolicy.plan(resumed)


@pytest.mark.parametrize("views", EVERY.values(), ids=EVERY)
def test_what_was_a_view_fills_a_tensor_of_its_own(tmp_path, views):
    base = BASE.clone()
    model = module(whole=base, **views(base))
    folder = tiepolicy_dcp.save(tmp_path / "c", model=model)
    apart = module(**{name: torch.zeros_like(tensor).contiguous() for name, tensor in model.state_dict().items()})
    restored = tiepolicy_dcp.load(folder, model=apart)
    assert [ActionKind.COPY] * len(views(base)) == [a.kind for a in restored.actions if a.name != "whole"]
    assert [True] * (1 + len(views(base))) == [
        torch.equal(tensor, apart.state_dict()[name]) for name, tensor in model.state_dict().items()
    ]


@pytest.mark.parametrize("views", EVERY.values(), ids=EVERY)
def test_verification_finds_nothing_wrong_with_views(tmp_path, views):
    base = BASE.clone()
    folder = tiepolicy_dcp.save(tmp_path / "c", model=module(whole=base, **views(base)))
    assert [] == find_problems(folder)


def test_verification_finds_a_view_that_points_to_other_rows(tmp_path):
    base = BASE.clone()
    folder = tiepolicy_dcp.save(tmp_path / "c", model=module(whole=base, rows=base[2:4]))
    metadata = dcp.FileSystemReader(folder).read_metadata()
    places = {(index.fqn, index.offset): index for index in metadata.storage_data}
    metadata.storage_data[places["model.rows", (0, 0)]] = metadata.storage_data[places["model.whole", (4, 0)]]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert any("stores rows and whole apart" in problem for problem in find_problems(folder))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(
    cuts=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), min_size=1, max_size=4),
    shape=st.sampled_from([(6,), (6, 1), (6, 3), (6, 2, 2)]),
)
def test_any_blocks_of_rows_are_found_by_plain_dcp(tmp_path_factory, cuts, shape):
    base = torch.randn(shape)
    blocks = {f"block{index}": base[first : first + count] for index, (first, count) in enumerate(cuts)}
    model = module(whole=base, **blocks)
    folder = tiepolicy_dcp.save(tmp_path_factory.mktemp("views") / "c", model=model)
    state = {"model": {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}}
    plain_load(state, folder)
    assert [True] * (1 + len(cuts)) == [
        torch.equal(tensor, state["model"][name]) for name, tensor in model.state_dict().items()
    ]


def test_the_optimizer_state_of_a_view_is_its_own(tmp_path):
    def build():
        base = BASE.clone()
        return module(whole=base, rows=base[:2])

    model, resumed = build(), build()
    optimizer, again = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, resumed))
    model.whole.grad, model.rows.grad = torch.ones(6, 4), torch.full((2, 4), 2.0)
    optimizer.step()
    tiepolicy_dcp.save(tmp_path / "c", model=model, optimizer=optimizer)
    tiepolicy_dcp.load(tmp_path / "c", model=resumed, optimizer=again)
    assert [{1.0}, {2.0}] == [
        set(again.state[parameter]["momentum_buffer"].flatten().tolist()) for parameter in (resumed.whole, resumed.rows)
    ]


def test_a_part_that_had_no_state_of_its_own_is_named(tmp_path):
    base = BASE.clone()
    model = module(whole=base, rows=base[:2])
    optimizer = torch.optim.AdamW([model.whole], lr=0.1)
    model.rows.requires_grad_(False)
    model.whole.grad = torch.ones(6, 4)
    optimizer.step()
    tiepolicy_dcp.save(tmp_path / "c", model=model, optimizer=optimizer)
    apart = module(whole=torch.zeros(6, 4), rows=torch.zeros(2, 4))
    with pytest.raises(
        MissingTensorError, match="rows was a part of whole when it was saved and had no optimizer state"
    ):
        tiepolicy_dcp.load(tmp_path / "c", model=apart, optimizer=torch.optim.AdamW(apart.parameters(), lr=0.1))
