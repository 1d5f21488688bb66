"""Two pipeline stages, one with the embedding and one with the head, that stay one tensor and are saved as one.

torchrun --nproc-per-node=2 examples/pipeline_stage.py
"""

import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import tiepolicy
import tiepolicy_dcp
import tiepolicy_fsdp2


class Model(nn.Module):
    """A model whose head is its embedding, or the part of it that one of two stages has, under the same names."""

    def __init__(self, stage: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(2000, 64) if stage != 1 else None
        self.blocks = nn.ModuleDict({str(index): nn.Linear(64, 64) for index in range(2) if stage in (None, index)})
        self.head = nn.Linear(64, 2000, bias=False) if stage != 0 else None
        if stage is None:
            self.head.weight = self.embed.weight

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Ids `(B, L)` or states `(B, L, D)` to states, or to logits `(B, L, V)` in the last stage."""
        if self.embed is not None:
            states = self.embed(states)
        for block in self.blocks.values():
            states = states + torch.relu(block(states))
        return states if self.head is None else self.head(states)


def main() -> None:
    """Train two stages, save them as one model, load it whole."""
    dist.init_process_group("gloo")
    index = dist.get_rank()
    with torch.device("meta"):
        plan = tiepolicy.plan(Model())  # of the whole model; on the meta device it costs nothing
    stage = Model(index)
    ties = tiepolicy_fsdp2.tie_stages(stage, plan=plan, keep="canonical")  # the head starts as the embedding does
    schedule = ScheduleGPipe(
        PipelineStage(stage, index, 2, torch.device("cpu")),
        n_microbatches=2,
        loss_fn=lambda logits, ids: nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
    )
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-3)
    for step in range(3):
        ids = torch.randint(0, 2000, (4, 17), generator=torch.Generator().manual_seed(step))
        schedule.step(*([ids] if index == 0 else []), target=ids if index == 1 else None)
        tiepolicy_fsdp2.sync_tied_gradients(ties)  # both halves get the sum of their gradients
        optimizer.step()
        optimizer.zero_grad()
    tiepolicy_fsdp2.verify_stages(ties, step="training")  # equal to the bit, or BrokenTieError

    with tempfile.TemporaryDirectory() as temporary:
        shared = [temporary]
        dist.broadcast_object_list(shared)
        folder = tiepolicy_dcp.save(f"{shared[0]}/step_3", model=stage, optimizer=optimizer, plan=plan)
        tiepolicy_dcp.load(
            folder, model=stage, optimizer=optimizer
        )  # each stage finds its half under the one stored name
        whole = Model()
        tiepolicy_dcp.load(folder, model=whole)
        dist.barrier()
    half = stage.embed if stage.head is None else stage.head
    found = [None, None]
    dist.all_gather_object(found, (list(stage.state_dict()), torch.equal(half.weight, whole.head.weight)))
    if index == 0:
        for number, (names, is_equal) in enumerate(found):
            print(f"stage {number} has {', '.join(names)}; its half equals the whole model's: {is_equal}")
        print(f"tied in the whole model: {whole.head.weight is whole.embed.weight}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
