"""What the stages of a pipeline do in `test_staged.py`: `torchrun staged.py FOLDER CASE...`, as in `sharded.py`."""

import functools
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from tower import DEVICE, ROWS, STEPS, Layer, Tower, batch, digests, distance, message, run, tower, train, whole

import tiepolicy
import tiepolicy_dcp
import tiepolicy_fsdp2
from models import tiny_llama


def whole_plan():
    with torch.device("meta"):
        return tiepolicy.plan(Tower())


def cut(model: Tower, stage: int) -> Tower:
    """One of two stages: what the other one has is left out; names stay."""
    if stage == 0:
        model.lm_head = None
        del model.layers["1"]
    else:
        model.embed_tokens = None
        del model.layers["0"]
    return model


def half(stage: Tower) -> nn.Parameter:
    return (stage.embed_tokens or stage.lm_head).weight


def grid():
    """The dimension of the pipeline, then that of the data."""
    return init_device_mesh(DEVICE, (2, dist.get_world_size() // 2), mesh_dim_names=("pp", "dp"))


def run_steps(stage, mesh, schedule_class, *, sync, steps=range(STEPS), ties=None, optimizer=None):
    """Real pipeline steps over as many microbatches as stages, each data rank on its rows."""
    group = mesh["pp"].get_group()
    index = mesh["pp"].get_local_rank()
    last = mesh["pp"].size() - 1
    pipeline_stage = PipelineStage(stage, index, last + 1, next(stage.parameters()).device, group=group)
    losses: list[torch.Tensor] = []

    def loss(logits, ids):
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(1, 1).flatten())

    schedule = schedule_class(pipeline_stage, last + 1, loss_fn=loss)
    optimizer = optimizer or torch.optim.AdamW(stage.parameters(), lr=0.05)
    for step in steps:
        ids = batch(step).chunk(mesh["dp"].size())[mesh["dp"].get_local_rank()]
        schedule.step(*([ids] if index == 0 else []), **({"target": ids, "losses": losses} if index == last else {}))
        if sync:
            tiepolicy_fsdp2.sync_tied_gradients(ties)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def both(value):
    """What the first rank of either stage has."""
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values[0], values[-1]


def piped(schedule_class):
    mesh = grid()
    stage = cut(tower(), mesh["pp"].get_local_rank())
    if mesh["dp"].size() > 1:
        tiepolicy_fsdp2.fully_shard(stage, blocks=[Layer], mesh=mesh["dp"])
    ties = tiepolicy_fsdp2.tie_stages(stage, plan=whole_plan(), group=mesh["pp"].get_group())
    run_steps(stage, mesh, schedule_class, sync=True, ties=ties)
    tiepolicy_fsdp2.verify_stages(ties, step="training")
    embed, head = both(whole(half(stage)))
    return trained_as_one(stage, ties) | {"equal": torch.equal(embed, head)}


def one_forward_one_backward():
    return piped(Schedule1F1B)


def all_forward_all_backward():
    return piped(ScheduleGPipe)


def a_stage_for_each_part():
    """Four stages: those with the layers stand between those with the embedding and the head, and have a tie too."""
    mesh = init_device_mesh(DEVICE, (4, 1), mesh_dim_names=("pp", "dp"))
    stage, index = tower(), dist.get_rank()
    stage.embed_tokens = stage.embed_tokens if index == 0 else None
    stage.lm_head = stage.lm_head if index == 3 else None
    for layer in {"0", "1"} - {str(index - 1)}:
        del stage.layers[layer]
    ties = tiepolicy_fsdp2.tie_stages(stage, plan=whole_plan())
    run_steps(stage, mesh, Schedule1F1B, sync=True, ties=ties)
    tiepolicy_fsdp2.verify_stages(ties, step="training")
    return trained_as_one(stage, ties)


def trained_as_one(stage, ties):
    """How far the stages are from the whole model trained in one process."""
    reference = tower()
    train(reference, alone=True)
    expected = {name: tensor.detach() for name, tensor in reference.state_dict().items()}
    far = max(distance(whole(parameter), expected[name]) for name, parameter in stage.named_parameters())
    everywhere = [far] * dist.get_world_size()
    dist.all_gather_object(everywhere, far)
    return {"shared": sorted(ties.shared), "weights": max(everywhere)}


def today_without_sync():
    mesh = grid()
    stage = cut(tower(), mesh["pp"].get_local_rank())
    ties = tiepolicy_fsdp2.tie_stages(stage, plan=whole_plan(), group=mesh["pp"].get_group())
    run_steps(stage, mesh, Schedule1F1B, sync=False)
    embed, head = both(whole(half(stage)))
    return {
        "drift": distance(embed, head) > 1e-3,
        "error": message(lambda: tiepolicy_fsdp2.verify_stages(ties, step="training")),
    }


def started_apart():
    torch.manual_seed(dist.get_rank())
    stage = cut(Tower().to(DEVICE), dist.get_rank())
    error = message(lambda: tiepolicy_fsdp2.tie_stages(stage, plan=whole_plan()))
    first, _ = both(whole(half(stage)))
    ties = tiepolicy_fsdp2.tie_stages(stage, plan=whole_plan(), keep="canonical")
    embed, head = both(whole(half(stage)))
    tiepolicy_fsdp2.verify_stages(ties)
    return {"error": error, "kept": torch.equal(first, embed) and torch.equal(first, head)}


def a_half_without_gradient():
    stage = cut(tower(), dist.get_rank())
    ties = tiepolicy_fsdp2.tie_stages(stage, plan=whole_plan())
    if dist.get_rank() == 0:
        half(stage).grad = torch.ones_like(half(stage))
    tiepolicy_fsdp2.sync_tied_gradients(ties)
    gradients = both(whole(half(stage).grad))
    return {"ones": [bool((gradient == 1).all()) for gradient in gradients]}


def a_stage_is_missing():
    stage = cut(tower(), 0)
    return {"error": message(lambda: tiepolicy_fsdp2.tie_stages(stage, plan=whole_plan()))}


def converted_apart():
    stage = cut(tower(), dist.get_rank())
    if dist.get_rank() == 1:
        stage.lm_head.float()
    return {"error": message(lambda: tiepolicy_fsdp2.tie_stages(stage, plan=whole_plan()))}


def two_halves_on_one_rank():
    """Interleaved stages: a rank owns the first and the last, the other the middle."""
    model = tower()
    ends, middle = [model.embed_tokens, model.lm_head], model.layers
    named = nn.ModuleDict({"embed_tokens": ends[0]}), nn.ModuleDict({"lm_head": ends[1]})
    stages = list(named) if dist.get_rank() == 0 else [nn.ModuleDict({"layers": middle})]
    ties = tiepolicy_fsdp2.tie_stages(stages, plan=whole_plan())
    if dist.get_rank() == 0:
        named[1]["lm_head"].weight = nn.Parameter(ends[0].weight.detach().clone())
    return {
        "shared": sorted(ties.shared),
        "error": message(lambda: tiepolicy_fsdp2.tie_stages(stages, plan=whole_plan())),
    }


def save_and_load():
    """Train, save, and load into stages with other weights."""
    mesh = grid()
    index = mesh["pp"].get_local_rank()
    stage, fresh = cut(tower(), index), cut(Tower().to(DEVICE), index)
    for module in (stage, fresh):
        if mesh["dp"].size() > 1:
            tiepolicy_fsdp2.fully_shard(module, blocks=[Layer], mesh=mesh["dp"])
    ties = tiepolicy_fsdp2.tie_stages(stage, plan=whole_plan(), group=mesh["pp"].get_group())
    run_steps(stage, mesh, Schedule1F1B, sync=True, steps=range(1), ties=ties)
    tiepolicy_dcp.save(FOLDER / "joint", model=stage, plan=whole_plan(), consolidated=True)
    restored = tiepolicy_dcp.load(FOLDER / "joint", model=fresh)
    expected = dict(stage.named_parameters())
    same = all(torch.equal(whole(parameter), whole(expected[name])) for name, parameter in fresh.named_parameters())
    embed, head = both(whole(half(fresh)))
    return {
        "same": all(both(same)),
        "equal": torch.equal(embed, head),
        "consolidated": all(both(is_consolidated(FOLDER / "joint", stage))),
        "notes": [action.note for actions in both(restored.actions) for action in actions if action.note],
    }


def is_consolidated(folder, stage):
    """Whether the one file has what the stage has, under the names that are stored."""
    plan, tensors = whole_plan(), load_file(folder / "model.safetensors")
    return sorted(plan.stored()) == sorted(tensors) and all(
        torch.equal(tensors[plan.canonical(name)], whole(parameter)) for name, parameter in stage.named_parameters()
    )


def resume():
    """Stop after a step and go on: in stages with other weights, and in the whole model and stages cut from it."""
    mesh = grid()
    index = mesh["pp"].get_local_rank()
    names = {"plan": whole_plan(), "group": mesh["pp"].get_group()}
    stages = [cut(tower(), index), *(cut(Tower().to(DEVICE), index) for _ in range(2))]
    for module in stages:
        if mesh["dp"].size() > 1:
            tiepolicy_fsdp2.fully_shard(module, blocks=[Layer], mesh=mesh["dp"])
    optimizers = [grouped(module, lr=lr) for module, lr in zip(stages, (0.05, 0.5, 0.5), strict=True)]
    go = functools.partial(run_steps, mesh=mesh, schedule_class=Schedule1F1B, sync=True)
    ties = tiepolicy_fsdp2.tie_stages(stages[0], **names)
    go(stages[0], steps=range(1), ties=ties, optimizer=optimizers[0])
    with tiepolicy_dcp.CheckpointStore(FOLDER / "run") as store:
        given = {"model": stages[0], "optimizer": optimizers[0], "plan": whole_plan(), "consolidated": True}
        store.save("stopped", **given)
        store.async_save("again", **given).result()
        consolidated = [is_consolidated(store.root / name, stages[0]) for name in ("stopped", "again")]
        stopped = digests(stages[0], optimizers[0])
        go(stages[0], steps=range(1, STEPS), ties=ties, optimizer=optimizers[0])
        restored = store.load("stopped", model=stages[1], optimizer=optimizers[1])

        model = Tower().to(DEVICE)
        optimizer = grouped(model, lr=0.5)
        store.load("again", model=model, optimizer=optimizer)
        as_one = digests(model, optimizer)
        store.save("as_one", model=model, optimizer=optimizer)
        store.load("as_one", model=stages[2], optimizer=optimizers[2])
    bits = [digests(*pair) for pair in zip(stages[1:], optimizers[1:], strict=True)]
    groups = [[{**group, "params": []} for group in one.param_groups] for one in (*optimizers, optimizer)]
    go(stages[1], steps=range(1, STEPS), ties=tiepolicy_fsdp2.tie_stages(stages[1], **names), optimizer=optimizers[1])
    return {
        "loaded": all(both([stopped, stopped] == bits)),
        "consolidated": all(both(all(consolidated))),
        "as_one": all(both(len(stopped) > 8 and stopped.items() <= (as_one | renamed(as_one)).items())),
        "groups": all(both(all(one == groups[0] for one in groups) and 3 == len(groups[0]))),
        "resumed": all(both(digests(stages[0], optimizers[0]) == digests(stages[1], optimizers[1]))),
        "notes": [action.note for actions in both(restored.optimizer_actions) for action in actions if action.note],
    }


def grouped(model, *, lr):
    """AdamW without decay for what is no matrix, and with its own for what only the first stage has."""
    own = dict(model.named_parameters()).get("layers.0.down.bias")
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1 and parameter is not own]
    groups = [
        {"params": [parameter for parameter in model.parameters() if parameter.ndim > 1]},
        {"params": vectors, "weight_decay": 0.0},
        {"params": [] if own is None else [own], "weight_decay": 0.5},
    ]
    return torch.optim.AdamW(groups, lr=lr)


def renamed(bits):
    """Digests under the names of the halves that the whole model does not list."""
    halves = {"lm_head": "embed_tokens", "layers.1.up": "layers.0.up"}
    return {
        name.replace(stored, half): digest
        for half, stored in halves.items()
        for name, digest in bits.items()
        if name.startswith(f"{stored}.weight")
    }


def save_a_drifted_pair():
    stage = cut(tower(), dist.get_rank())
    if dist.get_rank() == 1:
        with torch.no_grad():
            half(stage)[3, 2] += 1
    return refused("drifted", stage, None, consolidated=True)


def save_one_stage_twice():
    stage = cut(tower(), 0)
    return {"error": message(lambda: tiepolicy_dcp.save(FOLDER / "half", model=stage, plan=whole_plan()))}


def save_a_drifted_state():
    """The weights are equal still, the next step would part them."""
    stage = cut(tower(), dist.get_rank())
    optimizer = torch.optim.AdamW(stage.parameters())
    half(stage).grad = torch.full_like(half(stage), float(dist.get_rank()))
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    return refused("drifted_state", stage, optimizer)


def save_with_other_hyperparameters():
    stage = cut(tower(), dist.get_rank())
    return refused("rates", stage, torch.optim.AdamW(stage.parameters(), lr=0.1 + dist.get_rank()))


def save_halves_in_two_groups():
    stage = cut(tower(), dist.get_rank())
    others = [parameter for parameter in stage.parameters() if parameter is not half(stage)]
    groups = [{"params": [half(stage)]}, {"params": others}]
    return refused("groups", stage, torch.optim.AdamW(groups[:: (1, -1)[dist.get_rank()]]))


def save_halves_of_which_one_is_optimized():
    stage = cut(tower(), dist.get_rank())
    trained = [p for p in stage.parameters() if p is not half(stage)] if dist.get_rank() == 0 else stage.parameters()
    return refused("optimized", stage, torch.optim.AdamW(trained))


def save_a_name_of_two_ranks():
    """One has the whole model, the other all but a layer, under the same names; then with another value."""
    model = tower()
    if dist.get_rank() == 1:
        del model.layers["0"]
    folder = tiepolicy_dcp.save(FOLDER / "shared", model=model, plan=whole_plan(), consolidated=True)
    consolidated = all(both(is_consolidated(folder, model)))
    with torch.no_grad():
        half(model)[3, 2] += dist.get_rank()
    return {"consolidated": consolidated} | refused("two_values", model, None)


class LlamaStage(nn.Module):
    """One of two stages of a model of transformers, with a layer each and the names of the whole."""

    def __init__(self, whole_model, index: int) -> None:
        super().__init__()
        inner = whole_model.model
        self.model = nn.ModuleDict({"layers": nn.ModuleDict({str(index): inner.layers[index]})})
        self.model["rotary_emb"] = inner.rotary_emb
        if index == 0:
            self.model["embed_tokens"] = inner.embed_tokens
        else:
            self.model["norm"], self.lm_head = inner.norm, whole_model.lm_head

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if "embed_tokens" in self.model:
            states = self.model["embed_tokens"](states)
        positions = self.model["rotary_emb"](states, torch.arange(states.shape[1], device=states.device)[None])
        for layer in self.model["layers"].values():
            states = layer(states, position_embeddings=positions)
        return self.lm_head(self.model["norm"](states)) if "norm" in self.model else states


def llama(*, tied):
    torch.manual_seed(3)
    return tiny_llama(tie_word_embeddings=tied, vocab_size=ROWS, num_layers=2).double()


def train_llama(name, *, tied):
    """Train a step and save, beside what the stages have and what a single process makes of the same step."""
    mesh = grid()
    stage = LlamaStage(llama(tied=tied).to(DEVICE), mesh["pp"].get_local_rank())
    if mesh["dp"].size() > 1:
        blocks = list({type(layer) for layer in stage.model["layers"].values()})
        tiepolicy_fsdp2.fully_shard(stage, blocks=blocks, mesh=mesh["dp"])
    with torch.device("meta"):
        plan = tiepolicy.plan(llama(tied=tied))
    ties = tiepolicy_fsdp2.tie_stages(stage, plan=plan, group=mesh["pp"].get_group())
    run_steps(stage, mesh, ScheduleGPipe, sync=True, steps=range(1), ties=ties)
    tiepolicy_dcp.save(FOLDER / name, model=stage, plan=plan, consolidated=True)

    alone, ids = llama(tied=tied), batch(0).cpu()
    optimizer = torch.optim.AdamW(alone.parameters(), lr=0.05)
    nn.functional.cross_entropy(alone(ids).logits.flatten(0, 1), ids.roll(1, 1).flatten()).backward()
    optimizer.step()
    first, last = both({name: whole(parameter) for name, parameter in stage.named_parameters()})
    if dist.get_rank() == 0:
        save_file(first | last, FOLDER / f"{name}_stages.safetensors")
        alone.save_pretrained(FOLDER / f"{name}_alone")
    return {"shared": sorted(ties.shared)}


def tied_llama():
    return train_llama("tied_llama", tied=True)


def untied_llama():
    return train_llama("untied_llama", tied=False)


def refused(name, stage, optimizer, **options):
    def save():
        tiepolicy_dcp.save(FOLDER / name, model=stage, optimizer=optimizer, plan=whole_plan(), **options)

    return {"error": message(save), "written": sorted(path.name for path in FOLDER.glob(f"*{name}*"))}


FOLDER = Path(sys.argv[1])

if __name__ == "__main__":
    run(globals(), sys.argv[2:], FOLDER / "results.jsonl")
