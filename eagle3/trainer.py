"""Step 32: the loop: steps of the draft, now and then a line, a look at the validation data, and a checkpoint."""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from eagle3.blueprint import LAYERS, draft_config, read_draft_config, require_draft, write_draft_config
from eagle3.checkpoint import Progress, RunCheckpoints, RunState, owners_of, target_digest
from eagle3.config import RunConfig, write_run_config
from eagle3.data import Batch, BatchOrder, batches
from eagle3.draft import Draft
from eagle3.errors import CheckpointError, ConfigError
from eagle3.files import sole_writer
from eagle3.finished import init_from_existing_
from eagle3.flat import FlatWeights
from eagle3.fused_scorer import FusedScorer, fp8_obstacle, obstacle
from eagle3.inputs import RunInputs, Target, choose_vocab, open_inputs
from eagle3.loss import Objective
from eagle3.metrics import Display, Measurement, MetricsLog, Sums
from eagle3.optimizer import DraftOptimizer, FlatDraftOptimizer
from eagle3.parallel import Ranks, StopRequest, all_present, stop_on_signals
from eagle3.step import AutogradScorer, Scorer, StepResult, Watch, take_step
from eagle3.tokens import EncodedData
from eagle3.unroll import TrainingTimeTest
from eagle3.vocab import count_supervised, require_coverage, vocab_of

logger = logging.getLogger("eagle3")

#: Seconds for which a run waits for another one to leave its folder.
_PATIENCE = 3.0


def train(config: RunConfig, ranks: Ranks) -> None:
    """Train a draft, from the start or from a checkpoint, until all epochs are completed or a signal asks to stop.

    Called by all processes.

    Args:
        config: The run.
        ranks: This process among those of the run.

    Raises:
        Eagle3Error: If the settings, the data, the target or the run's folder cannot be used, or numbers are no longer
            finite.
        TiePolicyError: If a checkpoint cannot be written or restored.
    """
    checkpoints = RunCheckpoints(config.out, ranks, config.checkpoint)
    metrics = MetricsLog(config, ranks)
    with ExitStack() as stack:
        stack.enter_context(all_present())
        stack.enter_context(_only_trainer_of(config.out, ranks))
        if config.checkpoint.restore_from is None:
            checkpoints.require_fresh()
        stack.callback(checkpoints.close)
        stack.callback(metrics.close)
        stack.enter_context(_deterministic(config.train.deterministic))
        # From here on, a signal waits until there is something to save.
        request = stack.enter_context(stop_on_signals())
        inputs = open_inputs(config, device=ranks.device)
        _Run(config, ranks, checkpoints, metrics, inputs, request).go()


class _Run:
    """One run in one process: what stays the same over its steps, and the state that a checkpoint holds."""

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        checkpoints: RunCheckpoints,
        metrics: MetricsLog,
        inputs: RunInputs,
        request: StopRequest,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.checkpoints = checkpoints
        self.metrics = metrics
        self.inputs = inputs
        self.target = target = inputs.target
        self.data = data = inputs.data
        self.validation = inputs.validation
        self.request = request
        self.order = self._order_of(data)
        draft = self._make_draft()
        self.scorer, optimizer = scorer_and_optimizer(draft, target, config=config, ranks=ranks)
        self.state = RunState(
            draft=draft,
            optimizer=optimizer,
            progress=Progress(),
            config=config,
            data_digest=data.digest,
            target_digest=target_digest(target),
            external=owners_of(target),
        )
        self.display = Display(ranks, depth=config.unroll.steps)
        self.watch = Watch()
        self.sums = Sums(config.unroll.steps, ranks)

    def go(self) -> None:
        """Train what is left of the run."""
        config, progress = self.config, self.state.progress
        if config.checkpoint.restore_from is not None:
            self.checkpoints.restore_(config.checkpoint.restore_from, self.state)
        if progress.epoch >= config.train.epochs:
            logger.info("All %d epochs already completed; nothing to do.", config.train.epochs)
            return
        logger.info("Weights of the draft: %s", self.checkpoints.plan_of(self.state))
        self.num_steps = progress.step + self._steps_left()
        logger.info(
            "Training starts: epochs %d, batches per epoch %d, steps %d, warm-up steps %d, peak learning rate %.3g, "
            "processes %d",
            *(config.train.epochs, self.order.steps_per_epoch, self.num_steps),
            *(-(-config.train.warmup_ratio * self.num_steps // 1), config.train.lr, self.ranks.world_size),
        )
        self.ranks.on_first(lambda: write_run_config(config.out, config))
        self.metrics.open(step=progress.step)
        self.sums = Sums(config.unroll.steps, self.ranks)
        with self.display:
            while progress.epoch < config.train.epochs and not self.watch.stops:
                self._train_epoch()
        self.checkpoints.finish()
        if self.watch.stops:
            self._say_stopped()

    def _train_epoch(self) -> None:
        """The rest of the epoch under way, or its part up to a stop."""
        for micro_batches in self._steps_of_batches():
            result = self._step(micro_batches)
            self._log_validate_and_save_if_due(result)
            if self.watch.stops:
                return

    def _step(self, micro_batches: list[Batch]) -> StepResult:
        progress = self.state.progress
        num_new = len(micro_batches) * self.config.train.batch_size * self.ranks.world_size
        before = self._share_of_run(progress.num_seen)
        progress.num_seen += num_new
        progress.step += 1
        result = take_step(
            micro_batches,
            scorer=self.scorer,
            optimizer=self.state.optimizer,
            ranks=self.ranks,
            stop=self.request.is_made,
            seen=(before, self._share_of_run(progress.num_seen)),
        )
        self.sums.add(result.loss_and_weight, result.counts, result.num_tokens)
        self.display.advance(step=progress.step, num_steps=self.num_steps)
        self.watch.add(progress.step, result)
        return result

    def _log_validate_and_save_if_due(self, result: StepResult) -> None:
        progress, config = self.state.progress, self.config
        epoch_ends = progress.num_seen >= self.data.num_rows
        saves = epoch_ends or _is_due(progress.step, config.checkpoint.every_steps)
        # Also before a save: a line's means then never reach over a place where a run may be resumed.
        looks = saves or progress.step == 1 or _is_due(progress.step, config.train.log_every)
        if looks or self.watch.stops:
            self.watch.read()
            self._log(result)
        saves = saves or self.watch.stops
        measurement = None
        # Whoever asks to stop has set a time for it, too.
        if not self.watch.stops and (saves or _is_due(progress.step, config.train.validate_every)):
            measurement = self._validate()
        if epoch_ends:
            progress.epoch, progress.num_seen = progress.epoch + 1, 0
        if saves:
            is_last = self.watch.stops or progress.epoch >= config.train.epochs
            self.checkpoints.save(self.state, measurement, is_last=is_last)
            # What a line says of the speed is about training.
            self.sums = Sums(config.unroll.steps, self.ranks)

    def _log(self, result: StepResult) -> None:
        progress, sums = self.state.progress, self.sums
        measurement, speed, lr = sums.measure(loss_is_global=True), sums.tokens_per_second(), result.lr
        place = {"epoch": progress.epoch + 1, "step": progress.step}
        self.display.show_training(measurement, **place, num_steps=self.num_steps, lr=lr, speed=speed)
        self.metrics.log_training(measurement, **place, lr=lr, grad_norm=float(result.norm), tokens_per_second=speed)
        self.sums = Sums(self.config.unroll.steps, self.ranks)

    @torch.no_grad()
    def _validate(self) -> Measurement | None:
        """Measures the draft on the validation data, if there is any. Moves nothing."""
        if self.validation is None:
            return None
        sums = Sums(self.config.unroll.steps, self.ranks)
        for batch in batches(self.validation, order=self._order_of(self.validation), epoch=0, pad_id=0):
            result, _ = self.scorer(batch)
            loss_and_weight = torch.stack((result.loss_sum.double(), result.weight_sum.double()))
            sums.add(loss_and_weight, result.counts, batch.input_ids_BT.numel())
        measurement = sums.measure(loss_is_global=False)
        progress = self.state.progress
        self.display.show_validation(measurement, step=progress.step)
        self.metrics.log_validation(measurement, step=progress.step, epoch=progress.epoch + 1)
        return measurement

    def _say_stopped(self) -> None:
        reason = self.request.signal.name if self.request.signal is not None else "a signal to another process"
        progress = self.state.progress
        if progress.epoch < self.config.train.epochs:
            logger.info(
                "Stopped by %s after step %d of %d. Go on with --checkpoint.restore_from LATEST",
                *(reason, progress.step, self.num_steps),
            )

    def _make_draft(self) -> Draft:
        """A new draft on the run's device, or for a resumed run one with the config it was started with.

        Its embedding is the target's, if it is as wide as that.
        """
        out, target = Path(self.config.out), self.target
        if self.config.checkpoint.restore_from is not None:
            # Its weights and vocabulary come from the checkpoint.
            config = read_draft_config(out)
            require_draft(config, out, **{LAYERS: list(target.layer_ids)})
            return self._beside_target(Draft(config))
        options = self.config.draft
        torch.manual_seed(self.config.train.seed)
        if options.init_from is not None:
            config = read_draft_config(Path(options.init_from))
            draft = self._beside_target(Draft(config))
            init_from_existing_(draft, Path(options.init_from), target=target, options=options)
            counts_V = count_supervised(self.data.examples, target.vocab_size)
            require_coverage(vocab_of(draft.target_ids().cpu(), counts_V), options.min_coverage)
        else:
            vocab = choose_vocab(self.config, self.data, target.tokenizer, target)
            config = draft_config(target.config, draft_vocab_size=vocab.size, options=options)
            config.eagle_aux_hidden_state_layer_ids = list(target.layer_ids)
            draft = self._beside_target(Draft(config))
            draft.init_from_target_(embedding_VE=target.embedding_VE, head_VE=target.head_VE, draft_ids_D=vocab.ids_D)
        self.ranks.on_first(lambda: write_draft_config(out, config))
        return draft

    def _beside_target(self, draft: Draft) -> Draft:
        # Before the draft moves: the device never holds a second embedding, and the target's is there already.
        draft.share_embedding_(self.target.embedding_VE)
        return draft.to(self.ranks.device)

    def _order_of(self, data: EncodedData) -> BatchOrder:
        return BatchOrder(
            data.num_rows,
            batch_size=self.config.train.batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            seed=self.config.train.seed,
        )

    def _steps_of_batches(self) -> Iterator[list[Batch]]:
        """The batches that are left of the epoch under way, as many at a time as a step takes."""
        taken = []
        for batch in batches(
            self.data,
            order=self.order,
            epoch=self.state.progress.epoch,
            start_row=self.state.progress.num_seen,
            pad_id=0,
            num_workers=self.config.data.num_workers,
            prepare=self.scorer.prepare,
        ):
            taken.append(batch)
            if len(taken) == self.config.train.accumulate:
                yield taken
                taken = []
        if taken:
            yield taken

    def _steps_left(self) -> int:
        """Optimizer steps until all epochs are completed; each ends its epoch with whatever is left of it."""
        progress, per_step = self.state.progress, self.config.train.accumulate
        of_this_epoch = -(-self.order.steps_from(progress.num_seen) // per_step)
        of_others = -(-self.order.steps_per_epoch // per_step)
        return of_this_epoch + (self.config.train.epochs - progress.epoch - 1) * of_others

    def _share_of_run(self, num_seen: int) -> float:
        """How much of the run's data was seen; the last step of an epoch may count some of it twice."""
        share_of_epoch = min(1.0, num_seen / self.data.num_rows)
        return (self.state.progress.epoch + share_of_epoch) / self.config.train.epochs


def scorer_and_optimizer(
    draft: Draft, target: Target, *, config: RunConfig, ranks: Ranks
) -> tuple[Scorer, DraftOptimizer]:
    """The step by hand where it is faster and possible, else the one under autograd; and what moves the weights.

    Args:
        draft: On the run's device; spread over the processes as `config.parallel` says.
        target: Gives the features.
        config: Of the run.
        ranks: The processes that learn together.

    Raises:
        ConfigError: If `train.step` or `train.fp8` asks for a step that this draft cannot take.
    """
    precision = _precision(config, ranks.device)
    reason = obstacle(config, draft, ranks.device)
    kind = config.train.step or ("fused" if ranks.device.type == "cuda" and reason is None else "autograd")
    if kind == "fused":
        if reason is not None:
            raise ConfigError(f"train.step is fused, but {reason}. Leave out train.step, or set it to autograd.")
        if config.train.fp8 and (reason := fp8_obstacle(draft, ranks.device)) is not None:
            raise ConfigError(f"train.fp8 is set, but {reason}. Leave out train.fp8, or change that.")
        weights = FlatWeights(draft, dtype=precision, fp8=config.train.fp8)
        scorer = FusedScorer(target, draft, weights, config=config, ranks=ranks)
        return scorer, FlatDraftOptimizer(draft, config.train, weights)
    if config.train.fp8:
        why = reason or "train.step is autograd, or null on the CPU"
        raise ConfigError(f"train.fp8 is set, but only the fused step has it, and {why}. Leave out train.fp8.")
    unroll = TrainingTimeTest(
        draft,
        num_steps=config.unroll.steps,
        decay=config.unroll.decay,
        objective=Objective(kind=config.unroll.loss, lk_decay=config.unroll.lk_decay),
    )
    distributed = ranks.distribute(unroll, config.parallel, precision=precision, head=draft.lm_head)
    dtype = draft.fc.weight.dtype
    # The optimizer comes after sharding, which puts other parameters into the draft.
    return (
        AutogradScorer(target, distributed, device=ranks.device, precision=precision, dtype=dtype),
        DraftOptimizer(draft, config.train),
    )


@contextmanager
def _only_trainer_of(out: str, ranks: Ranks) -> Iterator[None]:
    """Within the block, no other run trains in the folder. Called by all processes; the first one holds it for all."""
    taken = CheckpointError(
        f"Another run trains in {out} right now, and both would destroy each other's checkpoints and metrics. Wait for "
        "it or end it, or choose another --out."
    )
    # The processes of a killed run need a moment to end.
    lock = sole_writer(Path(out) / "train.lock", patience=_PATIENCE, otherwise=taken)
    with ExitStack() as stack:

        def take() -> None:
            try:
                stack.enter_context(lock)
            except OSError as error:
                raise CheckpointError(
                    f"The folder of the run, {out}, cannot be written: {error.strerror or error}. Choose another --out."
                ) from error

        ranks.on_first(take)
        yield


def _precision(config: RunConfig, device: torch.device) -> torch.dtype:
    if config.train.precision is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    precision: torch.dtype = getattr(torch, config.train.precision)
    return precision


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


@contextmanager
def _deterministic(enabled: bool) -> Iterator[None]:
    """Within the block, torch chooses operations that give the same bits each time, or says that it has none."""
    before = torch.are_deterministic_algorithms_enabled()
    if enabled:
        # cuBLAS reads it when it is first used, and torch demands it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
