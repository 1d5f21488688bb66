"""Step 20: the trainable weights of a draft, and their gradients, in flat buffers."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eagle3.draft import Draft
from eagle3.kernels.fp8 import E4M3, Scaled, factor_of, quantise_weight

#: Each weight starts at a multiple of this many elements, so that vector loads stay aligned in any dtype.
_ALIGNMENT = 64

#: Weights that read the same input: they lie side by side, and one product computes them together.
_QKV = tuple(f"midlayer.self_attn.{name}_proj.weight" for name in "qkv")
_GATE_UP = ("midlayer.mlp.gate_proj.weight", "midlayer.mlp.up_proj.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftWeights:
    """The weights of a draft, or their gradients, as the step by hand uses them: views of one flat buffer.

    Attributes:
        fc_HA: Fuses the captured states.
        token_WH: The half of queries, keys and values, stacked, that reads a token's embedding.
        state_WH: The half that reads a state.
        o_HX: The output projection of attention, X = Q * d.
        gate_up_2IH: Gate and up projections of the MLP, stacked.
        down_HI: Its down projection.
        head_DH: The head.
        input_norm_H: Norm of the embeddings.
        hidden_norm_H: Norm of the states that enter a step.
        post_norm_H: Norm behind attention.
        final_norm_H: Norm before the head.
    """

    fc_HA: Tensor
    token_WH: Tensor
    state_WH: Tensor
    o_HX: Tensor
    gate_up_2IH: Tensor
    down_HI: Tensor
    head_DH: Tensor
    input_norm_H: Tensor
    hidden_norm_H: Tensor
    post_norm_H: Tensor
    final_norm_H: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Weight:
    """A matrix in FP8, and the same transposed for gradients on their way back."""

    forward: Scaled
    backward: Scaled


class Fp8Weights:
    """The matrices of MLP and head in FP8, and what makes the states that enter them FP8 numbers.

    A norm's results are no larger than its largest weight times the root of their number. So their scale is known
    before they are, and scaled weights let the norm itself write them.

    Args:
        copies: Followed by `refresh_`.

    Attributes:
        gate_up: Gate and up projections, stacked.
        down: The down projection.
        head: The head.
        post_norm_H: Weight of the norm before the MLP over `post_scale`.
        final_norm_H: Weight of the norm before the head over `final_scale`.
        post_scale: Scalar.
        final_scale: Scalar.
    """

    def __init__(self, copies: DraftWeights) -> None:
        self._matrices = (copies.gate_up_2IH, copies.down_HI, copies.head_DH)
        self._norms = (copies.post_norm_H, copies.final_norm_H)
        # Apart from each other: products want their scales at aligned addresses.
        self._scales = torch.ones((5, 4), device=copies.head_DH.device)[:, 0]
        self.gate_up, self.down, self.head = map(self._allocate, self._matrices, self._scales)
        self.post_norm_H, self.final_norm_H = map(torch.empty_like, self._norms)
        self.post_scale, self.final_scale = self._scales[3:]

    @staticmethod
    def _allocate(weight: Tensor, scale: Tensor) -> Fp8Weight:
        forward, backward = (weight.new_empty(shape, dtype=E4M3) for shape in (weight.shape, weight.shape[::-1]))
        return Fp8Weight(
            forward=Scaled(values_MK=forward, scale=scale), backward=Scaled(values_MK=backward, scale=scale)
        )

    def refresh_(self) -> None:
        """Follows the copies, without a synchronisation."""
        peaks = [torch.linalg.vector_norm(weight, ord=math.inf) for weight in self._matrices + self._norms]
        bounds = [peak * len(norm) ** 0.5 for peak, norm in zip(peaks[3:], self._norms, strict=True)]
        factors = factor_of(torch.stack((*peaks[:3], *bounds)))
        self._scales.copy_(1 / factors)
        for weight, factor, out in zip(self._matrices, factors, (self.gate_up, self.down, self.head), strict=False):
            quantise_weight(weight, factor, out_NK=out.forward.values_MK, transposed_KN=out.backward.values_MK)
        for norm_H, factor, out_H in zip(self._norms, factors[3:], (self.post_norm_H, self.final_norm_H), strict=True):
            torch.mul(norm_H, factor, out=out_H)


class FlatWeights:
    """Master weights, their copies in the compute dtype and their gradients, each in one buffer.

    `grad` belongs to one batch and has the dtype of the copies; `summed_grad` is that of an optimizer step, in the
    dtype of the masters where it is a sum over several batches.

    The draft's parameters become views of `master`; loading into them and saving them goes on as before.

    Args:
        draft: Its trainable parameters move into the buffers.
        dtype: Of the copies and the gradients.
        fp8: Whether to keep those of MLP and head in FP8 as well.
    """

    def __init__(self, draft: Draft, *, dtype: torch.dtype, fp8: bool = False) -> None:
        self.parameters = {name: p for name, p in draft.named_parameters() if p.requires_grad}
        self._places = self._lay_out()
        first = next(iter(self.parameters.values()))
        size = max(place + self.parameters[name].numel() for name, place in self._places.items())
        size += -size % _ALIGNMENT
        self.master = torch.zeros(size, dtype=first.dtype, device=first.device)
        self.copy = torch.zeros(size, dtype=dtype, device=first.device)
        self.grad = torch.zeros(size, dtype=dtype, device=first.device)
        for name, parameter in self.parameters.items():
            view = self.view(self.master, name)
            view.copy_(parameter.detach())
            parameter.data = view
        self.copies, self.grads = self._views(self.copy), self._views(self.grad)
        self.fp8 = Fp8Weights(self.copies) if fp8 else None
        self._sum: Tensor | None = None
        self.summed_grad = self.grad
        self.refresh_()

    def collect_(self, *, is_first: bool, is_last: bool) -> None:
        """Adds the gradients of one of several batches to `summed_grad`, which of a single batch are they themselves.

        Args:
            is_first: Whether it is the first batch of an optimizer step.
            is_last: Whether it is the last.
        """
        if is_first and is_last:
            self.summed_grad = self.grad
            return
        if self._sum is None:
            self._sum = torch.zeros_like(self.master)
        if is_first:
            self._sum.zero_()
        self._sum += self.grad
        self.summed_grad = self._sum

    def _lay_out(self) -> dict[str, int]:
        """The first element of each weight: vectors, then matrices, those first whose gradients are finished last."""
        vectors = [name for name, parameter in self.parameters.items() if parameter.dim() <= 1]
        matrices = [*_QKV, "fc.weight", *_GATE_UP]
        others = [name for name in self.parameters if name not in {*vectors, *matrices}]
        goes_on = {*_QKV[1:], *_GATE_UP[1:]}
        places, end = {}, 0
        for name in [*vectors, *matrices, *others]:
            if name not in goes_on:
                end += -end % _ALIGNMENT
            places[name] = end
            end += self.parameters[name].numel()
        return places

    def parts(self, buffer: Tensor) -> tuple[Tensor, ...]:
        """A buffer of gradients in the order in which they are finished.

        Returns:
            The part of the head; of the MLP's gate and up projections; of its down projection and attention's output;
            of the fusion of captured states; and all others.
        """
        names = ("lm_head.weight", _GATE_UP[0], "midlayer.self_attn.o_proj.weight", "fc.weight")
        head, gate_up, behind, fc = (self._places[name] for name in names)
        return buffer[head:], buffer[gate_up:behind], buffer[behind:head], buffer[fc:gate_up], buffer[:fc]

    @property
    def start_of_matrices(self) -> int:
        """The first element behind the vectors."""
        return self._places[_QKV[0]]

    def refresh_(self) -> None:
        """Brings the copies up to date after something else than the optimizer changed the parameters."""
        self.copy.copy_(self.master)
        self.quantise_()

    def quantise_(self) -> None:
        """Brings what there is in FP8 up to date with the copies."""
        if self.fp8 is not None:
            self.fp8.refresh_()

    def view(self, buffer: Tensor, name: str) -> Tensor:
        """One weight's part of a buffer, in its shape."""
        parameter, place = self.parameters[name], self._places[name]
        return buffer[place : place + parameter.numel()].view(parameter.shape)

    def _stacked(self, buffer: Tensor, names: tuple[str, ...]) -> Tensor:
        """Weights that lie side by side, as one matrix: (rows of all, columns)."""
        start = self._places[names[0]]
        num_rows = sum(self.parameters[part].shape[0] for part in names)
        num_columns = self.parameters[names[0]].shape[1]
        return buffer[start : start + num_rows * num_columns].view(num_rows, num_columns)

    def _views(self, buffer: Tensor) -> DraftWeights:
        qkv_W2H = self._stacked(buffer, _QKV)
        width = qkv_W2H.shape[1] // 2
        return DraftWeights(
            fc_HA=self.view(buffer, "fc.weight"),
            token_WH=qkv_W2H[:, :width],
            state_WH=qkv_W2H[:, width:],
            o_HX=self.view(buffer, "midlayer.self_attn.o_proj.weight"),
            gate_up_2IH=self._stacked(buffer, _GATE_UP),
            down_HI=self.view(buffer, "midlayer.mlp.down_proj.weight"),
            head_DH=self.view(buffer, "lm_head.weight"),
            input_norm_H=self.view(buffer, "midlayer.input_layernorm.weight"),
            hidden_norm_H=self.view(buffer, "midlayer.hidden_norm.weight"),
            post_norm_H=self.view(buffer, "midlayer.post_attention_layernorm.weight"),
            final_norm_H=self.view(buffer, "norm.weight"),
        )
