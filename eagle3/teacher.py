"""Step 6: derives what the target teaches from its last hidden states, once for each token that supervises.

Shape suffixes: M teacher rows, V target vocabulary, D draft vocabulary, E target hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """What the target says at each teacher row.

    Attributes:
        logits_MD: The target's logits of the draft vocabulary, in the dtype of the hidden states.
        argmax_M: int64, the target's greedy token over its full vocabulary; of equal logits the lowest id.
        in_vocab_M: bool, whether that token lies in the draft vocabulary. Only such rows carry loss.
        mass_M: The share of the target's probability that lies on the draft vocabulary, in float32 or better; None
            unless asked for.
    """

    logits_MD: Tensor
    argmax_M: Tensor
    in_vocab_M: Tensor
    mass_M: Tensor | None = None


@torch.no_grad()
def teach(
    hidden_ME: Tensor, head_VE: Tensor, draft_ids_D: Tensor, *, with_mass: bool = False, chunk_size: int = 1024
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
    # What the target says is computed as the target itself does, whatever the draft computes in.
    with torch.autocast(hidden_ME.device.type, enabled=False):
        return _teach(hidden_ME, head_VE, draft_ids_D, with_mass=with_mass, chunk_size=chunk_size)


def _teach(hidden_ME: Tensor, head_VE: Tensor, draft_ids_D: Tensor, *, with_mass: bool, chunk_size: int) -> Teacher:
    num_rows = len(hidden_ME)
    logits_MD = hidden_ME.new_empty((num_rows, len(draft_ids_D)))
    argmax_M = draft_ids_D.new_empty(num_rows)
    precise = torch.promote_types(torch.float32, hidden_ME.dtype)
    mass_M = hidden_ME.new_empty(num_rows if with_mass else 0, dtype=precise)
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
