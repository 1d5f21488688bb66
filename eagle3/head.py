"""Step 24: the products of the head over all pairs of a batch, forward and back, in the copies' dtype or in FP8.

Shape suffixes: P pairs, C pairs of a chunk, U = P rounded up, H draft hidden, D draft vocabulary.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from eagle3.flat import FlatWeights, Fp8Weights
from eagle3.kernels.fp8 import E4M3, E5M2, LARGEST_E5M2, Scaled, aligned, product, transpose, transposed


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
