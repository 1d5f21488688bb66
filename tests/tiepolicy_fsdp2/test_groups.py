"""Which modules are sharded together: the blocks that were asked for, and what ties make of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule

from models import TiedPair, tiny_llama
from strategies import blocked_modules
from tiepolicy_fsdp2 import ShardingError, fully_shard, keep_plan, shard_groups, tie_stages


class Layer(nn.Module):
    """A block of two linear maps, one of which may be tied to something outside."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.down = nn.Linear(4, 4)


class Stack(nn.Module):
    """An embedding, layers, a norm and a head; nothing is tied."""

    def __init__(self, num_layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList([Layer() for _ in range(num_layers)])
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 8, bias=False)


def tied_stack(**sizes):
    model = Stack(**sizes)
    model.head.weight = model.embed.weight
    return model


def paths(model, *blocks, **options):
    return [group.paths for group in shard_groups(model, blocks=blocks, **options)]


def test_without_ties_the_groups_are_the_blocks():
    assert [("layers.0",), ("layers.1",), ("norm", "head"), ("",)] == [
        tuple(reversed(group)) if "norm" in group else group for group in paths(Stack(), Layer, ["norm", "head"])
    ]


def test_without_blocks_the_model_is_one_group():
    assert [("",)] == paths(tied_stack())


def test_tied_modules_that_were_wrapped_one_by_one_come_into_one_group():
    model = tied_stack()
    assert [("layers.0",), ("layers.1",), ("embed", "head"), ("",)] == paths(model, Layer, model.embed, model.head)


@pytest.mark.parametrize("wrapped", ["embed", "head"])
def test_a_tied_module_whose_partner_is_in_the_models_group_joins_it(wrapped):
    assert [("layers.0",), ("layers.1",), ("",)] == paths(tied_stack(), Layer, wrapped)


def test_what_was_grouped_with_a_tied_module_comes_along():
    assert [("embed", "head", "norm"), ("",)] == paths(tied_stack(), "embed", ["norm", "head"])


def test_a_tie_between_blocks_leaves_the_rest_of_the_blocks_alone():
    model = Stack()
    model.layers[1].up.weight = model.layers[0].up.weight
    assert [("layers.0.up", "layers.1.up"), ("layers.0",), ("layers.1",), ("",)] == paths(model, Layer)


def test_a_tie_between_a_block_and_the_model_gets_a_group_of_its_own():
    model = Stack()
    model.norm.weight = model.layers[0].down.bias
    groups = paths(model, Layer)
    assert {("layers.0.down", "norm"), ("layers.0",), ("layers.1",), ("",)} == set(groups)
    assert groups.index(("layers.0.down", "norm")) < groups.index(("layers.0",))


def test_a_tie_within_a_block_changes_nothing():
    model = Stack()
    model.layers[0].up.weight = model.layers[0].down.weight
    assert [("layers.0",), ("layers.1",), ("",)] == paths(model, Layer)


def test_a_block_whose_weight_the_model_itself_holds_joins_the_model():
    """FSDP2 takes the outermost module alone, so what is tied to it can be nowhere else."""
    model = Stack()
    model.table = model.layers[0].up.weight
    assert [("layers.1",), ("",)] == paths(model, Layer)


def test_a_module_used_in_two_blocks_is_a_group():
    model = Stack()
    model.layers[1].up = model.layers[0].up
    assert [("layers.0.up",), ("layers.0",), ("layers.1",), ("",)] == paths(model, Layer)


def test_a_block_used_twice_is_one_group():
    model = Stack()
    model.layers[1] = model.layers[0]
    assert [("layers.0",), ("",)] == paths(model, Layer)


def test_nested_blocks_are_sharded_from_the_inside():
    assert [("layers.0.up",), ("layers.0",), ("",)] == paths(Stack(), "layers.0", "layers.0.up")


def test_ignored_parameters_bring_nothing_together():
    model = tied_stack()
    assert [("embed",), ("head",), ("",)] == paths(model, "embed", "head", ignored_params=[model.embed.weight])


def test_a_class_finds_blocks_below_wrappers_and_takes_the_wrapper():
    model = Stack()
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    groups = shard_groups(model, blocks=[Layer])
    assert [("layers.0",), ("layers.1",), ("",)] == [group.paths for group in groups]
    assert groups[0].modules[0] is model.layers[0]


def test_a_transformers_model_is_grouped_by_its_layers():
    model = tiny_llama(tie_word_embeddings=True)
    layer = type(model.model.layers[0])
    assert [("model.layers.0",), ("",)] == paths(model, layer, "model.embed_tokens")


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("lm_head", "the block 'lm_head' is no module of Stack; its modules are"),
        (nn.Conv2d, "Stack has no module of the class Conv2d among its blocks"),
        (nn.Linear(1, 1), "a block, a Linear, is no part of the Stack to shard"),
        (None, "the block None is no module, class or path"),
    ],
)
def test_a_block_that_is_not_in_the_model_is_refused(block, message):
    with pytest.raises(ShardingError, match=message):
        shard_groups(Stack(), blocks=[block])


@pytest.mark.parametrize("blocks", ["layers", nn.Linear, nn.Linear(1, 1), None])
def test_one_block_in_the_place_of_a_list_of_them_is_refused(blocks):
    with pytest.raises(ShardingError, match="which is no list of blocks: hand over a list of them"):
        shard_groups(Stack(), blocks=blocks)


def test_groups_that_contain_each_other_are_refused():
    with pytest.raises(ShardingError, match=r"none can be sharded first; name smaller blocks"):
        shard_groups(Stack(), blocks=[["layers.0", "layers.1.up"], ["layers.1", "layers.0.up"]])


@given(blocked_modules())
def test_no_parameter_has_holders_in_two_groups_whatever_is_wrapped(case):
    """Asked as FSDP2 does it: a group takes what lies below its modules and is in no group yet."""
    model, blocks = case
    taken: dict[int, int] = {}
    for number, group in enumerate(shard_groups(model, blocks=blocks)):
        for holder in managed_by(group.modules, {id(m) for g in shard_groups(model, blocks=blocks) for m in g.modules}):
            for parameter in holder.parameters(recurse=False):
                assert number == taken.setdefault(id(parameter), number)
    assert {id(parameter) for parameter in model.parameters()} == set(taken)


def managed_by(roots, borders):
    """The modules below some, down to the borders of other groups."""
    for module in roots:
        stack = [module]
        while stack:
            current = stack.pop()
            yield current
            stack += [child for child in current.children() if id(child) not in borders]


@given(blocked_modules(), st.randoms(use_true_random=False))
def test_the_order_in_which_blocks_are_named_does_not_matter(case, random):
    model, blocks = case
    shuffled = random.sample(blocks, len(blocks))
    assert set(paths(model, *blocks)) == set(paths(model, *shuffled))


def test_pairs_on_the_meta_device_are_grouped_by_the_object():
    with torch.device("meta"):
        model = TiedPair()
    assert [("embed_tokens", "lm_head"), ("",)] == paths(model, "lm_head", "embed_tokens")


def with_a_scalar():
    model = tied_stack()
    model.scale = nn.Parameter(torch.tensor(1.0))
    return model


def with_a_transposed_map():
    model = tied_stack()
    model.layers[0].up.weight = nn.Parameter(torch.zeros(4, 4).t())
    return model


@pytest.mark.parametrize(
    ("model", "blocks", "message"),
    [
        (with_a_scalar(), [], r"FSDP2 cannot shard scale, which is a scalar; give it the shape \(1,\)"),
        (with_a_transposed_map(), [], "FSDP2 cannot shard layers.0.up.weight, which is not contiguous; assign"),
        (tied_stack(), [["norm", "layers"]], r"a ModuleList of the group \['layers', 'norm'\] has no forward\(\)"),
        (nn.ModuleDict({"map": nn.Linear(2, 2)}), [], r"a ModuleDict of the group \[''\] has no forward\(\)"),
    ],
)
def test_what_torch_would_refuse_halfway_is_refused_before_anything_is_sharded(model, blocks, message):
    with pytest.raises(ShardingError, match=message):
        fully_shard(model, blocks=[Layer, *blocks] if isinstance(model, Stack) else blocks)
    assert not any(isinstance(module, FSDPModule) for module in model.modules())


def test_what_ties_stages_is_chosen_by_a_word_that_is_known():
    model = tied_stack()
    with pytest.raises(ShardingError, match='keep is True; it is "canonical", or None to compare the values'):
        tie_stages(model, plan=keep_plan(model), keep=True)
