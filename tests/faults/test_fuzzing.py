"""Any bytes are a value that survives a round trip or an error of ours; so is all that ever went wrong."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fuzz_targets
from strategies import changed_bytes

NAMES = sorted(fuzz_targets.TARGETS)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_valid_and_what_was_found_is_answered(name):
    for seed in fuzz_targets.seeds(name):
        fuzz_targets.run(name, seed)


def fuzz(name, max_examples):
    @settings(max_examples=max_examples, suppress_health_check=[HealthCheck.too_slow], database=None)
    @given(st.binary(max_size=64) | changed_bytes(fuzz_targets.seeds(name)))
    def check(data):
        fuzz_targets.run(name, data)

    check()


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_are_answered(name):
    fuzz(name, 20)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_bytes_are_answered(name):
    fuzz(name, 3000)
