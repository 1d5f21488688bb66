"""AdamW over one flat buffer, with the gradient's scale on the device."""

from __future__ import annotations

from torch import Tensor

from eagle3.kernels import jit, tl

_BLOCK = 1024


def adamw_(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    copy: Tensor,
    *,
    scale: Tensor,
    lr: Tensor,
    step: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101), as torch.optim.AdamW computes it.

    Args:
        master: Weights, flat, updated in place; float32, or float64 in tests.
        exp_avg: First moment, like `master`, updated in place.
        exp_avg_sq: Second moment, like `master`, updated in place.
        grad: Gradient, in any floating dtype.
        copy: Weights in the compute dtype; overwritten.
        scale: Scalar tensor that multiplies the gradient (its normalisation and clipping).
        lr: Learning rate, a scalar float32 tensor.
        step: How many steps were taken, this one included, a scalar float32 tensor.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay, times `lr`.
    """
    beta1, beta2 = betas
    if not master.is_cuda:
        g = grad.to(master.dtype) * scale
        master.mul_(1 - lr * weight_decay)
        exp_avg.lerp_(g, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
        master.sub_(lr / (1 - beta1**step) * exp_avg / denominator)
        copy.copy_(master)
        return
    num = master.numel()
    _adamw_kernel[(-(-num // _BLOCK),)](
        *(master, exp_avg, exp_avg_sq, grad, copy, scale, lr, step, num),
        *(beta1, beta2, eps, weight_decay),
        BLOCK=_BLOCK,
    )


@jit
def _adamw_kernel(
    master_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    grad_ptr,
    copy_ptr,
    scale_ptr,
    lr_ptr,
    step_ptr,
    num,
    beta1,
    beta2,
    eps,
    weight_decay,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num
    lr = tl.load(lr_ptr)
    step = tl.load(step_ptr)
    correction1 = 1 - tl.exp(step * tl.log(beta1))
    correction2 = 1 - tl.exp(step * tl.log(beta2))
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32) * tl.load(scale_ptr)
    exp_avg = tl.load(exp_avg_ptr + place, mask=inside, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + place, mask=inside, other=0.0)
    master = tl.load(master_ptr + place, mask=inside, other=0.0)
    exp_avg += (1 - beta1) * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    master -= lr * weight_decay * master
    master -= lr / correction1 * exp_avg / (tl.sqrt(exp_avg_sq / correction2) + eps)
    tl.store(exp_avg_ptr + place, exp_avg, mask=inside)
    tl.store(exp_avg_sq_ptr + place, exp_avg_sq, mask=inside)
    tl.store(master_ptr + place, master, mask=inside)
    tl.store(copy_ptr + place, master, mask=inside)
