"""A draft of any shape, under any flag, comes back from its checkpoint bit by bit."""

import dataclasses
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaConfig

import tiepolicy
import tiepolicy_hf._plugin
from eagle3.blueprint import draft_config, read_draft_config, write_draft_config
from eagle3.checkpoint import Progress, RunCheckpoints, RunState
from eagle3.config import CheckpointConfig, DataConfig, RunConfig, TargetConfig, TrainConfig
from eagle3.draft import Draft
from eagle3.errors import CheckpointError
from eagle3.optimizer import DraftOptimizer
from eagle3_runs import ALONE
from tiepolicy.errors import UnsafeVerdictError

HEADS = 2


def new_draft(*, vocab_size, draft_vocab_size, width, tied, flag):
    """A draft as a new run has it: its target's embedding and the rows of its target's head."""
    target = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    config = draft_config(target, draft_vocab_size=draft_vocab_size)
    config.tie_word_embeddings = flag
    config.eagle_aux_hidden_state_layer_ids = [1, 2, 3]
    embedding = torch.randn(vocab_size, width)
    head = embedding if tied else torch.randn(vocab_size, width)
    draft = Draft(config)
    ids = torch.randperm(vocab_size)[:draft_vocab_size].sort().values
    draft.init_from_target_(embedding_VE=embedding, head_VE=head, draft_ids_D=ids)
    return draft


def state_of(draft, *, step=0, train=None):
    config = RunConfig(
        out="unused", target=TargetConfig(model="t"), data=DataConfig(train="d"), train=train or TrainConfig()
    )
    return RunState(
        draft=draft,
        optimizer=DraftOptimizer(draft, config.train),
        progress=Progress(epoch=0, step=step, num_seen=3 * step),
        config=config,
        data_digest="data",
        target_digest="target",
    )


def take_steps(state, *, num_steps):
    for _ in range(num_steps):
        for parameter in state.optimizer.parameters:
            parameter.grad = torch.randn_like(parameter)
        state.optimizer.step(scale=torch.tensor(1.0), seen_before=0.0, seen_after=0.5)


def bits_of(state):
    """Every tensor of weights and optimizer, as bytes."""
    tensors = dict(state.draft.state_dict())
    for number, kept in state.optimizer.adamw.state_dict()["state"].items():
        tensors |= {f"{number}.{key}": value for key, value in kept.items()}
    return {name: tensor.reshape(-1).view(torch.uint8).tolist() for name, tensor in tensors.items()}


def test_a_target_with_another_head_is_noticed_though_its_embedding_is_the_same(tmp_path):
    checkpoints = RunCheckpoints(tmp_path, ALONE, CheckpointConfig())
    state = state_of(new_draft(vocab_size=24, draft_vocab_size=8, width=8, tied=False, flag=False), step=2)
    take_steps(state, num_steps=2)
    checkpoints.save(state, None)
    other = dataclasses.replace(state, target_digest="another head")
    with pytest.raises(CheckpointError, match="holds a draft of another target: the embedding or the head differs"):
        checkpoints.restore_("LATEST", other)


@st.composite
def shapes(draw):
    """Target vocabulary, draft vocabulary up to all of it, width, whether the target is tied, and the flag."""
    vocab_size = draw(st.integers(1, 24))
    return {
        "vocab_size": vocab_size,
        "draft_vocab_size": draw(st.integers(1, vocab_size)),
        "width": HEADS * draw(st.sampled_from([2, 4, 6])),
        "tied": draw(st.booleans()),
        "flag": draw(st.booleans()),
    }


@settings(max_examples=20, deadline=None)
@given(shapes(), st.booleans())
@example({"vocab_size": 24, "draft_vocab_size": 8, "width": 8, "tied": True, "flag": True}, True)
@example({"vocab_size": 24, "draft_vocab_size": 24, "width": 8, "tied": True, "flag": True}, False)
def test_save_and_resume_keep_every_bit(shape, consolidated):
    """Of a draft and its optimizer, which then take the same next step; the format of the save does not matter."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = RunCheckpoints(folder, ALONE, CheckpointConfig(save_consolidated=consolidated))
        state = state_of(new_draft(**shape), step=2)
        write_draft_config(Path(folder), state.draft.config)
        take_steps(state, num_steps=2)
        expected, loosened = bits_of(state), torch.get_rng_state()
        checkpoints.save(state, None)

        torch.manual_seed(99)
        fresh = state_of(Draft(read_draft_config(Path(folder))))
        assert shape["flag"] is fresh.draft.config.tie_word_embeddings
        checkpoints.restore_("LATEST", fresh)
        assert expected == bits_of(fresh)
        assert state.progress == fresh.progress
        assert torch.equal(loosened, torch.get_rng_state())
        file = Path(folder) / "checkpoints" / "epoch_1_step_2" / "model.safetensors"
        assert consolidated is file.exists()
        if consolidated:
            saved = load_file(file)
            state_dict = state.draft.state_dict()
            assert [True] * len(state_dict) == [torch.equal(saved[name], state_dict[name]) for name in state_dict]

        torch.manual_seed(1)
        take_steps(state, num_steps=1)
        torch.manual_seed(1)
        take_steps(fresh, num_steps=1)
        assert bits_of(state) == bits_of(fresh)
        checkpoints.close()


class TrustTheFlag:
    """The rule that once lost trained heads: where the config says that the two are tied, they are."""

    @tiepolicy.hookimpl
    def tiepolicy_decide(self, claim):
        return tiepolicy.Verdict.alias("same-storage") if claim.source == "declared" else None


def test_the_rule_that_trusted_the_flag_can_no_longer_lose_a_head(tmp_path):
    """As a plugin, it is stopped before anything is written; it used to end in a crash when the run was resumed."""
    state = state_of(new_draft(vocab_size=24, draft_vocab_size=8, width=8, tied=True, flag=True))
    policy = tiepolicy.Policy(plugins=[tiepolicy_hf._plugin, TrustTheFlag()])
    checkpoints = RunCheckpoints(tmp_path, ALONE, policy=policy)
    with pytest.raises(UnsafeVerdictError, match=r"Saving would lose lm_head\.weight; nothing was written"):
        checkpoints.save(state, None)
    assert [] == checkpoints.store.names()
    assert not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_of_another_program_is_named(tmp_path):
    draft = new_draft(vocab_size=6, draft_vocab_size=3, width=4, tied=False, flag=False)
    checkpoints, state = RunCheckpoints(tmp_path, ALONE), state_of(draft)
    checkpoints.store.save("other", model=draft, optimizer=state.optimizer.adamw, extra={"epoch": 1})
    with pytest.raises(CheckpointError, match="other was not written by this trainer: it has no 'progress'"):
        checkpoints.restore_("other", state)
    checkpoints.close()


def test_what_the_config_says_of_decay_counts_more_than_the_checkpoint(tmp_path):
    draft = new_draft(vocab_size=6, draft_vocab_size=3, width=4, tied=False, flag=False)
    checkpoints, state = RunCheckpoints(tmp_path, ALONE), state_of(draft, step=1)
    checkpoints.save(state, None)
    changed = state_of(draft, train=dataclasses.replace(TrainConfig(), weight_decay=0.25))
    checkpoints.restore_("LATEST", changed)
    assert [0.25, 0.0] == [group["weight_decay"] for group in changed.optimizer.adamw.param_groups]
    checkpoints.close()
