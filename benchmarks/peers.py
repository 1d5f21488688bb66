"""Other trainers' steps on the same inputs, for those that are installed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig


def speculators_step(config: LlamaConfig, inputs: dict[str, Any], *, num_steps: int, loss: str) -> Callable[[], Tensor]:
    """The step of vLLM's `speculators`: float32 weights under bfloat16 autocast, compiled on a GPU, AdamW.

    Its teacher covers the draft vocabulary only. Its own command freezes the head; here it learns, as ours does.

    Args:
        config: Sizes of the target.
        inputs: `ids`, `mask`, `aux`, `hidden`, `documents` (or None) of a batch (B, T), `head_VE` and `draft_vocab`.
        num_steps: Of the unroll.
        loss: `fused`, its default, a Triton kernel inside the compiled step; or `eager`, plain torch operations.
    """
    from speculators.losses import resolve_loss_config
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

    ids, head_VE, draft_vocab = inputs["ids"], inputs["head_VE"], inputs["draft_vocab"]
    layer = LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 1})
    layer._attn_implementation = "simple_flex_attention" if ids.is_cuda else "eager"  # noqa: SLF001
    with torch.device(ids.device):
        model = Eagle3DraftModel(
            Eagle3SpeculatorConfig(
                transformer_layer_config=layer,
                draft_vocab_size=draft_vocab,
                norm_before_residual=True,
                norm_before_fc=True,
                norm_output=True,
            )
        )
    with torch.no_grad():
        for head in (model.lm_head, model.verifier_lm_head):
            head.weight.copy_(head_VE[:draft_vocab])
        model.embed_tokens.weight.copy_(head_VE)
        model.t2d[:draft_vocab] = True
    model.lm_head.weight.requires_grad = True
    # Sequences stand side by side in one row, as its loader packs them.
    documents = torch.arange(len(ids)).repeat_interleave(ids.shape[1])
    if inputs["documents"] is not None:
        documents = inputs["documents"].flatten()
    batch = {
        "hidden_states": inputs["aux"].flatten(0, 1)[None],
        "input_ids": ids.flatten()[None],
        "document_ids": documents.to(ids.device)[None],
        "loss_mask": inputs["mask"].to(ids.device).flatten()[None],
        "verifier_last_hidden_states": inputs["hidden"].flatten(0, 1)[None],
    }
    options = {"ttt_steps": num_steps, "loss_config": resolve_loss_config("kl_div", loss)}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def run() -> Tensor:
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            _, mean_loss, _ = model(**batch, **options)
        optimizer.zero_grad()
        mean_loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return mean_loss.detach()

    return run
