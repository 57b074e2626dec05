"""What is timed has the machine to itself, while tests are shared out among its cores (pyproject.toml)."""

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    return 0
