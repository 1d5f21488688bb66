"""Tests for `eagle3.unroll`: the pruned unroll against the row-by-row reference."""

# Expected values stand on the left.

from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from eagle3.blueprint import draft_config
from eagle3.config import DraftConfig
from eagle3.draft import Draft
from eagle3.loss import SOFT_CROSS_ENTROPY, Objective
from eagle3.unroll import TrainingTimeTest, plan_rows
from eagle3_reference import Shape, reference

H, HEAD_DIM = 8, 4
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 2.0],
    "long_factor": [3.0, 8.0],
    "factor": 4.0,
    "original_max_position_embeddings": 3,
}
NORMS = ("norm_before_residual", "fc_norm", "norm_before_fc", "norm_output")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Case:
    draft: Draft
    batch: dict[str, torch.Tensor]
    num_steps: int


def make_case(mask, *, num_vocab=7, num_draft=4, num_steps=3, heads=(2, 1), seed=0, rope=None, **options) -> Case:
    """A float64 draft and batch with weights large enough that every path matters."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    config = draft_config(
        LlamaConfig(
            hidden_size=H,
            intermediate_size=10,
            num_attention_heads=heads[0],
            num_key_value_heads=heads[1],
            head_dim=HEAD_DIM,
            vocab_size=num_vocab,
            max_position_embeddings=3 if rope else 2048,
            rope_parameters=rope,
        ),
        draft_vocab_size=num_draft,
        options=DraftConfig(**options),
    )
    draft = Draft(config).double()
    ids = torch.randperm(num_vocab, generator=generator)[:num_draft].sort().values
    draft.init_from_target_(embedding_VE=normal(num_vocab, H), head_VE=normal(num_vocab, H), draft_ids_D=ids)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.copy_(0.5 * normal(*parameter.shape) + (parameter.dim() == 1))
    loss_mask = torch.tensor(mask, dtype=torch.bool)
    size = tuple(loss_mask.shape)
    batch = {
        "input_ids_BT": torch.randint(num_vocab, size, generator=generator),
        "loss_mask_BT": loss_mask,
        "aux_BTA": 2 * normal(*size, 3 * H),
        "hidden_BTE": normal(*size, H),
        "head_VE": normal(num_vocab, H),
    }
    return Case(draft, batch, num_steps)


def expected_of(case: Case, *, decay=0.8, objective=SOFT_CROSS_ENTROPY):
    """The reference's result, and its gradient of each trainable parameter."""
    weights = {name: tensor.detach().clone().double() for name, tensor in case.draft.state_dict().items()}
    trainable = [name for name, parameter in case.draft.named_parameters() if parameter.requires_grad]
    for name in trainable:
        weights[name].requires_grad_()
    config = case.draft.config
    heads = (config.num_attention_heads, config.num_key_value_heads, HEAD_DIM)
    norms = {name: getattr(config, name) for name in NORMS}
    shape = Shape(*heads, config.rms_norm_eps, 10000.0, **norms)
    batch = {name.rsplit("_", 1)[0]: tensor for name, tensor in case.batch.items()}
    loss = {"loss": objective.kind, "lk_decay": objective.lk_decay}
    result = reference(weights, shape, **batch, num_steps=case.num_steps, decay=decay, **loss)
    result.loss_sum = result.loss_sum + 0 * sum(weights[name].sum() for name in trainable)
    result.loss_sum.backward()
    return result, {name: weights[name].grad for name in trainable}


def check(case: Case, model=None, *, tolerance=1e-10):
    model = model or TrainingTimeTest(case.draft, num_steps=case.num_steps)
    expected, expected_grads = expected_of(case, objective=model.objective)
    case.draft.zero_grad()
    result = model(**case.batch)
    result.loss_sum.backward()
    torch.testing.assert_close(result.loss_sum.detach().double(), expected.loss_sum.detach(), rtol=tolerance, atol=0)
    assert expected.weight_sum == pytest.approx(result.weight_sum.item(), rel=tolerance)
    for name, parameter in case.draft.named_parameters():
        if parameter.requires_grad:
            # A gradient that cancels to nothing leaves only the rounding of its parts.
            scale = max(1e-4, expected_grads[name].abs().max().item())
            torch.testing.assert_close(
                parameter.grad.double(), expected_grads[name], rtol=0, atol=tolerance * scale, msg=name
            )
    for name in ("supervised", "hits", "chain_rows", "chain_hits"):
        assert getattr(expected, name) == getattr(result.counts, name).tolist(), name


@st.composite
def cases(draw):
    num_sequences, num_tokens = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    row = st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens)
    num_vocab = draw(st.integers(1, 9))
    options = {name: draw(st.booleans()) for name in ("norm_before_residual", "norm_output")}
    options |= dict.fromkeys([draw(st.sampled_from(["fc_norm", "norm_before_fc"]))], draw(st.booleans()))
    return make_case(
        draw(st.lists(row, min_size=num_sequences, max_size=num_sequences)),
        num_vocab=num_vocab,
        num_draft=draw(st.integers(1, num_vocab)),
        num_steps=draw(st.integers(1, 4)),
        heads=draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)])),
        seed=draw(st.integers(0, 1000)),
        hidden_size=draw(st.sampled_from([None, 4, 12])),
        **options,
    )


@st.composite
def packed_cases(draw):
    """One row of documents side by side, and their lengths; the last one may be padding."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    mask = draw(st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths)))
    case = make_case([mask], num_steps=draw(st.integers(1, 4)), seed=draw(st.integers(0, 1000)))
    return case, lengths


@settings(max_examples=40, deadline=None)
@given(cases())
@example(make_case([[True] * 6], num_vocab=5, num_draft=5))
@example(make_case([[True, False, False, True, False, True]], num_steps=4))
@example(make_case([[True, False]]))
@example(make_case([[True] * 5], norm_before_residual=True, fc_norm=True, norm_output=True, hidden_size=12))
def test_the_pruned_unroll_is_the_reference(case):
    """Loss, every gradient and all counts agree to 1e-10 in float64."""
    check(case)


@settings(max_examples=20, deadline=None)
@given(
    cases(),
    st.builds(Objective, kind=st.sampled_from(["lk_alpha", "lk_lambda"]), lk_decay=st.sampled_from([0.5, 3.0])),
)
@example(make_case([[True] * 6], num_vocab=5, num_draft=5), Objective(kind="lk_alpha"))
@example(make_case([[True] * 6], num_vocab=9, num_draft=3), Objective(kind="lk_lambda"))
def test_losses_of_the_acceptance_rate_are_the_reference(case, objective):
    check(case, TrainingTimeTest(case.draft, num_steps=case.num_steps, objective=objective))


def test_in_float32_the_unroll_stays_near_the_reference():
    case = make_case([[False, True, True, False, True, True, True]] * 2, num_steps=4)
    # The reference reads the rounded weights and inputs, so that only the arithmetic differs.
    case.draft.float()
    rounded = {name: t.float() if t.is_floating_point() else t for name, t in case.batch.items()}
    exact = {name: t.double() if t.is_floating_point() else t for name, t in rounded.items()}
    expected, expected_grads = expected_of(Case(case.draft, exact, case.num_steps))
    result = TrainingTimeTest(case.draft, num_steps=case.num_steps)(**rounded)
    result.loss_sum.backward()
    assert expected.loss_sum.item() == pytest.approx(result.loss_sum.item(), rel=2e-6)
    for name, grad in expected_grads.items():
        scale = grad.abs().max().item()
        actual = case.draft.get_parameter(name).grad.double()
        torch.testing.assert_close(actual, grad, rtol=0, atol=3e-5 * scale, msg=name)


def test_a_second_mask_through_the_same_model_is_as_right_as_the_first():
    """Nothing of a batch is left behind for the next one."""
    case = make_case([[False, True, True, False, True, True]] * 2)
    model = TrainingTimeTest(case.draft, num_steps=case.num_steps)
    check(case, model)
    other = torch.tensor([[True, False, False, False, False, True], [False] * 6])
    check(Case(case.draft, {**case.batch, "loss_mask_BT": other}, case.num_steps), model)


@pytest.mark.parametrize("rope", [None, DYNAMIC, LONGROPE])
def test_the_loss_of_a_mask_is_the_sum_of_the_losses_of_its_tokens(rope):
    """A token supervised alone keeps few rows, all tokens keep all rows; each token's loss is the same in both.

    Also where the length of a text decides how it is rotated: its rows are no measure of that.
    """
    case = make_case([[True] * 6] * 2, rope=rope)
    model = TrainingTimeTest(case.draft, num_steps=case.num_steps)
    together = model(**case.batch)
    alone = []
    for batch in range(2):
        for token in range(6):
            mask = torch.zeros(2, 6, dtype=torch.bool)
            mask[batch, token] = True
            alone.append(model(**{**case.batch, "loss_mask_BT": mask}))
    torch.testing.assert_close(sum(one.loss_sum for one in alone), together.loss_sum, rtol=1e-12, atol=0)
    torch.testing.assert_close(sum(one.weight_sum for one in alone), together.weight_sum, rtol=1e-12, atol=0)
    assert together.counts.hits.tolist() == sum(one.counts.hits for one in alone).tolist()


def test_what_the_padding_holds_does_not_matter():
    case = make_case([[False, True, True, True, False, False]])
    model = TrainingTimeTest(case.draft, num_steps=case.num_steps)
    padded = {name: tensor.clone() for name, tensor in case.batch.items()}
    padded["input_ids_BT"][:, 4:] = 0
    padded["aux_BTA"][:, 4:] = 100.0
    padded["hidden_BTE"][:, 4:] = -100.0
    assert model(**case.batch).loss_sum.item() == model(**padded).loss_sum.item()


@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_batch_without_loss_gives_each_trainable_parameter_a_gradient_of_zeros(num_steps):
    """Under DDP every rank must send a gradient of every parameter."""
    case = make_case([[True, False, False]] * 2, num_steps=num_steps)
    result = TrainingTimeTest(case.draft, num_steps=num_steps)(**case.batch)
    result.loss_sum.backward()
    assert (0.0, 0.0) == (result.loss_sum.item(), result.weight_sum.item())
    for name, parameter in case.draft.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(torch.zeros_like(parameter), parameter.grad), name


def test_the_embedding_and_the_target_get_no_gradient():
    case = make_case([[True] * 4])
    batch = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in case.batch.items()}
    TrainingTimeTest(case.draft, num_steps=3)(**batch).loss_sum.backward()
    assert case.draft.embed_tokens.weight.grad is None
    assert batch["hidden_BTE"].grad is None
    assert batch["head_VE"].grad is None


def test_the_result_without_grad_is_the_same():
    case = make_case([[True] * 5])
    model = TrainingTimeTest(case.draft, num_steps=3)
    expected = model(**case.batch)
    with torch.no_grad():
        result = model(**case.batch)
    assert expected.loss_sum.item() == result.loss_sum.item()
    assert not result.loss_sum.requires_grad


def test_decay_weighs_the_steps():
    case = make_case([[True] * 5], num_vocab=4, num_draft=4, num_steps=2)
    result = TrainingTimeTest(case.draft, num_steps=2, decay=0.5)(**case.batch)
    # Four rows read a token at step 0, three at step 1.
    assert 4 * 1.0 + 3 * 0.5 == result.weight_sum.item()
    expected, _ = expected_of(case, decay=0.5)
    torch.testing.assert_close(expected.loss_sum, result.loss_sum, rtol=1e-12, atol=0)


def test_autocast_trains_float32_weights_on_bfloat16_features():
    case = make_case([[False, True, True, False, True, True, True]] * 2)
    expected, _ = expected_of(case)
    case.draft.float()
    batch = {name: t.bfloat16() if t.is_floating_point() else t for name, t in case.batch.items()}
    with torch.autocast("cpu", torch.bfloat16):
        result = TrainingTimeTest(case.draft, num_steps=case.num_steps)(**batch)
    result.loss_sum.backward()
    assert torch.float32 == result.loss_sum.dtype
    assert expected.loss_sum.item() == pytest.approx(result.loss_sum.item(), rel=0.05)
    assert {torch.float32} == {p.grad.dtype for p in case.draft.parameters() if p.requires_grad}


def test_the_model_holds_nothing_but_the_draft():
    model = TrainingTimeTest(make_case([[True]]).draft, num_steps=2)
    assert {"draft." + name for name in model.draft.state_dict()} == set(model.state_dict())


def test_a_plan_names_rows_tokens_and_teachers():
    mask = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 1]])
    plan = plan_rows(mask, 2)
    # Token 2 is read by row 1 at step 0 and by row 0 at step 1; token 4 of the second sequence by rows 3 and 2.
    assert [0, 1, 7, 8] == plan.rows_N.tolist()
    assert [0, 0, 1, 1] == plan.batch_N.tolist()
    assert [0, 1, 2, 3] == plan.time_N.tolist()
    assert [[1, 2, 8, 9], [2, 3, 9, 9]] == plan.tokens_SN.tolist()
    assert [[False, True, False, True], [True, False, True, False]] == plan.supervised_SN.tolist()
    assert [2, 9] == plan.teacher_rows_M.tolist()
    assert [[0, 1], [1, 0]] == [plan.teacher_SN[0, [1, 3]].tolist(), plan.teacher_SN[1, [2, 0]].tolist()]


def test_a_first_token_is_never_supervised():
    plan = plan_rows(torch.tensor([[True, False, False]]), 3)
    assert (0, 0) == (len(plan.rows_N), len(plan.teacher_rows_M))


def test_documents_side_by_side_are_planned_apart():
    mask = torch.tensor([[1, 1, 1, 1, 1, 1]])
    plan = plan_rows(mask, 3, documents_BT=torch.tensor([[0, 0, 0, 4, 4, 5]]))
    # Documents of 3, 2 and 1 tokens: the first has two rows, the second one, the third none.
    assert [0, 1, 3] == plan.rows_N.tolist()
    assert [0, 1, 0] == plan.time_N.tolist()
    assert [0, 0, 3] == plan.starts_N.tolist()
    assert [[0, 1, 2, 0, 1, 0]] == plan.positions_BT.tolist()
    assert [[True, True, True], [True, False, False], [False, False, False]] == plan.supervised_SN.tolist()
    assert [1, 2, 4] == plan.teacher_rows_M.tolist()


@settings(max_examples=40, deadline=None)
@given(packed_cases())
def test_packed_documents_train_as_if_each_were_alone(packed):
    """Loss, every gradient and all counts agree to 1e-10 in float64, also where the row ends in padding."""
    case, lengths = packed
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    model = TrainingTimeTest(case.draft, num_steps=case.num_steps)
    case.draft.zero_grad()
    together = model(**case.batch, documents_BT=documents)
    together.loss_sum.backward()
    grads = {name: p.grad.clone() for name, p in case.draft.named_parameters() if p.requires_grad}
    case.draft.zero_grad()
    alone = []
    for start, length in zip(torch.tensor([0, *lengths]).cumsum(0).tolist(), lengths, strict=False):
        part = {n: t if n == "head_VE" else t[:, start : start + length] for n, t in case.batch.items()}
        alone.append(model(**part))
        alone[-1].loss_sum.backward()
    torch.testing.assert_close(sum(one.loss_sum for one in alone), together.loss_sum, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sum(one.weight_sum for one in alone), together.weight_sum, rtol=1e-12, atol=0)
    assert sum(one.counts.as_tensor() for one in alone).tolist() == together.counts.as_tensor().tolist()
    for name, parameter in case.draft.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-10, atol=1e-10, msg=name)


def test_packed_documents_are_the_reference_of_each():
    """The row-by-row reference knows no packing: it reads one document at a time."""
    case = make_case([[True, True, False, True, True, False, True, True]], num_steps=3)
    lengths = (3, 5)
    result = TrainingTimeTest(case.draft, num_steps=3)(
        **case.batch, documents_BT=torch.tensor([[7] * lengths[0] + [9] * lengths[1]])
    )
    parts = [slice(0, 3), slice(3, 8)]
    expected = [
        expected_of(Case(case.draft, {n: t if n == "head_VE" else t[:, part] for n, t in case.batch.items()}, 3))[0]
        for part in parts
    ]
    total = sum(one.loss_sum for one in expected).detach()
    torch.testing.assert_close(total, result.loss_sum.detach(), rtol=1e-10, atol=0)
    for name in ("supervised", "hits", "chain_rows", "chain_hits"):
        counted = [sum(pair) for pair in zip(*(getattr(one, name) for one in expected), strict=True)]
        assert counted == getattr(result.counts, name).tolist(), name
