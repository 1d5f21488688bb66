"""Step 22: the products of MLP and head over all steps of a batch, forward and back, in the dtype of the copies or FP8.

Shape suffixes: N rows that carry loss, S steps, P pairs, C pairs of a chunk, U = P rounded up, H draft hidden,
I intermediate, D draft vocabulary.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from eagle3.flat import FlatWeights, Fp8Weights
from eagle3.kernels.fp8 import (
    E4M3,
    E5M2,
    LARGEST_E5M2,
    Scaled,
    aligned,
    product,
    quantise_rows,
    swiglu_backward_rows,
    swiglu_rows,
    transpose,
    transposed,
    weight_gradient,
)
from eagle3.kernels.rowwise import swiglu, swiglu_backward_


def mlp_of(weights: FlatWeights, *, num_steps: int, num_rows: int) -> Mlp | Fp8Mlp:
    """The MLP for a batch, in FP8 if there are weights in it."""
    if weights.fp8 is None:
        return Mlp(weights, num_steps=num_steps, num_rows=num_rows)
    return Fp8Mlp(weights, weights.fp8, num_steps=num_steps, num_rows=num_rows)


class Mlp:
    """The MLP of one batch; keeps of each step what its gradients need.

    Args:
        weights: Its gradients are written by `gate_up_gradient` and `down_gradient`.
        num_steps: S.
        num_rows: N.

    Attributes:
        norm_H: Weight of the norm before it.
        input_SNH: The states that enter it, to be written there before `forward`.
    """

    def __init__(self, weights: FlatWeights, *, num_steps: int, num_rows: int) -> None:
        self._w, self._g = weights.copies, weights.grads
        hidden, intermediate = self._w.down_HI.shape
        new = self._w.down_HI.new_empty
        self.norm_H = self._w.post_norm_H
        self.input_SNH = new((num_steps, num_rows, hidden))
        self._gate_up_SN2I = new((num_steps, num_rows, 2 * intermediate))
        self._active_SNI = new((num_steps, num_rows, intermediate))

    @cached_property
    def grad_SNH(self) -> Tensor:
        """The gradients of what it gave, to be written there before `backward`; made when they are due."""
        return torch.empty_like(self.input_SNH)

    def forward(self, step: int) -> Tensor:
        """What a step's states become: (N, H)."""
        torch.mm(self.input_SNH[step], self._w.gate_up_2IH.T, out=self._gate_up_SN2I[step])
        swiglu(self._gate_up_SN2I[step], out_MI=self._active_SNI[step])
        return self._active_SNI[step] @ self._w.down_HI.T

    def backward(self, step: int) -> Tensor:
        """The gradient of the states that entered a step: (N, H)."""
        swiglu_backward_(self._gate_up_SN2I[step], self.grad_SNH[step] @ self._w.down_HI)
        return self._gate_up_SN2I[step] @ self._w.gate_up_2IH

    def gate_up_gradient(self) -> None:
        """Writes the gradient of gate and up projections: one product over all steps."""
        torch.mm(self._gate_up_SN2I.flatten(0, 1).T, self.input_SNH.flatten(0, 1), out=self._g.gate_up_2IH)

    def down_gradient(self) -> None:
        """The same for the down projection."""
        torch.mm(self.grad_SNH.flatten(0, 1).T, self._active_SNI.flatten(0, 1), out=self._g.down_HI)


class Fp8Mlp:
    """The same with all factors in FP8; what is kept of a step takes half the room."""

    def __init__(self, weights: FlatWeights, fp8: Fp8Weights, *, num_steps: int, num_rows: int) -> None:
        self._fp8, self._g = fp8, weights.grads
        hidden, intermediate = self._g.down_HI.shape
        self._dtype = self._g.down_HI.dtype
        self._grad_NH = self._g.down_HI.new_empty((num_rows, hidden))
        self.norm_H = fp8.post_norm_H
        self.input_SNH = self._grad_NH.new_empty((num_steps, num_rows, hidden), dtype=E4M3)
        self._gate_up_N2I: list[Tensor] = []
        self._active_XI = self._rows(num_steps, intermediate)

    def _rows(self, num_steps: int, width: int) -> Scaled:
        num = num_steps * len(self._grad_NH)
        scale = torch.empty((num, 1), device=self._grad_NH.device)
        return Scaled(values_MK=self._grad_NH.new_empty((num, width), dtype=E4M3), scale=scale)

    def _of(self, step: int) -> slice:
        num_rows = len(self._grad_NH)
        return slice(step * num_rows, (step + 1) * num_rows)

    @cached_property
    def grad_SNH(self) -> Tensor:
        """As of `Mlp`; every step has the same room, for it is kept in FP8."""
        return self._grad_NH.expand(len(self.input_SNH), -1, -1)

    @cached_property
    def _grad_XH(self) -> Scaled:
        return self._rows(len(self.input_SNH), self._grad_NH.shape[1])

    @cached_property
    def _grad_gate_up_X2I(self) -> Scaled:
        return self._rows(len(self.input_SNH), 2 * self._active_XI.values_MK.shape[1])

    def forward(self, step: int) -> Tensor:
        """As of `Mlp`."""
        input_NH = Scaled(values_MK=self.input_SNH[step], scale=self._fp8.post_scale)
        self._gate_up_N2I.append(product(input_NH, self._fp8.gate_up.forward, dtype=self._dtype))
        active_NI = self._active_XI.rows(self._of(step))
        swiglu_rows(self._gate_up_N2I[-1], out=active_NI)
        return product(active_NI, self._fp8.down.forward, dtype=self._dtype)

    def backward(self, step: int) -> Tensor:
        """As of `Mlp`."""
        grad_NH = self._grad_XH.rows(self._of(step))
        quantise_rows(self.grad_SNH[step], out=grad_NH)
        grad_active_NI = product(grad_NH, self._fp8.down.backward, dtype=self._dtype, with_row_scale=False)
        grad_N2I = self._grad_gate_up_X2I.rows(self._of(step))
        swiglu_backward_rows(self._gate_up_N2I.pop(), grad_active_NI, grad_NH.scale, out=grad_N2I)
        return product(grad_N2I, self._fp8.gate_up.backward, dtype=self._dtype)

    def gate_up_gradient(self) -> None:
        """As of `Mlp`."""
        input_XH = Scaled(values_MK=self.input_SNH.flatten(0, 1), scale=self._fp8.post_scale)
        weight_gradient(self._grad_gate_up_X2I, input_XH, out_NK=self._g.gate_up_2IH)

    def down_gradient(self) -> None:
        """As of `Mlp`."""
        weight_gradient(self._grad_XH, self._active_XI, out_NK=self._g.down_HI)


def head_of(weights: FlatWeights, *, num_pairs: int, largest_weight: float) -> Head | Fp8Head:
    """The head for a batch, in FP8 if there are weights in it."""
    if weights.fp8 is None:
        return Head(weights, num_pairs=num_pairs)
    return Fp8Head(weights, weights.fp8, num_pairs=num_pairs, largest_weight=largest_weight)


class Head:
    """The head of one batch, chunk after chunk.

    Args:
        weights: The gradient of the head's is written by `backward`.
        num_pairs: P.

    Attributes:
        norm_H: Weight of the norm before it.
        input_PH: The states that enter it, to be written there before `logits`; pairs without a row stay zero.
        grad_factor: What the gradients are to be multiplied with that `backward` gets.
    """

    grad_factor = 1.0

    def __init__(self, weights: FlatWeights, *, num_pairs: int) -> None:
        self._head_DH, self._grad_DH = weights.copies.head_DH, weights.grads.head_DH
        self.norm_H = weights.copies.final_norm_H
        self.input_PH = self._head_DH.new_zeros((num_pairs, self._head_DH.shape[1]))

    @property
    def grad_PH(self) -> Tensor:
        """The gradient of `input_PH` where `backward` was: it replaces them."""
        return self.input_PH

    def logits(self, chunk: slice) -> Tensor:
        """The draft's logits of some pairs: (C, D)."""
        return self.input_PH[chunk] @ self._head_DH.T

    def grad_place(self, logits_CD: Tensor) -> Tensor:
        """Where the gradient of logits belongs that are needed no more: (C, D)."""
        return logits_CD

    def backward(self, chunk: slice, grad_CD: Tensor) -> None:
        """Goes back through a chunk; the first starts at 0."""
        if chunk.start == 0:
            torch.mm(grad_CD.T, self.input_PH[chunk], out=self._grad_DH)
        else:
            self._grad_DH.addmm_(grad_CD.T, self.input_PH[chunk])
        torch.mm(grad_CD, self._head_DH, out=self.input_PH[chunk])

    def weight_gradient(self) -> None:
        """To be called behind the last chunk, also if there was none."""
        if not len(self.input_PH):
            self._grad_DH.zero_()


class Fp8Head:
    """The same with all factors in FP8, and one product over all pairs for the gradient of the head.

    Args:
        weights: As of `Head`.
        fp8: Of these weights.
        num_pairs: P.
        largest_weight: Of a pair's loss: no gradient of a logit is larger.
    """

    def __init__(self, weights: FlatWeights, fp8: Fp8Weights, *, num_pairs: int, largest_weight: float) -> None:
        self._fp8, self._grad_DH = fp8, weights.grads.head_DH
        self.norm_H = fp8.final_norm_H
        size = (num_pairs, self._grad_DH.shape[1])
        self.input_PH = torch.zeros(size, dtype=E4M3, device=self._grad_DH.device)
        self.grad_factor = 2.0 ** math.floor(math.log2(LARGEST_E5M2 / largest_weight))
        self._grad_scale = torch.full((), 1 / self.grad_factor, device=self._grad_DH.device)

    @cached_property
    def grad_PH(self) -> Tensor:
        """As of `Head`, but beside them."""
        return self._grad_DH.new_empty(self.input_PH.shape)

    @cached_property
    def _grad_logits_DU(self) -> Tensor:
        num_pairs, num_tokens = len(self.input_PH), len(self._grad_DH)
        return self._grad_DH.new_empty((num_tokens, aligned(num_pairs)), dtype=E5M2)

    def logits(self, chunk: slice) -> Tensor:
        """As of `Head`."""
        input_CH = Scaled(values_MK=self.input_PH[chunk], scale=self._fp8.final_scale)
        return product(input_CH, self._fp8.head.forward, dtype=self._grad_DH.dtype)

    def grad_place(self, logits_CD: Tensor) -> Tensor:
        """As of `Head`."""
        return torch.empty_like(logits_CD, dtype=E5M2)

    def backward(self, chunk: slice, grad_CD: Tensor) -> None:
        """As of `Head`."""
        grad = Scaled(values_MK=grad_CD, scale=self._grad_scale)
        product(grad, self._fp8.head.backward, dtype=self._grad_DH.dtype, out=self.grad_PH[chunk])
        end = chunk.start + aligned(len(grad_CD))
        transpose(grad_CD, out_KU=self._grad_logits_DU[:, chunk.start : end])

    def weight_gradient(self) -> None:
        """As of `Head`."""
        grad = Scaled(values_MK=self._grad_logits_DU, scale=self._grad_scale)
        input_HU = Scaled(values_MK=transposed(self.input_PH), scale=self._fp8.final_scale)
        product(grad, input_HU, dtype=self._grad_DH.dtype, out=self._grad_DH)
        # The largest of all, and needed no more while the other gradients come.
        del self._grad_logits_DU
