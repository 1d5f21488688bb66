"""Tests for `eagle3.speculate`: what is written is the target's, and the caches hold what a fresh start would."""

# Expected values stand on the left.

import itertools
from collections import defaultdict

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from eagle3.blueprint import draft_config
from eagle3.config import DraftConfig
from eagle3.draft import Draft
from eagle3.errors import TargetError
from eagle3.speculate import Greedy, Limits, Proposal, Sampled, random_choice, write_with_draft
from eagle3.target import FrozenTarget
from eagle3.unroll import TrainingTimeTest, plan_rows


def make_pair(*, vocab_size=13, num_draft=9, seed=0, **options):
    """A random target with sharp opinions, and a random draft of it, in float64."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
        max_position_embeddings=256,
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    target = FrozenTarget(LlamaForCausalLM(config).double(), tokenizer=tokenizer)
    draft = Draft(draft_config(target.config, draft_vocab_size=num_draft, options=DraftConfig(**options))).double()
    ids = torch.randperm(vocab_size)[:num_draft].sort().values
    draft.init_from_target_(embedding_VE=target.embedding_VE, head_VE=target.head_VE, draft_ids_D=ids)
    with torch.no_grad():
        draft.fc.weight.copy_(torch.eye(*draft.fc.weight.shape).roll(32, dims=1) + 0.1 * draft.fc.weight)
    return target, draft


def limits(*, num_drafted=4, max_new_tokens=24, stop_ids=()):
    return Limits(num_drafted=num_drafted, max_new_tokens=max_new_tokens, stop_ids=frozenset(stop_ids))


def generated(target, prompt, *, max_new_tokens=24, stop_ids=()):
    """What transformers alone writes."""
    ids = torch.tensor([prompt])
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(stop_ids) or None, pad_token_id=0
    )
    output = target.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return tuple(output[0, len(prompt) :].tolist())


@pytest.mark.parametrize("num_drafted", [1, 2, 6])
@pytest.mark.parametrize(
    "options", [{}, {"norm_before_residual": True, "fc_norm": True, "norm_output": True}, {"hidden_size": 8}]
)
def test_greedy_text_is_the_targets_token_by_token(num_drafted, options):
    num_accepted = 0
    for seed in range(6):
        target, draft = make_pair(seed=seed, **options)
        prompt = [seed, 1, 5, 2, 12][: 1 + seed % 5]
        written = write_with_draft(target, draft, prompt, rule=Greedy(), limits=limits(num_drafted=num_drafted))
        assert generated(target, prompt) == written.ids
        assert 24 == written.num_passes + sum(written.accepted)
        num_accepted += sum(written.accepted)
    # Some proposals stood, so keys of both models were kept and taken back.
    assert num_accepted > 0


def test_a_target_with_a_sliding_window_takes_rejected_tokens_back_too():
    """Its own cache would have dropped for good what a rejected token pushed out of the window."""
    plain, draft = make_pair()
    sizes = {name: getattr(plain.config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    heads = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.4}
    window = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
    config = Qwen2Config(**sizes, **heads, **window, eos_token_id=None, bos_token_id=None)
    assert {"full_attention", "sliding_attention"} == set(config.layer_types)
    target = FrozenTarget(Qwen2ForCausalLM(config).double(), tokenizer=plain.tokenizer)
    written = write_with_draft(target, draft, [3, 1, 5], rule=Greedy(), limits=limits())
    assert generated(target, [3, 1, 5]) == written.ids
    assert sum(written.accepted) < sum(written.drafted)


class Told(Greedy):
    """Proposes what it was told instead of what the draft says."""

    def __init__(self, tokens):
        self.tokens = iter(tokens)

    def propose(self, logits_D):
        return next(self.tokens), None


def test_right_proposals_all_stand_and_each_pass_adds_one_token_of_the_targets():
    target, draft = make_pair(num_draft=13)
    answer = generated(target, [3, 4], max_new_tokens=11)
    proposals = [*answer[1:5], *answer[6:10]]
    written = write_with_draft(target, draft, [3, 4], rule=Told(proposals), limits=limits(max_new_tokens=11))
    assert answer == written.ids
    assert ((4, 4), (4, 4)) == (written.drafted, written.accepted)
    assert 3 == written.num_passes


def test_wrong_proposals_cost_passes_and_change_nothing():
    target, draft = make_pair(num_draft=13)
    answer = generated(target, [3, 4], max_new_tokens=5)
    wrong = [(token + 1) % 13 for token in answer[1:] for _ in range(2)]
    written = write_with_draft(target, draft, [3, 4], rule=Told(wrong), limits=limits(num_drafted=2, max_new_tokens=5))
    assert answer == written.ids
    # The last pass has room for the target's own token only.
    assert ((2, 2, 1, 0), (0, 0, 0, 0)) == (written.drafted, written.accepted)


@pytest.mark.parametrize("place", range(1, 9))
def test_a_stop_token_is_the_last_one_wherever_it_comes(place):
    """Drafted and accepted, written by the target behind a chain, or the first of all."""
    target, draft = make_pair(num_draft=13, seed=3)
    answer = generated(target, [7], max_new_tokens=12)
    stop = answer[place - 1]
    expected = generated(target, [7], max_new_tokens=12, stop_ids=[stop])
    for rule in (Greedy(), Told([*answer[1:5], *answer[6:]])):
        written = write_with_draft(target, draft, [7], rule=rule, limits=limits(max_new_tokens=12, stop_ids=[stop]))
        assert expected == written.ids
        assert sum(written.accepted) + written.num_passes in (len(expected), len(expected) + 1)


class Recorded(Greedy):
    """Keeps the logits that it draws from."""

    def __init__(self):
        self.logits = []

    def propose(self, logits_D):
        self.logits.append(logits_D)
        return super().propose(logits_D)


@pytest.mark.parametrize("options", [{}, {"norm_before_residual": True, "norm_output": True, "norm_before_fc": True}])
def test_a_chain_proposes_what_the_training_time_test_learns(options):
    """Rows, tokens, positions and states of decoding are those of training: each pass keeps as many as its row hits.

    And up to the first miss its logits are those of its row.
    """
    num_steps, num_hits = 4, 0
    for seed in range(5):
        target, draft = make_pair(seed=seed, **options)
        prompt, rule = [1, 2, 3], Recorded()
        written = write_with_draft(target, draft, prompt, rule=rule, limits=limits(num_drafted=num_steps))
        ids_BT = torch.tensor([[*prompt, *written.ids]])
        plan = plan_rows(torch.ones_like(ids_BT), num_steps)
        unroll = TrainingTimeTest(draft, num_steps=num_steps)
        states_SNH = unroll._unroll(ids_BT, target.features(ids_BT).aux_BTA, plan)
        logits_SND = draft.lm_head(states_SNH)
        proposed_SN = draft.target_ids()[logits_SND.argmax(dim=-1)]
        row, drawn = len(prompt) - 1, iter(rule.logits)
        for num_drafted, num_accepted in zip(written.drafted, written.accepted, strict=True):
            true = ids_BT[0, row + 2 : row + 2 + num_drafted]
            hits = (proposed_SN[:num_drafted, row] == true).long().cumprod(dim=0)
            assert int(hits.sum()) == num_accepted
            for step, logits_D in enumerate(itertools.islice(drawn, num_drafted)):
                assert step > num_accepted or torch.allclose(logits_SND[step, row], logits_D, rtol=0, atol=1e-9)
            num_hits += num_accepted
            row += num_accepted + 1
    assert num_hits > 0


def test_a_target_that_cannot_take_tokens_back_is_refused():
    _, draft = make_pair()
    config = FalconH1Config(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=8,
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    target = FrozenTarget(FalconH1ForCausalLM(config), tokenizer=tokenizer)
    with pytest.raises(
        TargetError, match=r"^FalconH1ForCausalLM has layers of the kind hybrid, which cannot take a rej"
    ):
        write_with_draft(target, draft, [1, 2], rule=Greedy(), limits=limits())


class Enumerated:
    """Visits every path of a program that makes random choices, one call of `run` for each, with its probability."""

    def __init__(self):
        self.path, self.place, self.probability = [], 0, 1.0

    def __call__(self, probabilities):
        assert sum(probabilities.tolist()) == pytest.approx(1)
        if self.place == len(self.path):
            self.path.append([0, probabilities.tolist()])
        index, known = self.path[self.place]
        assert known == probabilities.tolist()
        self.place += 1
        self.probability *= known[index]
        return index

    def paths(self, run):
        while True:
            self.place, self.probability = 0, 1.0
            # A path that cannot happen need not be walked to its end, but the program does not know that.
            yield run(), self.probability
            while self.path and self.path[-1][0] == len(self.path[-1][1]) - 1:
                self.path.pop()
            if not self.path:
                return
            self.path[-1][0] += 1


@pytest.mark.parametrize("num_draft", [2, 3])
def test_sampled_text_has_exactly_the_targets_distribution(num_draft):
    """Every path of choices is walked: draft's draws, acceptances, rests. The sum over paths is the target's."""
    target, draft = make_pair(vocab_size=3, num_draft=num_draft, seed=1)
    temperature, prompt, length = 0.7, [1, 0], 3
    chooser = Enumerated()
    rule = Sampled(temperature=temperature, choose=chooser)
    found, accepted = defaultdict(float), 0.0
    settings = limits(num_drafted=2, max_new_tokens=length)
    for written, probability in chooser.paths(
        lambda: write_with_draft(target, draft, prompt, rule=rule, limits=settings)
    ):
        found[written.ids] += probability
        accepted += probability * sum(written.accepted)
    assert 1 == pytest.approx(sum(found.values()), abs=1e-12)
    for ids in itertools.product(range(3), repeat=length):
        logits = target.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / temperature).softmax(dim=-1)[range(length), ids].prod().item()
        assert expected == pytest.approx(found[ids], abs=1e-12), ids
    # Were nothing ever accepted, the rule would be right for a dull reason.
    assert accepted > 0.2


def test_a_seed_decides_a_sampled_text():
    target, draft = make_pair()

    def text(seed):
        rule = Sampled(temperature=1.5, choose=random_choice(torch.Generator().manual_seed(seed)))
        return write_with_draft(target, draft, [1, 2], rule=rule, limits=limits()).ids

    assert text(0) == text(0)
    assert text(0) != text(1)


def test_where_draft_and_target_agree_a_token_that_falls_is_drawn_from_the_target():
    """Of p - q nothing is left then, as where the two differ by rounding alone."""
    logits_RV, drawn = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), []
    rule = Sampled(temperature=1.0, choose=lambda probabilities: drawn.append(probabilities) or 0)
    _, p_V = rule.propose(logits_RV[0])
    assert (0, 0) == rule.judge([Proposal(token=1, q_V=p_V)], logits_RV)
    assert torch.equal(p_V, drawn[-1])


def test_probabilities_are_made_in_float32_of_logits_of_fewer_bits():
    rule = Sampled(temperature=0.7, choose=lambda probabilities: int(probabilities.argmax()))
    logits_D = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    _, q_D = rule.propose(logits_D)
    assert torch.equal((logits_D.float() / 0.7).softmax(dim=-1), q_D)
