"""Hypothesis strategies for the tests: those that plugin authors get, and a few that only these tests need."""

import torch
from hypothesis import strategies as st

from models import FlaggedPair
from tiepolicy.testing import FIELD_VOCAB_SIZES as FIELD_VOCAB_SIZES
from tiepolicy.testing import dtypes as dtypes
from tiepolicy.testing import nested_models as tied_modules
from tiepolicy.testing import small_sizes as small_sizes
from tiepolicy.testing import state_dicts as view_dicts
from tiepolicy.testing import vocab_sizes as vocab_sizes

__all__ = ["FIELD_VOCAB_SIZES", "dtypes", "flagged_pairs", "small_sizes", "tied_modules", "view_dicts", "vocab_sizes"]


@st.composite
def flagged_pairs(draw: st.DrawFn, *, sizes: st.SearchStrategy[int], device: str = "cpu") -> FlaggedPair:
    """An embedding and a head with any sizes, flag and, where the sizes allow it, any physical tie."""
    vocab_size, draft_vocab_size, hidden_size = draw(sizes), draw(sizes), draw(small_sizes())
    if draw(st.booleans()):
        draft_vocab_size = vocab_size
    tied = vocab_size == draft_vocab_size and draw(st.booleans())
    with torch.device(device):
        model = FlaggedPair(
            flag=draw(st.booleans()),
            vocab_size=vocab_size,
            draft_vocab_size=draft_vocab_size,
            hidden_size=hidden_size,
            tied=tied,
        )
    return model.to(draw(dtypes()))
