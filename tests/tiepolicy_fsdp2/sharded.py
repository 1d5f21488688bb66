"""What several ranks do in `test_sharded.py`: `torchrun sharded.py FOLDER CASE...`; each becomes a line of JSON.

A result holds what the first rank saw, and an error that the ranks met, by rank.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch_alone
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel
from torch.nn.parallel import DistributedDataParallel
from torch_alone import load_full
from tower import (
    DEVICE,
    ROWS,
    STEPS,
    Layer,
    Tower,
    batch,
    by_data,
    compare,
    cuts,
    digests,
    distance,
    loss_of,
    mesh,
    message,
    num_parameters,
    pair,
    run,
    tied,
    tower,
    train,
    whole,
)

import tiepolicy_dcp
import tiepolicy_fsdp2
from models import TiedPair

EVERY_MODULE = [Layer, "embed_tokens", "lm_head"]


def shard_every_module():
    model = tower()
    tiepolicy_fsdp2.fully_shard(model, blocks=EVERY_MODULE, mesh=mesh(), reshard_after_forward=True)
    return {"tied": tied(model)} | compare(model, tower())


def shard_nested():
    """Blocks within blocks; the maps that two blocks share leave both."""
    model = tiepolicy_fsdp2.fully_shard(tower(), blocks=[nn.Linear, Layer, "embed_tokens"], mesh=mesh())
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


def shard_and_compile():
    model = tiepolicy_fsdp2.fully_shard(tower(), blocks=EVERY_MODULE, mesh=mesh())
    compiled = torch.compile(model)
    results = compare(compiled, tower())
    tiepolicy_fsdp2.verify(compiled, step="torch.compile")
    return {"tied": tied(model), "graphs": num_graphs()} | results


def compile_and_shard():
    """Block by block, as most trainers do it."""
    model = tower()
    for layer in model.layers.values():
        layer.compile()
    tiepolicy_fsdp2.fully_shard(model, blocks=EVERY_MODULE, mesh=mesh())
    results = compare(model, tower())
    tiepolicy_fsdp2.verify(model, step="compile()")
    return {"tied": tied(model), "graphs": num_graphs()} | results


def num_graphs():
    """How many graphs were compiled since the last call."""
    found = counters["stats"].pop("unique_graphs", 0)
    torch.compiler.reset()
    return found


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
    model.to_empty(device=DEVICE)
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
    tiepolicy_fsdp2.materialize(model, DEVICE, init=initialise)
    return model


def alone_tower():
    with torch.device("meta"):
        reference = Tower()
    torch.manual_seed(7)
    tiepolicy_fsdp2.materialize(reference, DEVICE, init=initialise)
    return reference


def materialize():
    model, reference = materialized_tower(mesh()), alone_tower()
    expected = {name: whole(parameter) for name, parameter in reference.named_parameters()}
    same = all(torch.equal(whole(parameter), expected[name]) for name, parameter in model.named_parameters())
    return {"same": same, "tied": tied(model)} | compare(model, reference)


def save_trained():
    return saved(tiepolicy_fsdp2.fully_shard(tower(), blocks=EVERY_MODULE, mesh=mesh()), FOLDER / "trained")


def save_tensor_parallel():
    return saved(tiepolicy_fsdp2.parallelize_module(pair(), mesh(), cuts()), FOLDER / "parallel", split=False)


def save_hybrid():
    grid = mesh(2, 2, names=("replicate", "shard"))
    return saved(tiepolicy_fsdp2.fully_shard(tower(), blocks=EVERY_MODULE, mesh=grid), FOLDER / "hybrid")


def saved(model, folder, *, split=True):
    """The digests of what was trained and saved, to hold against what any other number of ranks loads."""
    optimizer, _ = train(model, split=split)
    tiepolicy_dcp.save(folder, model=model, optimizer=optimizer)
    return {"saved": digests(model, optimizer)}


def load_trained():
    """Into a model from the meta device, and into one that has other values; then both take a step."""
    found = []
    for device in ("meta", DEVICE):
        with torch.device(device):
            model = Tower()
        tiepolicy_fsdp2.fully_shard(model, blocks=EVERY_MODULE, mesh=mesh())
        tiepolicy_fsdp2.materialize(model, DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
        tiepolicy_dcp.load(FOLDER / "trained", model=model, optimizer=optimizer)
        tiepolicy_fsdp2.verify(model, step="load", optimizer=optimizer)
        found.append(digests(model, optimizer))
        loss_of(model, batch(STEPS)).backward()
        optimizer.step()
    return {"loaded": found, "tied": tied(model)}


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
    tiepolicy_fsdp2.materialize(model, DEVICE, init=initialise)
    reference = build()
    torch.manual_seed(7)
    tiepolicy_fsdp2.materialize(reference, DEVICE, init=initialise)
    return {"tied": tied(model), "same": torch.equal(whole(model.lm_head.weight), whole(reference.lm_head.weight))}


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


FOLDER = Path(sys.argv[1])

if __name__ == "__main__":
    run(vars(torch_alone) | globals(), sys.argv[2:], FOLDER / "results.jsonl")
