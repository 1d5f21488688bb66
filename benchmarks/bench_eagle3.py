"""python benchmarks/bench_eagle3.py [--work W8B W1B] [--out results.json]: the draft's training step on one GPU.

A step is: teacher from the target's last hidden states, forward, backward, clipping, AdamW. Beside it, in the same
process and on the same sizes, the floor: the matrix products over all rows that library kernels need, attention, fused
AdamW, and nothing else. Inputs are random and lie on the GPU; 60% of the tokens are supervised, in spans.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from environment import environment
from peers import speculators_step
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig
from works import MODELS, WORKS, Work, documents, spans

from eagle3.blueprint import draft_config
from eagle3.draft import Draft
from eagle3.flat import FlatWeights
from eagle3.fused import FusedStep
from eagle3.graphs import GraphedStep, StepInputs, pays_off, rounded
from eagle3.optimizer import FlatAdamW, clip_factor
from eagle3.pairs import plan_pairs
from eagle3.teacher import TeacherHead
from eagle3.unroll import TrainingTimeTest, UnrollResult, plan_rows


class Bench:
    """A draft and a batch of one line of the table."""

    def __init__(self, work: Work, device: torch.device, dtype: torch.dtype) -> None:
        self.work, self.device, self.dtype = work, device, dtype
        self.model = model = MODELS[work.model]
        self.config = LlamaConfig(
            hidden_size=model.hidden,
            intermediate_size=model.intermediate,
            num_attention_heads=model.heads[0],
            num_key_value_heads=model.heads[1],
            head_dim=model.head_dim,
            vocab_size=model.vocab,
            max_position_embeddings=131072,
        )
        generator = torch.Generator(device).manual_seed(0)
        with torch.device(device):
            self.draft = Draft(draft_config(self.config, draft_vocab_size=model.draft_vocab))
        self.head_VE = torch.randn((model.vocab, model.hidden), device=device, dtype=dtype, generator=generator)
        self.head_VE *= 0.02
        # The head's first rows are longer, so that the greedy token mostly lies in the draft vocabulary.
        self.head_VE[: model.draft_vocab] *= 1.5
        ids = torch.arange(model.draft_vocab, device=device)
        self.draft.init_from_target_(embedding_VE=self.head_VE, head_VE=self.head_VE, draft_ids_D=ids)
        self.draft.embed_tokens.to(dtype)
        size = (work.sequences, work.tokens)
        self.mask, self.documents = spans(work), documents(work)
        self.ids = torch.randint(model.vocab, size, device=device, generator=generator)
        self.aux = torch.randn((*size, 3 * model.hidden), device=device, dtype=dtype, generator=generator)
        self.hidden = torch.randn((*size, model.hidden), device=device, dtype=dtype, generator=generator)

    def fused_step(
        self, *, known_argmax: bool = False, deterministic: bool = False, fp8: bool = False
    ) -> Callable[[], Tensor]:
        """Our step."""
        work = self.work
        weights = FlatWeights(self.draft, dtype=self.dtype, fp8=fp8)
        step = FusedStep(self.draft, weights, num_steps=work.steps, deterministic=deterministic)
        optimizer = FlatAdamW(weights, lr=1e-4)
        head = TeacherHead(self.head_VE, self.draft.target_ids())
        rows = plan_rows(self.mask, work.steps, documents_BT=self.documents)
        plan = plan_pairs(rows, num_sequences=work.sequences, num_tokens=work.tokens)
        has_graph = self.device.type == "cuda" and pays_off(plan, num_weights=weights.copy.numel())
        # As in a run of the trainer: plans are made where batches are, and come from the host.
        inputs = StepInputs(
            plan=rounded(plan) if has_graph else plan,
            input_ids_L=self.ids.flatten(),
            aux_LA=self.aux.flatten(0, 1),
            hidden_LE=self.hidden.flatten(0, 1),
        )
        if known_argmax:
            inputs = replace(inputs, argmax_L=self._greedy_tokens())

        def sums(inputs: StepInputs) -> UnrollResult:
            rows = inputs.plan.teacher_rows_M
            hidden_ME = inputs.hidden_LE.index_select(0, rows)
            known = inputs.argmax_L
            teacher = head.teach(hidden_ME) if known is None else head.teach_known(hidden_ME, known[rows])
            return step(inputs.plan, inputs.input_ids_L, inputs.aux_LA, teacher)

        graphed = GraphedStep(sums)

        def run() -> Tensor:
            result = graphed(inputs) if has_graph else sums(inputs.uploaded())
            factor, _ = clip_factor(weights.grad, scale=1 / result.weight_sum, max_norm=1.0)
            optimizer.step(scale=factor)
            return result.loss_sum / result.weight_sum

        return run

    def _greedy_tokens(self) -> Tensor:
        """The target's greedy token after each token, as a cache of features holds it."""
        return torch.cat([(part @ self.head_VE.T).argmax(dim=-1) for part in self.hidden.flatten(0, 1).split(1024)])

    def autograd_step(self) -> Callable[[], Tensor]:
        """The same under autograd with autocast and torch's fused AdamW."""
        unroll = TrainingTimeTest(self.draft, num_steps=self.work.steps)
        parameters = [parameter for parameter in self.draft.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        mask = self.mask.to(self.device)
        documents_BT = None if self.documents is None else self.documents.to(self.device)

        def run() -> Tensor:
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                result = unroll(self.ids, mask, self.aux, self.hidden, self.head_VE, documents_BT)
            loss = result.loss_sum / result.weight_sum
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return run

    def speculators_step(self, *, loss: str) -> Callable[[], Tensor]:
        """The step of vLLM's trainer, if it is installed, with one of its two implementations of the loss."""
        del self.draft
        inputs = {
            "ids": self.ids,
            "mask": self.mask,
            "documents": self.documents,
            "aux": self.aux,
            "hidden": self.hidden,
            "head_VE": self.head_VE,
            "draft_vocab": self.model.draft_vocab,
        }
        return speculators_step(self.config, inputs, num_steps=self.work.steps, loss=loss)

    def floor_step(self) -> Callable[[], Tensor]:
        """Products, attention and AdamW of all rows, with no sum, norm, loss or gradient bookkeeping."""
        model, work = self.model, self.work
        num, hidden, width = work.sequences * work.tokens, model.hidden, sum(model.heads) * model.head_dim
        width += model.heads[1] * model.head_dim

        def new(*shape: int) -> Tensor:
            return torch.randn(shape, device=self.device, dtype=self.dtype) * 0.02

        shapes = [(width, 2 * hidden), (hidden, model.heads[0] * model.head_dim), (2 * model.intermediate, hidden)]
        shapes += [(hidden, model.intermediate), (model.draft_vocab, hidden)]
        layers = [(new(*shape), new(num, shape[1]), new(num, shape[0]), new(*shape)) for shape in shapes]
        fc = (new(hidden, 3 * hidden), new(num, 3 * hidden), new(num, hidden), new(hidden, 3 * hidden))
        q = new(work.sequences, model.heads[0], work.tokens, model.head_dim).requires_grad_()
        k, v = (new(work.sequences, model.heads[1], work.tokens, model.head_dim).requires_grad_() for _ in "kv")
        count = sum(weight.numel() for weight, *_ in [*layers, fc])
        flat = nn.Parameter(torch.zeros(count, device=self.device))
        flat.grad = torch.zeros_like(flat)
        optimizer = torch.optim.AdamW([flat], lr=1e-4, fused=self.device.type == "cuda")
        teacher = new(num, hidden)
        head = new(model.vocab, hidden)

        def products(weight: Tensor, inputs: Tensor, grads: Tensor, weight_grad: Tensor) -> None:
            inputs @ weight.T
            grads @ weight
            weight_grad.addmm_(grads.T, inputs)

        def run() -> Tensor:
            for start in range(0, num, 2048):
                teacher[start : start + 2048] @ head.T
            products(*fc)
            for _ in range(work.steps):
                for layer in layers:
                    products(*layer)
                out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                torch.autograd.grad(out, (q, k, v), out)
            optimizer.step()
            return flat[0].detach()

        return run


def measure(step: Callable[[], Tensor], device: torch.device, seconds: float) -> dict[str, float]:
    """Median wall time of a step, synchronised after each, and the peak of allocated memory."""
    is_gpu = device.type == "cuda"
    # Also warms the chip: its clock settles within the first second.
    started = time.perf_counter()
    for _ in range(3):
        loss = step()
    while is_gpu and time.perf_counter() - started < seconds / 2:
        loss = step()
    if is_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    while len(times) < 10 or sum(times) < seconds:
        before = time.perf_counter()
        loss = step()
        if is_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
    peak = torch.cuda.max_memory_allocated() / 2**30 if is_gpu else float("nan")
    return {
        "ms": 1e3 * statistics.median(times),
        "min_ms": 1e3 * min(times),
        "max_ms": 1e3 * max(times),
        "n": len(times),
        "peak_gib": peak,
        "loss": float(loss),
    }


def profile(step: Callable[[], Tensor], num_steps: int = 3) -> dict[str, dict[str, float]]:
    """Where a step's time goes on the GPU: milliseconds and launches by kind of kernel, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(num_steps):
            step()
        torch.cuda.synchronize()
    found: dict[str, dict[str, float]] = {}
    for event in profiler.events():
        if event.device_type != torch.autograd.DeviceType.CUDA or "#" in event.name:
            continue
        kind = next((kind for kind, marks in KERNELS.items() if any(mark in event.name for mark in marks)), "other")
        entry = found.setdefault(kind, {"ms": 0.0, "launches": 0.0})
        entry["ms"] += event.self_device_time_total / 1e3 / num_steps
        entry["launches"] += 1 / num_steps
    return dict(sorted(found.items(), key=lambda item: -item[1]["ms"]))


#: Parts of the names of kernels, by what they are for; the first that fits counts.
KERNELS = {
    "AdamW": ("_adamw",),
    "attention": ("sdpa", "fmha", "flash", "compute_dot_do_o", "convert_dq", "_merge_kernel", "_same_row"),
    "loss": ("_soft_cross_entropy", "_row_max"),
    "norms": ("_rms_norm",),
    "activation": ("_swiglu",),
    "heads": ("_place_kernel", "_unrotate", "_sum_by_token"),
    "matrix products": ("nvjet", "gemm", "cutlass", "cublas", "sm90_xmma"),
    "copies": ("Memcpy", "Memset", "copy_kernel", "index"),
}

KINDS = {
    "ours": Bench.fused_step,
    "known argmax": lambda bench: bench.fused_step(known_argmax=True),
    "deterministic": lambda bench: bench.fused_step(deterministic=True),
    "fp8": lambda bench: bench.fused_step(fp8=True),
    "autograd": Bench.autograd_step,
    "floor": Bench.floor_step,
    "speculators fused loss": lambda bench: bench.speculators_step(loss="fused"),
    "speculators eager loss": lambda bench: bench.speculators_step(loss="eager"),
}


def main() -> int:
    """Print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", nargs="*", default=["W8B", "W1B"], help="models of the lines to run")
    parser.add_argument("--kinds", nargs="*", default=["ours", "known argmax", "floor"], choices=list(KINDS))
    parser.add_argument("--lines", nargs="*", type=int, help="indices of the lines to run")
    parser.add_argument("--profile", action="store_true", help="also say which kernels the time goes to")
    parser.add_argument("--seconds", type=float, default=1.5, help="how long each measurement lasts at least")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    results = []
    print(f"{'work':<34} {'kind':<22} {'ms':>8} {'min':>8} {'max':>8} {'peak GiB':>9} {'loss':>8}")
    for index, work in enumerate(WORKS):
        if work.model not in options.work or (options.lines and index not in options.lines):
            continue
        for kind in options.kinds:
            bench = Bench(work, device, dtype)
            step = KINDS[kind](bench)
            found = measure(step, device, options.seconds)
            parts = profile(step) if options.profile and device.type == "cuda" else None
            del bench, step
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            results.append({"work": asdict(work), "kind": kind, **found})
            if parts is not None:
                results[-1]["profile"] = parts
            print(
                f"{work.name:<34} {kind:<22} {found['ms']:8.2f} {found['min_ms']:8.2f} {found['max_ms']:8.2f} "
                f"{found['peak_gib']:9.2f} {found['loss']:8.4f}",
                flush=True,
            )
            for name, part in (parts or {}).items():
                print(f"{'':<34} {name:<18} {part['ms']:8.2f} ms {part['launches']:6.0f} launches")
    if options.out:
        options.out.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
