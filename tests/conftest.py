"""Profiles and the settings that all tests share."""

import os
from importlib.metadata import version

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("dev", deadline=None, max_examples=50)
# CI runs the same examples each time: a failure there is a failure everywhere.
settings.register_profile(
    "ci", deadline=None, max_examples=200, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

# Tables are as wide as the terminal, and processes of pytest-xdist are told that they have one.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)


def pytest_report_header() -> str:
    """What the results hold for."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="torch.cuda.is_available() is False"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, on one thread."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
