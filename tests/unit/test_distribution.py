"""How tests are spread over processes: those of a file stay together, so that what they share is made once."""

from __future__ import annotations

import os

import pytest


def test_the_tests_of_a_file_run_in_one_process(request):
    """pytest-xdist names the group at the end of the test's id, and spreads tests by it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("one process runs all")
    assert request.node.nodeid.endswith("@tests/unit/test_distribution.py")
