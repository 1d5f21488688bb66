"""Step 5: what the frozen target hands to the draft, wherever it comes from.

Shape suffixes: B batch, T tokens, E target hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Features:
    """What the draft learns from, in the target's dtype, tensors that need no gradient.

    Attributes:
        aux_BTA: `(B, T, 3E)`, the three captured states of each token side by side, the lowest layer first.
        hidden_BTE: `(B, T, E)`, the state that the target's head reads, behind the final norm.
        argmax_BT: int64 `(B, T)`, the target's greedy next token where it is known without its head, else None.
    """

    aux_BTA: torch.Tensor
    hidden_BTE: torch.Tensor
    argmax_BT: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Features":
        """The same on another device; a tensor that is there already is not copied."""
        return Features(
            aux_BTA=self.aux_BTA.to(device, non_blocking=True),
            hidden_BTE=self.hidden_BTE.to(device, non_blocking=True),
            argmax_BT=None if self.argmax_BT is None else self.argmax_BT.to(device, non_blocking=True),
        )


#: Reads the states of examples from disk: given the examples that stand side by side in each row, and T.
FeatureSource = Callable[[Sequence[Sequence[int]], int], Features]
