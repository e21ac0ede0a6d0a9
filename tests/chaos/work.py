"""The jobs of a chaos run: small, real, one of every kind, and what they must come to if nobody disturbs them."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.errors import DistilleryError
from distill_core.recipe import Recipe, load_recipe
from distillery_trainer.client import (
    JobsClient,
    Work,
    convert_spec,
    evaluate_spec,
    pipeline_spec,
    stage,
    train_spec,
)

SMALL = {
    "threads": 1,
    "log_every": 10,
    "sample_every": 1_000_000,
    "evaluate.num_samples": 40,
    "evaluate.batch_size": 40,
}
FIELD = {
    "steps": 300,
    "batch_size": 16,
    "checkpoint_every": 10,
    "network.args": {"layers": 2, "width": 16, "octaves": 2},
    "data": {"name": "procedural_scene", "num_views": 3, "num_test_views": 1, "size": 16},
}
JUDGE = {"steps": 60, "checkpoint_every": 10, "network.args": {"width": 8}, "config.held_out.count": 40}
TEACHER = {
    "steps": 4,
    "batch_size": 8,
    "network.args.num_layers": 1,
    "network.args.num_attention_heads": 1,
    "network.args.attention_head_dim": 8,
    "evaluate.judge": {"artifact": "digits-judge@1"},
}
KINDS = ("field", "judge", "pipeline", "evaluate", "convert")


def recipes(kinds: tuple[str, ...]) -> dict[str, Recipe]:
    """The trainings of these kinds of work, by the name that they publish; `teacher` is evaluated, never trained."""
    found = {}
    if {"field", "pipeline", "convert"} & set(kinds):
        found |= {f"field-{seed}": _recipe("nerf_procedural_mlp", FIELD, seed) for seed in (0, 1)}
    if "judge" in kinds:
        found["judge"] = _recipe("judge_shapes", JUDGE, 0)
    if "evaluate" in kinds:
        digits = {key: value for key, value in JUDGE.items() if not key.startswith("config")}
        found["digits-judge"] = _recipe("judge_digits", digits, 0)
        found["teacher"] = _recipe("edm_digits", TEACHER, 0)
    return {name: recipe.override({"publish": {"name": name}}) for name, recipe in found.items()}


def _recipe(name: str, changes: dict[str, Any], seed: int) -> Recipe:
    return load_recipe(name).override({**SMALL, **changes, "seed": seed}).model_copy(update={"check": None})


@dataclass
class Reference:
    """Undisturbed runs: their store, and the digest of each model's weights."""

    store: Path
    recipes: dict[str, Recipe]
    weights: dict[str, str] = field(default_factory=dict)

    @classmethod
    def make(cls, folder: Path, kinds: tuple[str, ...], tell: Callable[[str], None]) -> Reference:
        """Train each recipe once in a process of its own."""
        reference = cls(folder / "store", recipes(kinds))
        for name, recipe in reference.recipes.items():
            tell(name)
            _train(folder / "runs" / name, recipe, reference.store, folder / "cache")
            reference.weights[name] = weights_digest(ArtifactStore(reference.store).manifest(f"{name}@1"))
        return reference


def _train(run_dir: Path, recipe: Recipe, store: Path, cache: Path) -> None:
    run_dir.mkdir(parents=True)
    task = {"job": "reference", "attempt": 1, "kind": "train", "run_dir": str(run_dir)}
    task |= {"store": str(store), "cache": str(cache)}
    task["spec"] = {"recipe": recipe.model_dump(mode="json", exclude_none=True)}
    (run_dir / "spec.json").write_text(json.dumps(task))
    done = subprocess.run(
        [sys.executable, "-m", "distill_core.job.entry", str(run_dir / "spec.json")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"an undisturbed run failed: {done.stdout[-500:]} {done.stderr[-1500:]}"


def weights_digest(manifest: Manifest) -> str:
    """One digest of all weights of a version."""
    weights = {path: entry.sha256 for path, entry in manifest.files.items() if path.endswith(".safetensors")}
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()


class Feeder(threading.Thread):
    """Keeps `depth` jobs unfinished until told to stop, through the Jobs API, each under a key of its own.

    A call that fails is sent again with the same key, as a careful client does: it must be queued once.
    """

    def __init__(self, address: str, reference: Reference, kinds: tuple[str, ...], rng: Random) -> None:
        super().__init__(name="feeder", daemon=True)
        self._address, self._reference, self._rng = address, reference, rng
        self._kinds = itertools.cycle(rng.sample(kinds, len(kinds)))
        self.unfinished: Callable[[], int] = lambda: 0
        self.depth = 4
        self.jobs: dict[str, str] = {}  # key -> job id, once acknowledged
        self.resent = 0
        self.stopping = threading.Event()

    def run(self) -> None:
        """Feed."""
        number = 0
        while not self.stopping.wait(0.2):
            if self.unfinished() >= self.depth:
                continue
            number += 1
            self._submit(f"chaos-{number}", self._work(next(self._kinds)))

    def _work(self, kind: str) -> Work:
        if kind == "evaluate":
            sizes = {"num_samples": 40, "batch_size": 40, "judge": {"artifact": "digits-judge@1"}}
            return evaluate_spec("teacher@1", sizes, {"name": "digits"})
        if kind == "judge":
            return self._training("judge")
        name = f"field-{self._rng.randrange(2)}"
        if kind == "field":
            return self._training(name)
        if kind == "convert":
            return convert_spec(f"{name}@latest", "onnx-fp32")
        return pipeline_spec(
            stage("field", self._training(name)), stage("onnx", convert_spec("{field}", "onnx-fp32"))
        )

    def _training(self, name: str) -> Any:
        values = self._reference.recipes[name].model_dump(mode="json", exclude_none=True)
        return train_spec(values)

    def _submit(self, key: str, work: Work) -> None:
        self.jobs.setdefault(key, "")
        while True:
            try:
                with JobsClient(self._address, timeout_s=5) as jobs:
                    self.jobs[key] = jobs.submit(work, idempotency_key=key).id
                    if self._rng.random() < 0.3:  # a client that did not hear the answer
                        assert jobs.submit(work, idempotency_key=key).id == self.jobs[key]
                return
            except DistilleryError:
                self.resent += 1
                self.stopping.wait(0.5)
