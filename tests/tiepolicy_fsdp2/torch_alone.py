"""What torch alone does to ties; cases of `sharded.py`."""

import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.distributed.tensor.parallel import parallelize_module as torch_parallelize_module
from torch.nn.parallel import DistributedDataParallel
from tower import (
    DEVICE,
    ROWS,
    batch,
    by_data,
    cuts,
    distance,
    loss_of,
    mesh,
    message,
    num_parameters,
    pair,
    tied,
    train,
    whole,
)

import tiepolicy
from models import TiedPair


def load_full(model):
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, pair().state_dict() if dist.get_rank() == 0 else {}, options=options)


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
    model.to_empty(device=DEVICE)
    return {"tied": tied(model)}


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


def today_tied_by_data():
    model = torch_fully_shard(by_data(), mesh=mesh())
    train(model)
    return {"drift": distance(whole(model.lm_head.weight), whole(model.embed_tokens.weight)) > 1e-3}


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
