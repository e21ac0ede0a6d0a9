from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in every child process
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytest_plugins = ["tests.hangs"]


@pytest.fixture(scope="session")
def context(tmp_path_factory: pytest.TempPathFactory):
    """Tiny teachers, trained once per session."""
    from tests.helpers import tiny_context

    return tiny_context(Path(tmp_path_factory.mktemp("teachers")))
