"""What two ranks do in `test_async.py`: save in the background, with one rank failing in between."""

import resource
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from models import TiedPair, train_steps
from tiepolicy_dcp import CheckpointError, CheckpointStore
from torchrun import process_group


def main(folder: Path) -> None:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    with CheckpointStore(folder / "run") as store:
        for worker in ("thread", "process"):
            model = fully_shard(TiedPair(vocab_size=8193), mesh=mesh)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            train_steps(model, optimizer, num_steps=1)
            fail_on_rank_1(store, model, worker)
            store.async_save(f"again_{worker}", model=model, optimizer=optimizer, worker=worker)
            expected = [value.to_local().clone() for value in tensors(model, optimizer)]
            train_steps(model, optimizer, num_steps=1)  # collectives meanwhile, and other weights
            store.wait()
            store.load("LATEST", model=model, optimizer=optimizer)
            loaded = [value.to_local() for value in tensors(model, optimizer)]
            equal = all(torch.equal(*pair) for pair in zip(expected, loaded, strict=True))
            say(f"rank {rank} {worker}: bits equal {equal}, latest {store.resolve('LATEST').name}")


def tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[DTensor]:
    state = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, DTensor)]
    return [model.lm_head.weight, *state]


def fail_on_rank_1(store: CheckpointStore, model: torch.nn.Module, worker: str) -> None:
    """The file of rank 1 may not be as long as it is, or its process is killed; rank 0 sees nothing of that."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if worker == "process":
            store.async_save("first", model=model, worker=worker).result()
            if dist.get_rank() == 1:
                store._savers[worker]._process._process.send_signal(signal.SIGSTOP)
        elif dist.get_rank() == 1:
            # Enough for the copy, which lies in a file in memory, and not for what is around it.
            resource.setrlimit(resource.RLIMIT_FSIZE, (65_600, unlimited[1]))
        store.async_save("lost", model=model, worker=worker)
        if worker == "process" and dist.get_rank() == 1:
            store._savers[worker]._process._process.kill()
        store.wait()
    except CheckpointError as error:
        say(f"rank {dist.get_rank()} heard: {error}")
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def say(line: str) -> None:
    print(line + "\n", end="", flush=True)


if __name__ == "__main__":
    with process_group():
        torch.manual_seed(0)
        main(Path(sys.argv[1]))
