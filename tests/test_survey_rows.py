"""Every failure of the survey is shown by one named test."""

import ast
from collections import Counter
from pathlib import Path

from survey import NO_TEST_YET, ROWS

TESTS = Path(__file__).parent


def claims():
    """Row and test, for each row that a test claims with `@pytest.mark.survey`."""
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                for mark in node.decorator_list:
                    if isinstance(mark, ast.Call) and "pytest.mark.survey" == ast.unparse(mark.func):
                        yield from ((row.value, f"{path.name}::{node.name}") for row in mark.args)


def test_the_survey_has_eighty_rows():
    assert 80 == len(ROWS)
    assert sorted(ROWS) == sorted([f"E{row:02}" for row in range(1, 5)] + [f"T{row:02}" for row in range(1, 77)])


def test_every_row_is_claimed_by_one_test_or_listed_as_open():
    claimed = Counter(row for row, _ in claims())
    assert set(ROWS) == set(claimed) | NO_TEST_YET
    assert set() == set(claimed) & NO_TEST_YET, "shown by a test, so no longer open"
    twice = {row for row, count in claimed.items() if count > 1}
    assert [] == [claim for claim in claims() if claim[0] in twice]


def test_only_tests_claim_rows():
    assert [] == [test for _, test in claims() if not test.split("::")[1].startswith("test_")]
