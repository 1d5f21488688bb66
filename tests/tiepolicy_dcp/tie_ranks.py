"""What several ranks do in `test_tie_ranks.py`: `torchrun tie_ranks.py STEP FOLDER`."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import tiepolicy
import tiepolicy_dcp
from models import TiedPair, train_steps
from tiepolicy.errors import TiePolicyError
from torchrun import process_group

#: Divided by no world size here but 3.
VOCAB_SIZE = 8193


def sharded(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def say(*words: object) -> None:
    """One line of this rank, in one piece."""
    print(f"rank {dist.get_rank()}: {' '.join(map(str, words))}\n", end="", flush=True)


def outcome(step) -> str:
    """The class and message of what a step raises, or that it does not."""
    try:
        step()
    except BaseException as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return "nothing raised"


def across_ties(folder: Path) -> None:
    """Optimizer checkpoints of FSDP2 between tied and untied models, with plain DCP and with ours."""
    for make in (adamw, momentum):
        for saved_tied in (True, False):
            name = f"{make.__name__} saved {'tied' if saved_tied else 'untied'}"
            source = sharded(TiedPair(tied=saved_tied, vocab_size=13))
            optimizer = make(source)
            train_steps(source, optimizer, num_steps=2)
            dcp.save({"o": get_optimizer_state_dict(source, optimizer)}, checkpoint_id=folder / f"{name} plain")
            if not saved_tied:
                with torch.no_grad():
                    source.lm_head.weight.copy_(source.embed_tokens.weight)
            tiepolicy_dcp.save(folder / name, model=source, optimizer=optimizer)
            live = sharded(TiedPair(tied=not saved_tied, vocab_size=13))
            live_optimizer = make(live)
            state = {"o": get_optimizer_state_dict(live, live_optimizer)}
            plain = outcome(lambda state=state, name=name: dcp.load(state, checkpoint_id=folder / f"{name} plain"))
            missing = "Missing key in checkpoint state_dict: o.state.lm_head.weight" in plain
            say(name, "| plain |", "missing the head" if missing else plain)

            def load(live=live, live_optimizer=live_optimizer, name=name) -> None:
                tiepolicy_dcp.load(folder / name, model=live, optimizer=live_optimizer)

            say(name, "| ours |", outcome(load))
            if saved_tied:
                key = "exp_avg" if make is adamw else "momentum_buffer"
                expected = optimizer.state[source.embed_tokens.weight][key].full_tensor()
                got = [live_optimizer.state[parameter][key].full_tensor() for parameter in live.parameters()]
                say(name, "| equal |", [torch.equal(expected, state) for state in got])


def conflict_on_one_shard(folder: Path) -> None:
    """The two stored values differ in a row that only the last rank holds."""
    untied = TiedPair(tied=False, vocab_size=13)
    with torch.no_grad():
        untied.lm_head.weight.copy_(untied.embed_tokens.weight)
        untied.lm_head.weight[12, 3] += 1
    tiepolicy_dcp.save(folder, model=sharded(untied))
    live = sharded(TiedPair(vocab_size=13))
    before = live.lm_head.weight.to_local().clone()
    say(outcome(lambda: tiepolicy_dcp.load(folder, model=live)))
    say("untouched", torch.equal(before, live.lm_head.weight.to_local()))


def damaged(folder: Path) -> None:
    """One rank looks at a file; all know that it was cut, or is lost, before anything is changed."""
    tiepolicy_dcp.save(folder, model=sharded(TiedPair(vocab_size=13)))
    live = sharded(TiedPair(vocab_size=13))
    before = live.lm_head.weight.to_local().clone()
    last = folder / "__1_0.distcp"
    for damage in (lambda: os.truncate(last, last.stat().st_size - 1), last.unlink):
        if dist.get_rank() == 0:
            damage()
        dist.barrier()
        for verify in ("size", "off"):
            say(outcome(lambda verify=verify: tiepolicy_dcp.load(folder, model=live, verify=verify)))
    say("unharmed", torch.equal(before, live.lm_head.weight.to_local()))


class FirstStage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(13, 4)


class LastStage(nn.Module):
    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.lm_head = nn.Linear(4, 13, bias=bias)


def load_stages(folder: Path) -> None:
    """Each rank is a stage of a pipeline and has one of the two names."""
    whole = TiedPair(vocab_size=13)
    tiepolicy_dcp.save(folder, model=whole)
    stage = FirstStage() if dist.get_rank() == 0 else LastStage()
    restored = tiepolicy_dcp.load(folder, model=stage)
    (action,) = restored.actions
    say("equal", torch.equal(whole.lm_head.weight, next(stage.parameters())), action.kind, action.saved, action.name)
    # A stage that nothing holds stops the others too.
    wrong = FirstStage() if dist.get_rank() == 0 else LastStage(bias=True)
    say(outcome(lambda: tiepolicy_dcp.load(folder, model=wrong)))
    # Replicas of one stage still have to agree.
    say(outcome(lambda: tiepolicy_dcp.load(folder, model=TiedPair(tied=dist.get_rank() == 0, vocab_size=13))))


def owners_differ(folder: Path) -> None:
    """The owner of an embedding is another model on the last rank."""
    torch.manual_seed(0)
    target = TiedPair(vocab_size=13)
    draft = FirstStage()
    draft.embed_tokens = target.embed_tokens
    tiepolicy_dcp.save(folder, model=draft, external={"target": target})
    fresh = FirstStage()
    tiepolicy_dcp.load(folder, model=fresh, external={"target": target})
    say("equal", torch.equal(target.embed_tokens.weight, fresh.embed_tokens.weight))
    split = sharded(FirstStage())
    tiepolicy_dcp.load(folder, model=split, external={"target": target})
    say("sharded equal", torch.equal(target.embed_tokens.weight, split.embed_tokens.weight.full_tensor()))
    if dist.get_rank() == dist.get_world_size() - 1:
        target = TiedPair(vocab_size=13)
    say(outcome(lambda: tiepolicy_dcp.load(folder, model=FirstStage(), external={"target": target})))


def all_of_two(folder: Path) -> None:
    """What two ranks can do in one start."""
    for part in (across_ties, conflict_on_one_shard, damaged, load_stages, owners_differ):
        part(folder / part.__name__)


class Scaled(TiedPair):
    """A tied pair with a parameter of one element."""

    def __init__(self, *, vocab_size: int) -> None:
        super().__init__(vocab_size=vocab_size)
        self.scale = nn.Parameter(torch.randn(1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.scale


def uneven() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A vocabulary that no world size divides, and a scale of one element, which all ranks but one have no part of."""
    torch.manual_seed(0)
    model = sharded(Scaled(vocab_size=VOCAB_SIZE))
    return model, adamw(model)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    ids = torch.arange(0, VOCAB_SIZE, 97)
    loss = nn.functional.cross_entropy(model(ids), ids.roll(1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def save_uneven(folder: Path) -> None:
    model, optimizer = uneven()
    for _ in range(2):
        step(model, optimizer)
    shapes = [tuple(parameter.to_local().shape) for parameter in model.parameters()]
    say("shards", shapes)
    tiepolicy_dcp.save(folder, model=model, optimizer=optimizer, consolidated=True)
    bits = bits_of(model, optimizer)
    if dist.get_rank() == 0:
        folder.with_suffix(".json").write_text(json.dumps(bits))


def bits_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Digests of all weights and all optimizer state, gathered."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{name} {key}": value for key, value in optimizer.state[parameter].items()}
    return {name: tiepolicy.content_digest(tensor) for name, tensor in tensors.items()}


def load_uneven(folder: Path) -> None:
    torch.manual_seed(1)
    model, optimizer = uneven()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1)
    tiepolicy_dcp.load(folder, model=model, optimizer=optimizer)
    expected, bits = json.loads(folder.with_suffix(".json").read_text()), bits_of(model, optimizer)
    say(len(bits), "tensors equal", expected == bits, "tied", model.lm_head.weight is model.embed_tokens.weight)
    step(model, optimizer)


if __name__ == "__main__":
    with process_group():
        torch.manual_seed(0)
        try:
            globals()[sys.argv[1]](Path(sys.argv[2]))
        except TiePolicyError as error:
            say(f"{type(error).__name__}: {error}")
