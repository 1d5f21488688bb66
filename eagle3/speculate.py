"""Step 34: writes text with target and draft together: the draft proposes a chain of tokens, the target judges it.

Plain transformers, one sequence, keys and values of both models cached. What comes out is what the target alone would
write: the same tokens when it is greedy, the same distribution when it is sampled.

Shape suffixes: R rows of one call, N cached rows, V target vocabulary, D draft vocabulary, H draft hidden, A = 3E
captured states, E target hidden, Q query heads, K key and value heads, d head dimension.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from eagle3.draft import Draft
from eagle3.errors import TargetError
from eagle3.target import FrozenTarget

#: Kinds of layers that keep keys of single tokens.
_ATTENTION = {"attention", "full_attention", "sliding_attention", "chunked_attention"}

#: Draws an index from probabilities (n,) that sum to 1.
Choose = Callable[[Tensor], int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Proposal:
    """One drafted token: its id in the target's vocabulary, and the distribution (V,) it was drawn from, if any."""

    token: int
    q_V: Tensor | None


class Rule(Protocol):
    """How tokens are drawn from logits, and which drafted tokens stand."""

    def propose(self, logits_D: Tensor) -> tuple[int, Tensor | None]:
        """Draws a token of the draft vocabulary; with it comes the distribution (D,), if it was drawn from one."""
        ...

    def judge(self, proposals: Sequence[Proposal], logits_RV: Tensor) -> tuple[int, int]:
        """Says how many of the proposals stand, and which token the target writes behind them.

        Args:
            proposals: R - 1 drafted tokens in order; none to draw a token from the target alone.
            logits_RV: The target's logits at each place of a proposal, and at the one behind the last.
        """
        ...


class Greedy:
    """The likeliest token; of equal ones that with the lowest id."""

    def propose(self, logits_D: Tensor) -> tuple[int, None]:
        """Takes the draft's likeliest token."""
        return int(logits_D.argmax()), None

    def judge(self, proposals: Sequence[Proposal], logits_RV: Tensor) -> tuple[int, int]:
        """Keeps what the target would have taken itself."""
        wanted = logits_RV.argmax(dim=-1).tolist()
        for place, proposal in enumerate(proposals):
            if proposal.token != wanted[place]:
                return place, wanted[place]
        return len(proposals), wanted[len(proposals)]


class Sampled:
    """Draws from the distribution at a temperature, by the rejection rule of speculative sampling.

    A token x that the draft drew from q stands with probability min(1, p(x) / q(x)), p being the target's
    distribution; if it falls, the target draws from max(p - q, 0), normalised. What is written is then distributed as
    p alone (Leviathan et al., arXiv 2211.17192, appendix A.1).

    Args:
        temperature: Above 0; logits are divided by it.
        choose: Draws an index; called once for each decision.
    """

    def __init__(self, *, temperature: float, choose: Choose) -> None:
        assert temperature > 0
        self.temperature = temperature
        self.choose = choose

    def propose(self, logits_D: Tensor) -> tuple[int, Tensor]:
        """Draws from the draft's distribution."""
        q_D = self._probabilities(logits_D)
        return self.choose(q_D), q_D

    def judge(self, proposals: Sequence[Proposal], logits_RV: Tensor) -> tuple[int, int]:
        """Applies the rejection rule, place by place."""
        p_RV = self._probabilities(logits_RV)
        for place, proposal in enumerate(proposals):
            q_V, p_V = proposal.q_V, p_RV[place]
            assert q_V is not None
            stands = (p_V[proposal.token] / q_V[proposal.token]).clamp(max=1)
            if self.choose(torch.stack((1 - stands, stands))) == 0:
                rest_V = (p_V - q_V).clamp(min=0)
                # Where p and q differ by rounding alone, nothing may be left.
                return place, self.choose(rest_V / rest_V.sum() if rest_V.any() else p_V)
        return len(proposals), self.choose(p_RV[len(proposals)])

    def _probabilities(self, logits: Tensor) -> Tensor:
        return (logits.to(torch.promote_types(torch.float32, logits.dtype)) / self.temperature).softmax(dim=-1)


def random_choice(generator: torch.Generator) -> Choose:
    """Draws with random numbers of a generator, which lies on the device of the probabilities."""

    def choose(probabilities: Tensor) -> int:
        return int(torch.multinomial(probabilities, 1, generator=generator))

    return choose


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How far a chain and a text go.

    Attributes:
        num_drafted: Tokens that the draft proposes for one pass of the target, at least 1.
        max_new_tokens: Tokens behind the prompt, at least 1.
        stop_ids: A token that ends the text, and is its last one.
    """

    num_drafted: int
    max_new_tokens: int
    stop_ids: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A text, and how it came about.

    Attributes:
        ids: The new tokens.
        drafted: For each pass of the target behind the prompt's, how many tokens were proposed for it.
        accepted: How many of them are in the text.
    """

    ids: tuple[int, ...]
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]

    @property
    def num_passes(self) -> int:
        """Passes of the target, that over the prompt included."""
        return 1 + len(self.drafted)


@torch.inference_mode()
def write_with_draft(
    target: FrozenTarget, draft: Draft, prompt_ids: Sequence[int], *, rule: Rule, limits: Limits
) -> Written:
    """Continues a prompt with both models.

    Args:
        target: In any dtype, on one device.
        draft: Made for this target, on the same device.
        prompt_ids: At least one token.
        rule: `Greedy` or `Sampled`.
        limits: Where to stop.

    Returns:
        At most `max_new_tokens` tokens, the last of which may be a stop token.

    Raises:
        TargetError: The target has layers other than attention, which could not take tokens back.
    """
    reader = _TargetReader(target)
    chain = DraftChain(draft, capacity=len(prompt_ids) + limits.max_new_tokens + limits.num_drafted)
    aux_RA, logits_RV = reader.read(prompt_ids, num_logits=1)
    _, token = rule.judge((), logits_RV)
    written, drafted, accepted = [token], [], []
    known_ids = [*prompt_ids[1:], token]
    while len(written) < limits.max_new_tokens and written[-1] not in limits.stop_ids:
        # One token less than there is room for: the target always adds one.
        room = min(limits.num_drafted, limits.max_new_tokens - len(written) - 1)
        proposals = chain.propose(known_ids, aux_RA, rule=rule, num_tokens=room, stop_ids=limits.stop_ids)
        tokens = [proposal.token for proposal in proposals]
        aux_RA, logits_RV = reader.read([written[-1], *tokens], num_logits=len(tokens) + 1)
        num_kept, token = rule.judge(proposals, logits_RV)
        reader.forget(len(tokens) - num_kept)
        aux_RA, known_ids = aux_RA[: num_kept + 1], [*tokens[:num_kept], token]
        # A drafted stop token is always the last of its chain, so if it stands, all stand.
        stopped = num_kept > 0 and tokens[num_kept - 1] in limits.stop_ids
        written += tokens[:num_kept] if stopped else known_ids
        drafted.append(len(tokens))
        accepted.append(num_kept)
    return Written(ids=tuple(written), drafted=tuple(drafted), accepted=tuple(accepted))


class _TargetReader:
    """The target with its cache."""

    def __init__(self, target: FrozenTarget) -> None:
        self.target = target
        kinds = set(getattr(target.config, "layer_types", None) or ()) - _ATTENTION
        if kinds:
            raise TargetError(
                f"{type(target.model).__name__} has layers of the kind {', '.join(sorted(kinds))}, which cannot take a "
                "rejected token back, so it writes nothing with a draft here. Export the draft and measure it in an "
                "engine."
            )
        # Without the model's config all layers keep all keys. One with a sliding window drops keys for good, and could
        # not take rejected tokens back.
        self.cache = DynamicCache()

    def read(self, token_ids: Sequence[int], *, num_logits: int) -> tuple[Tensor, Tensor]:
        """Reads on: captured states (R, A) of all tokens, logits (num_logits, V) of the last ones."""
        head_VE = self.target.head_VE
        features = self.target.read_on(torch.tensor([token_ids], device=head_VE.device), cache=self.cache)
        return features.aux_BTA[0], features.hidden_BTE[0, -num_logits:] @ head_VE.T

    def forget(self, num_tokens: int) -> None:
        """Takes the last tokens back."""
        if num_tokens:
            self.cache.crop(-num_tokens)


class DraftChain:
    """The draft with its cache: one row for each known token, behind them the rows of the chain under way.

    Args:
        draft: The draft, in evaluation mode.
        capacity: Rows of the cache: the most tokens of a text, and of a chain behind it.
    """

    def __init__(self, draft: Draft, *, capacity: int) -> None:
        self.draft = draft
        config: Any = draft.config
        weight = draft.fc.weight
        shape = (capacity, config.num_key_value_heads, config.head_dim)
        self.k_NKd, self.v_NKd = weight.new_empty(shape), weight.new_empty(shape)
        self.num_known = 0
        self.target_ids_D = draft.target_ids()

    def propose(
        self, known_ids: Sequence[int], aux_RA: Tensor, *, rule: Rule, num_tokens: int, stop_ids: frozenset[int]
    ) -> list[Proposal]:
        """Takes in the tokens that are known since the last chain, and drafts the next ones.

        Args:
            known_ids: R tokens, each the one behind that whose states stand in its row of `aux_RA`.
            aux_RA: The target's captured states.
            rule: Draws tokens.
            num_tokens: Most tokens to draft; fewer if one of them ends the text.
            stop_ids: Tokens that end the text.

        Returns:
            A proposal for each token that is drafted.
        """
        draft = self.draft
        states_RH = draft.fuse(aux_RA.to(draft.fc.weight.dtype))
        state_1H = self._step(known_ids, states_RH, start=self.num_known)
        self.num_known += len(known_ids)
        proposals: list[Proposal] = []
        while len(proposals) < num_tokens:
            if proposals:
                start = self.num_known + len(proposals) - 1
                state_1H = self._step([proposals[-1].token], state_1H, start=start)
            index, q_D = rule.propose(draft.lm_head(draft.head_states(state_1H[0])))
            proposals.append(Proposal(token=int(self.target_ids_D[index]), q_V=self._over_target(q_D)))
            if proposals[-1].token in stop_ids:
                break
        return proposals

    def _over_target(self, q_D: Tensor | None) -> Tensor | None:
        if q_D is None:
            return None
        q_V = q_D.new_zeros(self.draft.config.vocab_size)
        q_V[self.target_ids_D] = q_D
        return q_V

    def _step(self, token_ids: Sequence[int], states_RH: Tensor, *, start: int) -> Tensor:
        """Keeps the keys of rows from `start` on; the next state (1, H) of the last, which sees all that are kept."""
        draft, end = self.draft, start + len(token_ids)
        device = states_RH.device
        positions_R = torch.arange(start, end, device=device)
        inputs_Ru = draft.step_inputs(torch.tensor(token_ids, device=device), states_RH)
        self.k_NKd[start:end], self.v_NKd[start:end] = draft.keys_values(inputs_Ru, positions_R, length=len(self.k_NKd))
        attended_Q1d = functional.scaled_dot_product_attention(
            draft.queries(inputs_Ru[-1:], positions_R[-1:], length=len(self.k_NKd)).transpose(0, 1),
            self.k_NKd[:end].transpose(0, 1),
            self.v_NKd[:end].transpose(0, 1),
            enable_gqa=True,
        )
        return draft.next_states(states_RH[-1:], attended_Q1d.transpose(0, 1))
