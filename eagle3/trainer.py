"""Step 12: the loop: the target's states, an unrolled step of the draft, now and then a log line and a checkpoint."""

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

import tiepolicy
from eagle3.checkpoint import Progress, RunCheckpoints, RunState, read_draft_config, write_draft_config
from eagle3.config import RunConfig, write_run_config
from eagle3.data import Batch, BatchOrder, EncodedData, batches, encode, load_conversations
from eagle3.draft import Draft, draft_config
from eagle3.errors import CheckpointError
from eagle3.loss import StepCounts
from eagle3.parallel import Ranks
from eagle3.target import FrozenTarget
from eagle3.unroll import TrainingTimeTest, UnrollResult
from eagle3.vocab import choose_draft_vocab, count_supervised, forced_ids

logger = logging.getLogger("eagle3")

#: One JSON object per logged step, in the folder of the run.
METRICS = "metrics.jsonl"


def train(config: RunConfig, ranks: Ranks) -> None:
    """Train a draft, from the start or from a checkpoint, until all epochs are completed.

    Called by all processes.

    Raises:
        Eagle3Error: If the settings, the data, the target or the run's folder cannot be used.
        TiePolicyError: If a checkpoint cannot be written or restored.
    """
    checkpoints = RunCheckpoints(config.out, ranks)
    if config.checkpoint.restore_from is None:
        checkpoints.require_fresh()
    target = FrozenTarget.load(
        config.target.model,
        dtype=getattr(torch, config.target.dtype),
        device=ranks.device,
        layers=config.target.layers,
    )
    data = encode(load_conversations(config.data.train), target.tokenizer, max_length=config.data.max_length)
    _log_data(data)
    _Run(config, ranks, checkpoints, target, data).go()


class _Run:
    """One run in one process: what stays the same over its steps, and the state that a checkpoint holds."""

    def __init__(
        self, config: RunConfig, ranks: Ranks, checkpoints: RunCheckpoints, target: FrozenTarget, data: EncodedData
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.checkpoints = checkpoints
        self.target = target
        self.data = data
        self.order = BatchOrder(
            len(data.examples),
            batch_size=config.train.batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            seed=config.train.seed,
        )
        self.num_steps = config.train.epochs * self.order.steps_per_epoch
        self.num_warmup_steps = math.ceil(config.train.warmup_ratio * self.num_steps)
        draft = self._make_draft()
        parameters = [parameter for parameter in draft.parameters() if parameter.requires_grad]
        optimizer = AdamW(parameters, lr=config.train.lr, betas=(0.9, 0.95), weight_decay=config.train.weight_decay)
        self.parameters = parameters
        self.state = RunState(
            draft=draft,
            optimizer=optimizer,
            scheduler=LambdaLR(optimizer, self._lr_factor),
            progress=Progress(),
            data_digest=data.digest,
        )
        self.metrics = _Metrics(Path(config.out) / METRICS, config.unroll.steps, ranks)

    def go(self) -> None:
        """Train what is left of the run."""
        config, progress = self.config, self.state.progress
        if config.checkpoint.restore_from is not None:
            self.checkpoints.restore_(config.checkpoint.restore_from, self.state)
        if progress.epoch >= config.train.epochs:
            logger.info("All %d epochs already completed; nothing to do.", config.train.epochs)
            return
        logger.info("Weights of the draft: %s", tiepolicy.plan(self.state.draft))
        logger.info(
            "Training starts: epochs %d, batches per epoch %d, steps %d, warm-up steps %d, peak learning rate %.3g, "
            "processes %d",
            *(config.train.epochs, self.order.steps_per_epoch, self.num_steps, self.num_warmup_steps),
            *(config.train.lr, self.ranks.world_size),
        )
        self.metrics.forget_after(progress.step)
        # The wrapper averages gradients; its sums are divided by the global count in `_step`.
        unroll = TrainingTimeTest(self.state.draft, num_steps=config.unroll.steps, decay=config.unroll.decay)
        replicated = self.ranks.replicate(unroll)
        while progress.epoch < config.train.epochs:
            for batch in self._batches():
                lr = self._step(replicated, batch)
                self._log_and_save_if_due(lr)

    def _make_draft(self) -> Draft:
        """A new draft on the run's device, or for a resumed run one with the config it was started with."""
        out = Path(self.config.out)
        if self.config.checkpoint.restore_from is not None:
            # Its weights and vocabulary come from the checkpoint.
            return Draft(read_draft_config(out)).to(self.ranks.device)
        target = self.target
        counts_V = count_supervised(self.data.examples, target.vocab_size)
        forced = forced_ids(target.tokenizer, target.vocab_size)
        vocab = choose_draft_vocab(counts_V, size=self.config.draft.vocab_size, forced_ids=forced)
        logger.info(
            "Draft vocabulary: %d of %d tokens, %.2f%% of what the assistant wrote",
            *(vocab.size, target.vocab_size, 100 * vocab.coverage),
        )
        config = draft_config(target.config, draft_vocab_size=vocab.size, options=self.config.draft)
        config.eagle_aux_hidden_state_layer_ids = list(target.layer_ids)
        torch.manual_seed(self.config.train.seed)
        draft = Draft(config).to(self.ranks.device)
        draft.init_from_target_(embedding_VE=target.embedding_VE, head_VE=target.head_VE, draft_ids_D=vocab.ids_D)
        if self.ranks.is_first:
            write_draft_config(out, config)
            write_run_config(out, self.config)
        return draft

    def _batches(self) -> Iterator[Batch]:
        """The batches that are left of the epoch under way."""
        progress = self.state.progress
        size = self.config.train.batch_size * self.ranks.world_size
        if progress.num_seen % size:
            raise CheckpointError(
                f"The run stopped after {progress.num_seen} conversations of an epoch, which steps of {size} "
                f"conversations (train.batch_size {self.config.train.batch_size} in {self.ranks.world_size} processes) "
                "do not reach. Resume with a product that divides it, or from the end of an epoch."
            )
        start = progress.num_seen // size
        return batches(self.data, order=self.order, epoch=progress.epoch, start_step=start, pad_id=0)

    def _step(self, replicated: nn.Module, batch: Batch) -> float:
        """One optimizer step: the loss is one sum over the pairs of all processes, divided by their one count.

        Returns:
            The learning rate of the step.
        """
        progress, device = self.state.progress, self.ranks.device
        input_ids_BT, loss_mask_BT = batch.input_ids_BT.to(device), batch.loss_mask_BT.to(device)
        features = self.target.features(input_ids_BT)
        dtype = self.state.draft.fc.weight.dtype
        result: UnrollResult = replicated(
            input_ids_BT, loss_mask_BT, features.aux_BTA.to(dtype), features.hidden_BTE, self.target.head_VE
        )
        sums = torch.stack((result.loss_sum.detach().double(), result.weight_sum.double()))
        self.ranks.sum_(sums)
        loss_sum, weight_sum = sums
        # The wrapper divides gradients by the number of processes, which the global count already contains.
        scale = self.ranks.world_size / weight_sum.clamp(min=torch.finfo(torch.float32).tiny)
        (result.loss_sum * scale.to(result.loss_sum.dtype)).backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.train.max_grad_norm)
        lr = float(self.state.scheduler.get_last_lr()[0])
        self.state.optimizer.step()
        self.state.optimizer.zero_grad()
        self.state.scheduler.step()
        progress.step += 1
        progress.num_seen += self.config.train.batch_size * self.ranks.world_size
        self.metrics.add(loss_sum, weight_sum, result.counts, batch.input_ids_BT.numel())
        return lr

    def _log_and_save_if_due(self, lr: float) -> None:
        progress, every = self.state.progress, self.config.checkpoint.every_steps
        epoch_ends = progress.num_seen >= len(self.data.examples)
        saves = epoch_ends or (every is not None and progress.step % every == 0)
        # Also before a save: a line's means then never reach over a place where a run may be resumed.
        if saves or progress.step == 1 or progress.step % self.config.train.log_every == 0:
            self.metrics.log(epoch=progress.epoch + 1, step=progress.step, num_steps=self.num_steps, lr=lr)
        if epoch_ends:
            progress.epoch, progress.num_seen = progress.epoch + 1, 0
        if saves:
            self.checkpoints.save(self.state, consolidated=self.config.checkpoint.save_consolidated)

    def _lr_factor(self, step: int) -> float:
        """Share of the peak learning rate: linear up to it, then a cosine down to 0 behind the last step."""
        if step < self.num_warmup_steps:
            return (step + 1) / self.num_warmup_steps
        share = (step - self.num_warmup_steps) / max(1, self.num_steps - self.num_warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


@dataclass(slots=True)
class _Sums:
    loss: torch.Tensor
    weight: torch.Tensor
    counts: torch.Tensor
    num_tokens: int = 0


class _Metrics:
    """Sums since the last log line, and the file that keeps the lines."""

    def __init__(self, path: Path, num_steps: int, ranks: Ranks) -> None:
        self.path = path
        self.num_unroll_steps = num_steps
        self.ranks = ranks
        self._clear()

    def add(self, loss_sum: torch.Tensor, weight_sum: torch.Tensor, counts: StepCounts, num_tokens: int) -> None:
        """Add one step: global sums of loss and weight, and this process's counts and tokens."""
        self.sums.loss += loss_sum
        self.sums.weight += weight_sum
        self.sums.counts += counts.as_tensor()
        self.sums.num_tokens += num_tokens

    def log(self, *, epoch: int, step: int, num_steps: int, lr: float) -> None:
        """Log and write the means since the last time, over all processes, and start anew."""
        self.ranks.sum_(self.sums.counts)
        counts = StepCounts.from_tensor(self.sums.counts)
        loss = float(self.sums.loss / self.sums.weight) if self.sums.weight > 0 else 0.0
        accuracy = counts.accuracy()
        speed = self.sums.num_tokens * self.ranks.world_size / max(1e-9, time.perf_counter() - self.started)
        logger.info(
            "epoch %d step %d/%d: loss %.4f, accuracy %s, accept length %.2f of %d, learning rate %.3g, %.0f tokens/s",
            *(epoch, step, num_steps, loss, " ".join(f"{share:.3f}" for share in accuracy)),
            *(counts.accept_length(), self.num_unroll_steps, lr, speed),
        )
        entry = {
            "step": step,
            "epoch": epoch,
            "loss": loss,
            "accuracy": accuracy,
            "accept_length": counts.accept_length(),
            "lr": lr,
        }
        if self.ranks.is_first:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        self._clear()

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run takes again."""
        if self.ranks.is_first and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def _clear(self) -> None:
        device = self.ranks.device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        counts = torch.zeros(4, self.num_unroll_steps, dtype=torch.int64, device=device)
        self.sums = _Sums(zero, zero.clone(), counts)
        self.started = time.perf_counter()


def _log_data(data: EncodedData) -> None:
    logger.info(
        "Data: %d conversations, %d tokens, %d of them supervised; %d dropped without a token to learn, %d cut short",
        *(len(data.examples), data.num_tokens, data.num_supervised, data.num_dropped, data.num_truncated),
    )
