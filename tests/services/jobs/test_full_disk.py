"""A real full disk: a small tmpfs. Everything says so in one sentence and leaves nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.errors import Unavailable
from tests.helpers import tiny_recipe


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this user cannot mount a tmpfs: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_job_on_a_full_disk_ends_with_a_sentence_and_no_half_checkpoint(small_disk):
    recipe = tiny_recipe("judge_digits", checkpoint_every=1)
    run_dir = small_disk / "run"
    run_dir.mkdir()
    (run_dir / "ballast").write_bytes(bytes(120_000))
    spec = {
        "job": "j",
        "attempt": 1,
        "kind": "train",
        "spec": {"recipe": recipe.model_dump(mode="json", exclude_none=True)},
        "run_dir": str(run_dir),
        "store": str(small_disk / "store"),
    }
    (run_dir / "spec.json").write_text(json.dumps(spec))
    done = subprocess.run(
        [sys.executable, "-m", "distill_core.job.entry", str(run_dir / "spec.json")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 75, done.stderr[-1500:]
    assert events[-1]["event"] == "error"
    assert "space" in events[-1]["message"]
    assert "Traceback" not in events[-1]["message"]
    checkpoints = run_dir / "checkpoints"
    assert (
        not [p for p in checkpoints.iterdir() if p.name.startswith(".partial")]
        if checkpoints.exists()
        else True
    )


def test_publishing_to_a_full_store_leaves_no_version(small_disk, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights.safetensors").write_bytes(bytes(1_000_000))
    store = ArtifactStore(Path(small_disk) / "store")
    with pytest.raises(Unavailable, match="cannot publish.*No space left"):
        store.publish(folder, Manifest(name="digits", kind="denoiser"))
    assert store.versions("digits") == []
