"""Step 16: derives what the target teaches from its last hidden states, once for each token that supervises.

Shape suffixes: M teacher rows, V target vocabulary, D draft vocabulary, E target hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eagle3.kernels.soft_ce import row_max, row_stats

#: Rows of full-vocabulary logits that exist at a time, and as many of the logits outside the draft vocabulary.
CHUNK, _CHUNK_OF_OTHERS = 1024, 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """What the target says at each teacher row.

    Attributes:
        logits_MD: The target's logits of the draft vocabulary, in the dtype of the hidden states.
        argmax_M: int64, the target's greedy token over its full vocabulary; of equal logits the lowest id.
        in_vocab_M: bool, whether that token lies in the draft vocabulary. Only such rows carry loss.
        mass_M: The share of the target's probability that lies on the draft vocabulary, in float32 or better; None
            unless asked for.
        lse_M: The log-sum-exp of `logits_MD`, float32 or better, where it was computed on the way.
    """

    logits_MD: Tensor
    argmax_M: Tensor
    in_vocab_M: Tensor
    mass_M: Tensor | None = None
    lse_M: Tensor | None = None


@torch.no_grad()
def teach(
    hidden_ME: Tensor, head_VE: Tensor, draft_ids_D: Tensor, *, with_mass: bool = False, chunk_size: int = CHUNK
) -> Teacher:
    """Runs the target's head and keeps of its logits only the draft's rows and the argmax.

    Args:
        hidden_ME: The target's last hidden states, after its final norm.
        head_VE: The target's head.
        draft_ids_D: int64, the target's token id of each draft token.
        with_mass: Also sum up the full distribution, which the losses of the acceptance rate need.
        chunk_size: Rows of full-vocabulary logits that exist at a time.

    Returns:
        The teacher, on the device of the hidden states and outside any graph.
    """
    num_rows = len(hidden_ME)
    logits_MD = hidden_ME.new_empty((num_rows, len(draft_ids_D)))
    argmax_M = draft_ids_D.new_empty(num_rows)
    precise = torch.promote_types(torch.float32, hidden_ME.dtype)
    mass_M = hidden_ME.new_empty(num_rows if with_mass else 0, dtype=precise)
    # What the target says is computed as the target itself does, whatever the draft computes in.
    with torch.autocast(hidden_ME.device.type, enabled=False):
        for start in range(0, num_rows, chunk_size):
            chunk = slice(start, start + chunk_size)
            logits_CV = hidden_ME[chunk] @ head_VE.T
            logits_MD[chunk] = logits_CV[:, draft_ids_D]
            argmax_M[chunk] = logits_CV.argmax(dim=-1)
            if with_mass:
                of_draft_C = logits_MD[chunk].to(precise).logsumexp(dim=-1)
                mass_M[chunk] = (of_draft_C - logits_CV.to(precise).logsumexp(dim=-1)).exp()
    in_draft_V = torch.zeros(len(head_VE), dtype=torch.bool, device=argmax_M.device)
    in_draft_V[draft_ids_D] = True
    return Teacher(
        logits_MD=logits_MD,
        argmax_M=argmax_M,
        in_vocab_M=in_draft_V[argmax_M],
        mass_M=mass_M if with_mass else None,
    )


class TeacherHead:
    """The target's head with the draft's rows first, so that their logits are one product and the rest only a maximum.

    Args:
        head_VE: The target's head; copied, in another order.
        draft_ids_D: int64, ascending, the target's token id of each draft token.
    """

    def __init__(self, head_VE: Tensor, draft_ids_D: Tensor) -> None:
        device = head_VE.device
        outside_V = torch.ones(len(head_VE), dtype=torch.bool, device=device)
        outside_V[draft_ids_D.to(device)] = False
        self._draft_ids_D = draft_ids_D.to(device)
        self._other_ids = outside_V.nonzero().squeeze(1)
        self._draft_DE = head_VE[self._draft_ids_D]
        self._others_E = head_VE[self._other_ids]
        self._in_draft_V = ~outside_V

    @torch.no_grad()
    def teach(self, hidden_ME: Tensor) -> Teacher:
        """Like the function `teach`, on a GPU without a synchronisation."""
        logits_MD = hidden_ME @ self._draft_DE.T
        stats = row_stats(logits_MD)
        argmax_M = self._draft_ids_D[stats.argmax_M]
        in_vocab_M = torch.ones_like(argmax_M, dtype=torch.bool)
        for start in range(0, len(hidden_ME) if len(self._other_ids) else 0, _CHUNK_OF_OTHERS):
            chunk = slice(start, start + _CHUNK_OF_OTHERS)
            max_C, argmax_C = row_max(hidden_ME[chunk] @ self._others_E.T)
            other_ids = self._other_ids[argmax_C]
            # Of equal logits the lowest id counts, wherever it stands.
            is_other = max_C > stats.max_M[chunk]
            is_other |= (max_C == stats.max_M[chunk]) & (other_ids < argmax_M[chunk])
            in_vocab_M[chunk] = ~is_other
            argmax_M[chunk] = torch.where(is_other, other_ids, argmax_M[chunk])
        return Teacher(logits_MD=logits_MD, argmax_M=argmax_M, in_vocab_M=in_vocab_M, lse_M=stats.lse_M)

    @torch.no_grad()
    def teach_known(self, hidden_ME: Tensor, argmax_M: Tensor) -> Teacher:
        """The same where the target's greedy tokens (M,) int64 are known, as from a cache: only the draft's logits."""
        return Teacher(logits_MD=hidden_ME @ self._draft_DE.T, argmax_M=argmax_M, in_vocab_M=self._in_draft_V[argmax_M])
