"""The table of the page on reliability is what happens."""

from pathlib import Path

import pytest
from table import BEGIN, END, PATHS, cell, table

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


@pytest.mark.slow
def test_the_table_of_the_page_is_what_the_script_prints():
    _, _, after = PAGE.read_text().partition(BEGIN)
    assert after.partition(END)[0] == table()


def test_a_save_that_is_killed_in_the_middle_keeps_the_old_checkpoint_here_and_loses_it_in_torch_save():
    ours, torch_save, *_ = PATHS
    assert "old one whole" == cell("killed in the middle of a save", ours)
    assert "**old one lost** (OSError)" == cell("killed in the middle of a save", torch_save)
