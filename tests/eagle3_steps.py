"""Drafts, batches and single steps of them, by hand and under autograd."""

# Expected values stand on the left.

import torch
from transformers import LlamaConfig

from eagle3.blueprint import draft_config
from eagle3.draft import Draft
from eagle3.pairs import plan_pairs
from eagle3.teacher import teach
from eagle3.unroll import TrainingTimeTest, plan_rows


def make_draft(*, hidden=8, heads=(4, 2), head_dim=4, vocab=11, draft_vocab=6, intermediate=10, dtype=torch.float64):
    """A draft with weights large enough that every path matters."""
    config = draft_config(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_attention_heads=heads[0],
            num_key_value_heads=heads[1],
            head_dim=head_dim,
            vocab_size=vocab,
        ),
        draft_vocab_size=draft_vocab,
    )
    generator = torch.Generator().manual_seed(0)
    draft = Draft(config).double()
    ids = torch.randperm(vocab, generator=generator)[:draft_vocab].sort().values
    weights = torch.randn(2, vocab, hidden, generator=generator, dtype=torch.float64)
    draft.init_from_target_(embedding_VE=weights[0], head_VE=weights[1], draft_ids_D=ids)
    with torch.no_grad():
        for parameter in draft.parameters():
            scale = 1.5 * parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.3
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(scale * noise + (parameter.dim() == 1))
    return draft.to(dtype)


def make_batch(draft, mask, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    loss_mask = torch.tensor(mask, dtype=torch.bool)
    hidden = draft.config.hidden_size
    dtype = draft.fc.weight.dtype

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "input_ids_BT": torch.randint(draft.config.vocab_size, loss_mask.shape, generator=generator),
        "loss_mask_BT": loss_mask,
        "aux_BTA": normal(*loss_mask.shape, 3 * hidden),
        "hidden_BTE": normal(*loss_mask.shape, hidden),
        "head_VE": normal(draft.config.vocab_size, hidden),
    }


def autograd(draft, batch, *, num_steps):
    """The sums of `TrainingTimeTest` and the gradients that autograd finds."""
    draft.zero_grad()
    names = ("input_ids_BT", "loss_mask_BT", "aux_BTA", "hidden_BTE", "head_VE", "documents_BT")
    result = TrainingTimeTest(draft, num_steps=num_steps)(*(batch.get(name) for name in names))
    result.loss_sum.backward()
    return result, {name: p.grad.clone() for name, p in draft.named_parameters() if p.requires_grad}


def run_fused(step, weights, batch, *, num_steps, change=lambda plan: plan, **options):
    """The sums and gradients of `step`, which takes the other options as they are."""
    device = weights.copy.device
    sequences, tokens = batch["loss_mask_BT"].shape
    rows = plan_rows(batch["loss_mask_BT"].cpu(), num_steps, documents_BT=batch.get("documents_BT"))
    plan = change(plan_pairs(rows, num_sequences=sequences, num_tokens=tokens)).to(device)
    dtype = weights.copy.dtype
    hidden_ME = batch["hidden_BTE"].to(device, dtype).flatten(0, 1)[plan.teacher_rows_M]
    teacher = teach(hidden_ME, batch["head_VE"].to(device, dtype), step._draft.target_ids())
    input_ids_L, aux_LA = batch["input_ids_BT"].to(device).flatten(), batch["aux_BTA"].to(device, dtype).flatten(0, 1)
    result = step(plan, input_ids_L, aux_LA, teacher, **options)
    return result, {name: weights.view(weights.grad, name).clone() for name in weights.parameters}


def check_equal(expected, actual, tolerance):
    expected_result, expected_grads = expected
    result, grads = actual
    torch.testing.assert_close(expected_result.loss_sum.detach(), result.loss_sum.cpu(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(expected_result.weight_sum, result.weight_sum.cpu(), check_dtype=False)
    assert expected_result.counts.as_tensor().tolist() == result.counts.as_tensor().tolist()
    assert set(expected_grads) == set(grads)
    for name, grad in expected_grads.items():
        error = (grad - grads[name].cpu().to(grad.dtype)).norm()
        assert error <= tolerance * (grad.norm() + 1e-6), f"{name}: {error} of {grad.norm()}"
