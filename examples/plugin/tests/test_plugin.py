"""The plugin claims what the registry lists, and keeps the laws of tiepolicy."""

from hypothesis import strategies as st

from loom_ties import plugin
from loom_ties.framework import LoomModel
from tiepolicy import Policy
from tiepolicy.testing import check_plugin, small_sizes


def loom_models():
    """Loom models with heads of any size."""
    return st.builds(
        LoomModel,
        vocab_size=small_sizes(),
        head_sizes=st.lists(small_sizes(), max_size=3).map(tuple),
        hidden_size=small_sizes(),
    )


def test_the_plugin_keeps_the_laws():
    check_plugin(plugin, models=loom_models(), max_examples=25)


def test_a_head_of_the_tables_size_is_tied_and_a_smaller_one_is_kept():
    plan = Policy(plugins=[plugin]).plan(LoomModel(vocab_size=12, head_sizes=(12, 8), hidden_size=4))
    assert [("table.weight", "heads.0.weight")] == [group.names for group in plan.groups]
    expected = (
        "heads.1.weight (8, 4) and table.weight (12, 4) cannot be one tensor: shapes differ; "
        "claimed by LoomModel.registry['table.weight']"
    )
    assert [expected] == [str(refusal) for refusal in plan.refused]
