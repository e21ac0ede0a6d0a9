from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in every child process
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytest_plugins = ["tests.hangs"]


@pytest.fixture(scope="session")
def context(tmp_path_factory: pytest.TempPathFactory):
    """Tiny teachers, trained once for all processes of a run."""
    from tests.helpers import tiny_context

    own = Path(tmp_path_factory.getbasetemp())
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    return tiny_context(Path(tmp_path_factory.mktemp("teachers")), shared / "teachers-cache")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Keep the tests of a file in one process, which makes what they share once; spread those of the contract.

    They are as many as there are methods and recipes, and share what is cached on the disk alone.
    """
    fixtures = getattr(item, "_fixtureinfo", None)
    scopes = {found[-1].scope for found in fixtures.name2fixturedefs.values() if found} if fixtures else set()
    if "contract" not in item.path.parts or scopes & {"module", "class"}:
        item.add_marker(pytest.mark.xdist_group(item.path.relative_to(item.config.rootpath).as_posix()))
