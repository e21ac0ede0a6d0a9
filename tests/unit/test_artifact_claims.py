"""A version's number is claimed whole or not at all, whatever kills the publisher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.errors import Unavailable


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def publish(store: ArtifactStore, model: Path, key: str) -> Manifest:
    return store.publish(model, Manifest(name="digits", kind="model", job=key), key=key)


def test_a_folder_that_a_killed_publisher_left_is_used_by_the_next(tmp_path, model):
    store = ArtifactStore(tmp_path / "store")
    publish(store, model, "first")
    (tmp_path / "store/digits/versions/2").mkdir()  # killed before its claim
    assert publish(store, model, "second").version == 2


def test_a_claim_that_cannot_be_written_leaves_no_empty_claim(tmp_path, model):
    """The kernel refuses every write of more than three bytes to a file."""
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from distill_core.artifacts import ArtifactStore, Manifest\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3, 3))\n"
        "manifest = Manifest(name='digits', kind='model', job='a-job')\n"
        "ArtifactStore(sys.argv[1]).publish(Path(sys.argv[2]), manifest, key='a-job')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "store"), str(model)],
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert Unavailable.__name__ in done.stderr
    assert not list((tmp_path / "store").rglob(".*"))
    assert publish(ArtifactStore(tmp_path / "store"), model, "a-job").version == 1


def test_a_number_half_published_is_taken_again_by_its_own_job_only(tmp_path, model):
    store = ArtifactStore(tmp_path / "store")
    claim = tmp_path / "store/digits/versions/1/.claim"
    claim.parent.mkdir(parents=True)
    claim.write_text("killed")
    assert publish(store, model, "other").version == 2
    assert publish(store, model, "killed").version == 1
