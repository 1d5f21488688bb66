"""What several ranks do in `test_sharded.py`: `torchrun sharded.py CASE...`; each prints its result as a line of JSON.

A result holds what the first rank saw, and an error that the ranks met, by rank.
"""

import json
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.parallel import parallelize_module as torch_parallelize_module
from torch.nn.parallel import DistributedDataParallel

import tiepolicy
import tiepolicy_fsdp2
from models import TiedPair
from torchrun import process_group

ROWS = 13  # no number of ranks divides it
STEPS = 3


class Layer(nn.Module):
    """A block with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.down = nn.Linear(4, 4)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + self.down(torch.tanh(self.up(states)))


class Tower(nn.Module):
    """An embedding, two blocks and a head, in float64; the head is tied, and so are the maps of the two blocks."""

    def __init__(self, *, rows: int = ROWS) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(rows, 4, dtype=torch.float64)
        self.layers = nn.ModuleDict({"0": Layer().double(), "1": Layer().double()})
        self.lm_head = nn.Linear(4, rows, bias=False, dtype=torch.float64)
        self.lm_head.weight = self.embed_tokens.weight
        self.layers["1"].up.weight = self.layers["0"].up.weight

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Runs what the stage of a pipeline has: ids in or hidden states in, hidden states or logits out."""
        if self.embed_tokens is not None:
            states = self.embed_tokens(states)
        for layer in self.layers.values():
            states = layer(states)
        return states if self.lm_head is None else self.lm_head(states)


def tower(**sizes) -> Tower:
    torch.manual_seed(3)
    return Tower(**sizes)


def pair(**options) -> TiedPair:
    torch.manual_seed(3)
    return TiedPair(vocab_size=ROWS, **options).double()


def mesh(*shape, names=None):
    return init_device_mesh("cpu", shape or (dist.get_world_size(),), mesh_dim_names=names)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, ROWS, (4 * dist.get_world_size(), 5), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(1, 1).flatten())


def train(model, *, alone=False, split=True):
    """Steps of AdamW, each rank on its rows of the batch; the optimizer, and the gradients of the first step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    gradients = {}
    for step in range(STEPS):
        ids = batch(step)
        if split and not alone:
            ids = ids.chunk(dist.get_world_size())[dist.get_rank()]
        loss_of(model, ids).backward()
        if step == 0:
            gradients = {name: whole(parameter.grad).clone() for name, parameter in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, gradients


def compare(model, reference, *, split=True):
    """How far training a model on all ranks is from training the reference in one process."""
    optimizer, gradients = train(model, split=split)
    alone, expected_gradients = train(reference, alone=True)
    names = [
        name.replace("_checkpoint_wrapped_module.", "").removeprefix("module.") for name, _ in model.named_parameters()
    ]
    states = zip(optimizer.state.values(), alone.state.values(), strict=True)
    expected = dict(reference.named_parameters())
    return {
        "names": names == list(expected),
        "gradients": max(
            distance(gradients[name], expected_gradients[own]) for own, name in zip(names, gradients, strict=True)
        ),
        "weights": max(
            distance(whole(parameter), expected[own].detach())
            for own, (_, parameter) in zip(names, model.named_parameters(), strict=True)
        ),
        "states": max(distance(whole(mine[key]), theirs[key]) for mine, theirs in states for key in mine),
        "num_states": len(optimizer.state) == len(alone.state),
    }


def distance(a, b):
    return (a - b).abs().max().item()


def tied(model):
    return model.lm_head.weight is model.embed_tokens.weight


def num_parameters(model):
    return len(list(model.parameters()))


def message(step):
    try:
        step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# What torch does alone


def today_two_groups():
    model = pair()
    torch_fully_shard(model.embed_tokens, mesh=mesh())
    torch_fully_shard(model.lm_head, mesh=mesh())
    torch_fully_shard(model, mesh=mesh())
    held = sum(len(group["params"]) for group in torch.optim.SGD(model.parameters(), lr=0.1).param_groups)
    with torch.no_grad():
        model.embed_tokens.weight.fill_(5.0)
    folders = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders)
    saved = message(lambda: dcp.save(model.state_dict(), checkpoint_id=folders[0]))
    reached = bool((whole(model.lm_head.weight) == 5.0).all())
    return {"held": held, "saved": saved, "reached": reached, "forward": message(lambda: model(batch(0)))}


def today_one_in_the_root():
    model = pair()
    torch_fully_shard(model.embed_tokens, mesh=mesh())
    torch_fully_shard(model, mesh=mesh())
    return {"held": num_parameters(model), "forward": message(lambda: model(batch(0)))}


def today_one_group():
    model = torch_fully_shard(pair(), mesh=mesh())
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    aliased = full["lm_head.weight"].data_ptr() == full["embed_tokens.weight"].data_ptr() if full else None
    compacted = tiepolicy.plan(model).compact(get_model_state_dict(model))
    return {"tied": tied(model), "names": sorted(full), "aliased": aliased, "compacted": sorted(compacted)}


def today_to_empty():
    with torch.device("meta"):
        model = TiedPair()
    torch_fully_shard(model, mesh=mesh())
    model.to_empty(device="cpu")
    return {"tied": tied(model)}


def load_full(model):
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, pair().state_dict() if dist.get_rank() == 0 else {}, options=options)


def today_load_full_from_meta():
    with torch.device("meta"):
        model = TiedPair(vocab_size=ROWS).double()
    torch_fully_shard(model, mesh=mesh())
    load_full(model)
    untied = not tied(model)
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of(model, batch(0)).backward()
    optimizer.step()
    again = message(lambda: get_optimizer_state_dict(model, optimizer))
    return {"untied": untied, "held": len(optimizer.param_groups[0]["params"]), "state": again}


def by_data():
    model = pair(tied=False)
    model.lm_head.weight = nn.Parameter(model.embed_tokens.weight.data)
    return model


def today_tied_by_data():
    model = torch_fully_shard(by_data(), mesh=mesh())
    train(model)
    return {"drift": distance(whole(model.lm_head.weight), whole(model.embed_tokens.weight)) > 1e-3}


def cuts():
    return {
        "embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }


def today_tensor_parallel():
    model = torch_parallelize_module(pair(), mesh(), cuts())
    untied = not tied(model)
    train(model, split=False)
    return {"untied": untied, "drift": distance(whole(model.lm_head.weight), whole(model.embed_tokens.weight)) > 1e-3}


def today_copies_under_ddp():
    model = pair()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    wrapped = DistributedDataParallel(model)
    train(wrapped)
    return {"drift": distance(model.lm_head.weight, model.embed_tokens.weight) > 1e-6}


# What becomes of it here


def shard_every_module():
    model = tower()
    tiepolicy_fsdp2.fully_shard(
        model, blocks=[Layer, "embed_tokens", "lm_head"], mesh=mesh(), reshard_after_forward=True
    )
    return {"tied": tied(model)} | compare(model, tower())


def shard_with_one_in_the_root():
    model = tiepolicy_fsdp2.fully_shard(tower(), blocks=[Layer, "embed_tokens"], mesh=mesh())
    return {"tied": tied(model)} | compare(model, tower())


def shard_checkpointed():
    model = tower()
    model.layers["0"] = checkpoint_wrapper(model.layers["0"])
    tiepolicy_fsdp2.fully_shard(model, blocks=[Layer], mesh=mesh())
    tiepolicy_fsdp2.verify(model, step="sharding")
    return {"tied": tied(model)} | compare(model, tower())


def shard_tied_by_data():
    model = tiepolicy_fsdp2.fully_shard(by_data(), blocks=["lm_head"], mesh=mesh())
    return {"tied": tied(model), "held": num_parameters(model)} | compare(model, pair())


def shard_and_ignore():
    model = by_data()
    ignored = {model.lm_head.weight, model.embed_tokens.weight}
    tiepolicy_fsdp2.fully_shard(model, mesh=mesh(), ignored_params=ignored)
    return {"tied": tied(model), "sharded": isinstance(model.lm_head.weight, DTensor)}


def load_full_from_meta():
    with torch.device("meta"):
        model = TiedPair(vocab_size=ROWS).double()
    tiepolicy_fsdp2.fully_shard(model, mesh=mesh())
    load_full(model)
    found = message(lambda: tiepolicy_fsdp2.verify(model, step="set_model_state_dict"))
    tiepolicy_fsdp2.retie(model)
    results = compare(model, pair())
    optimizer, _ = train(model)
    return results | {
        "found": found,
        "tied": tied(model),
        "states_named": sorted(get_optimizer_state_dict(model, optimizer)["state"]),
    }


def optimizer_built_too_early():
    with torch.device("meta"):
        model = TiedPair(vocab_size=ROWS)
    tiepolicy_fsdp2.fully_shard(model, mesh=mesh())
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.lm_head.weight.fill_(1.0)
    early = torch.optim.AdamW(model.parameters())
    tiepolicy_fsdp2.verify(model, optimizer=early)
    model.lm_head.weight = model.embed_tokens.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return {"found": message(lambda: tiepolicy_fsdp2.verify(model, step="surgery", optimizer=early))}


def initialise(module):
    for parameter in module.parameters(recurse=False):
        nn.init.normal_(parameter)


def materialized_tower(mesh_):
    with torch.device("meta"):
        model = Tower()
    tiepolicy_fsdp2.fully_shard(model, blocks=[Layer, "embed_tokens"], mesh=mesh_)
    torch.manual_seed(7 + dist.get_rank())  # the first rank's values count
    tiepolicy_fsdp2.materialize(model, "cpu", init=initialise)
    return model


def alone_tower():
    with torch.device("meta"):
        reference = Tower()
    torch.manual_seed(7)
    tiepolicy_fsdp2.materialize(reference, "cpu", init=initialise)
    return reference


def materialize():
    model, reference = materialized_tower(mesh()), alone_tower()
    expected = dict(reference.named_parameters())
    same = all(torch.equal(whole(parameter), expected[name]) for name, parameter in model.named_parameters())
    return {"same": same, "tied": tied(model)} | compare(model, reference)


def tensor_parallel():
    model = tiepolicy_fsdp2.parallelize_module(pair(), mesh(), cuts())
    return {"tied": tied(model)} | compare(model, pair(), split=False)


def tensor_parallel_cut_differently():
    plan = {"embed_tokens": ColwiseParallel(), "lm_head": ColwiseParallel()}
    model = pair()
    return {"error": message(lambda: tiepolicy_fsdp2.parallelize_module(model, mesh(), plan))}


def other_ties_on_a_rank():
    model = pair(tied=dist.get_rank() == 0)
    error = message(lambda: tiepolicy_fsdp2.fully_shard(model, mesh=mesh()))
    return {"error": error, "sharded": isinstance(model.embed_tokens.weight, DTensor)}


def other_blocks_on_a_rank():
    model = tower()
    blocks = [Layer] if dist.get_rank() else []
    return {"error": message(lambda: tiepolicy_fsdp2.fully_shard(model, blocks=blocks, mesh=mesh()))}


def bad_block_on_a_rank():
    model = tower()
    blocks = ["nowhere"] if dist.get_rank() else []
    return {"error": message(lambda: tiepolicy_fsdp2.fully_shard(model, blocks=blocks, mesh=mesh()))}


def sharded_twice():
    model = pair()
    torch_fully_shard(model.lm_head, mesh=mesh())
    return {"error": message(lambda: tiepolicy_fsdp2.fully_shard(model, mesh=mesh()))}


def verify_under_ddp():
    model = pair()
    tiepolicy_fsdp2.keep_plan(model)
    wrapped = DistributedDataParallel(model)
    tiepolicy_fsdp2.verify(wrapped, step="DDP")
    results = compare(wrapped, pair())
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return results | {"found": message(lambda: tiepolicy_fsdp2.verify(wrapped, step="surgery"))}


# Four ranks


def hybrid():
    model = materialized_tower(mesh(2, 2, names=("replicate", "shard")))
    return {"tied": tied(model)} | compare(model, alone_tower())


def materialize_on_a_grid():
    """Shards over one dimension of a tensor that is cut over the other."""

    def build():
        with torch.device("meta"):
            return TiedPair(vocab_size=16).double()

    grid = mesh(2, 2, names=("dp", "tp"))
    model = tiepolicy_fsdp2.parallelize_module(build(), grid["tp"], cuts())
    tiepolicy_fsdp2.fully_shard(model, mesh=grid["dp"])
    torch.manual_seed(7 + dist.get_rank())
    tiepolicy_fsdp2.materialize(model, "cpu", init=initialise)
    reference = build()
    torch.manual_seed(7)
    tiepolicy_fsdp2.materialize(reference, "cpu", init=initialise)
    return {"tied": tied(model), "same": torch.equal(whole(model.lm_head.weight), reference.lm_head.weight)}


def tensor_parallel_and_sharded():
    grid = mesh(2, 2, names=("dp", "tp"))
    model = tiepolicy_fsdp2.parallelize_module(pair(), grid["tp"], cuts())
    tiepolicy_fsdp2.fully_shard(model, blocks=["lm_head"], mesh=grid["dp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(STEPS):
        loss_of(model, batch(step).chunk(2)[grid["dp"].get_local_rank()]).backward()
        optimizer.step()
        optimizer.zero_grad()
    reference = pair()
    train(reference, alone=True)
    return {
        "tied": tied(model),
        "weights": distance(whole(model.lm_head.weight), reference.lm_head.weight.detach()),
        "num_states": len(optimizer.state) == 1,
    }


def report(name, case):
    """Run a case and print what the first rank saw, and whether all met the same error."""
    result = case()
    results = [result] * dist.get_world_size()
    dist.all_gather_object(results, result)
    if dist.get_rank() == 0:
        agreed = all(result.get("error") == results[0].get("error") for result in results)
        print("RESULT", json.dumps({"case": name, "agreed": agreed} | results[0]))


if __name__ == "__main__":
    with process_group():
        for name in sys.argv[1:]:
            report(name, globals()[name])
