"""`python -m tests.services.fuzz.converter [--seed N] [--count N]`: damaged models, read by converter and sampler.

A published model's ONNX graph, weights, configurations and manifest are damaged, one file at a time, behind a right
checksum. The converter reads its folder, the sampler opens its graph and answers once: each either works, or says in
one sentence what is wrong. Children do the work, so that a crash of a native library is seen and counted; the exit
code is 1 if there was one, or another exception than ours.
"""

from __future__ import annotations

import argparse
import logging
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from distill_core.artifacts import MANIFEST, ArtifactStore, Manifest
from distill_core.errors import DistilleryError
from distillery_converter.convert import convert
from distillery_converter.graphs import load_graphs
from distillery_sampler.backends.shared import SharedWeights
from distillery_sampler.models.loading import open_model
from distillery_sampler.settings import SamplerSettings
from tests.services.converter.test_converter import publish, tiny_denoiser
from tests.services.fuzz.damage import KINDS

CHUNK = 250  # examples of a child
LIMIT_S = 60  # of one example: no damage may hang a reader
MEMORY = 12 * 2**30  # address space of a child: no lie of a file may ask for more


class Subject:
    """One converted model, and what reads it."""

    def __init__(self, folder: Path) -> None:
        store = publish(folder, tiny_denoiser())
        self.manifest = convert(store, "digits@1", "onnx-fp32", cache=folder)
        self.folder, self.work = store.fetch(self.manifest.ref), folder / "work"
        self.files = sorted(
            path.relative_to(self.folder).as_posix()
            for path in self.folder.rglob("*")
            if path.suffix in KINDS and path.name != MANIFEST
        )

    def tried(self, path: str, damaged: bytes) -> str:
        """How the readers take the model with the file `path` damaged: `read`, or the class of our error.

        Raises:
            Exception: whatever else they raise, or an error of ours that is not one sentence.
        """
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.folder, self.work / "model")
        (self.work / "model" / MANIFEST).unlink()
        (self.work / "model" / path).write_bytes(damaged)
        try:
            self._serve() if path.endswith(".onnx") else self._convert()
        except DistilleryError as error:
            said = str(error)
            if not said or "\n" in said or "Traceback" in said:
                raise AssertionError(f"{path}: this is not one sentence: {said[:300]!r}") from error
            return type(error).__name__
        return "read"

    def _convert(self) -> None:
        for graph in load_graphs(self.work / "model", self.manifest):
            graph.run(graph.inputs(1))

    def _serve(self) -> None:
        store = ArtifactStore(self.work / "store")
        made = store.publish(self.work / "model", self.manifest)
        settings = SamplerSettings(instances=1, max_batch=1, threads=1)
        open_model(store, made.ref, SharedWeights(store.fetch), settings)

    def tried_manifest(self, damaged: bytes) -> str:
        """The same for the manifest itself."""
        shutil.rmtree(self.work, ignore_errors=True)
        store = ArtifactStore(self.work / "store")
        made = store.publish(self.folder, self.manifest)
        path = self.work / "store" / made.name / "versions" / str(made.version) / MANIFEST
        path.write_bytes(damaged)
        try:
            found: Manifest = store.manifest(made.ref)
            found.exports.get("onnx-fp32")
        except DistilleryError as error:
            assert "\n" not in str(error), str(error)  # noqa: PT017
            return type(error).__name__
        return "read"


def fuzz(subject: Subject, *, first: int, count: int) -> Counter[str]:
    """`count` damaged models by hypothesis from the seed `first`; how they were taken, by file's kind."""
    found: Counter[str] = Counter()
    manifest = (subject.folder / MANIFEST).read_bytes()

    @seed(first)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from([*subject.files, MANIFEST]), st.integers(0, 2**32), st.data())
    def one(path: str, number: int, data: st.DataObject) -> None:
        suffix = Path(path).suffix
        damage = data.draw(st.sampled_from(KINDS[suffix]))
        whole = manifest if path == MANIFEST else (subject.folder / path).read_bytes()
        damaged = damage(whole, Random(number))
        signal.alarm(LIMIT_S)
        try:
            taken = subject.tried_manifest(damaged) if path == MANIFEST else subject.tried(path, damaged)
        except Exception as error:
            raise AssertionError(f"{damage.__name__} of {path}, number {number}: {error!r}") from error
        finally:
            signal.alarm(0)
        found[f"{path} {taken}"] += 1

    one()
    return found


def child(first: int, count: int) -> None:
    """Fuzz in this process, and print the counts."""
    logging.disable(logging.CRITICAL)
    np.seterr(all="ignore")  # damaged weights overflow, which is no failure of a reader
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for taken, times in fuzz(Subject(Path(folder)), first=first, count=count).items():
            print(f"taken {times} {taken}", flush=True)


def main() -> int:
    """Run children until `--count` examples are done; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given_ = parser.parse_args()
    if given_.child:
        child(given_.seed, given_.count)
        return 0
    totals: Counter[str] = Counter()
    failed = 0
    for start in range(0, given_.count, CHUNK):
        size, number = min(CHUNK, given_.count - start), given_.seed + start
        command = [sys.executable, "-m", "tests.services.fuzz.converter", "--child"]
        done = subprocess.run(
            [*command, "--seed", str(number), "--count", str(size)], capture_output=True, text=True
        )
        for line in done.stdout.splitlines():
            if line.startswith("taken "):
                _, times, what = line.split(" ", 2)
                totals[what] += int(times)
        if done.returncode:
            failed += 1
            print(f"seed {number}: exit code {done.returncode}\n{done.stderr[-3000:]}", flush=True)
        print(f"{start + size} of {given_.count}, {failed} chunks failed", flush=True)
    for what, times in sorted(totals.items()):
        print(f"{times:7d}  {what}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
