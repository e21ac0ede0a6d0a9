"""`convert`: a published version and a target in, a new version with the export and its parity report out."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from distill_core.artifacts import (
    MANIFEST,
    ArtifactStore,
    ExportReport,
    FrechetReport,
    Manifest,
)
from distill_core.errors import Unavailable
from distill_core.kinds.base import image_probe_of
from distill_core.kinds.cards import generator_card
from distill_core.kinds.convertible import check_convertible
from distill_core.kinds.loading import load_artifact
from distillery_converter import frechet, int8, onnx, parity, tensorrt
from distillery_converter.frechet import Side
from distillery_converter.graph import Graph
from distillery_converter.kinds import graphs_of
from distillery_converter.targets import Target, find_target
from distillery_converter.writing import WrittenGraph, write_graphs

OnProgress = Callable[[int, int], None]  # (steps done, steps in all)
STEPS = 3  # fetched, exported and compared, published

log = logging.getLogger(__name__)


def convert(
    store: ArtifactStore,
    ref: str,
    target: str,
    *,
    tolerance: float | None = None,
    job: str = "",
    work: Path | None = None,
    cache: Path | None = None,
    on_progress: OnProgress = lambda done, steps: None,
) -> Manifest:
    """Convert `ref` (name@version or name@alias) and publish the result as a new version of the same model.

    The same version, target and tool versions are never converted twice: the version that has the export is
    returned. `tolerance` replaces the target's gate on the largest difference; `work` is the folder for
    temporary files, `cache` the one for what is worth keeping (copies of remote models, TensorRT's timings).

    Raises:
        ConfigError: an unknown target, one that this model has no form for, or a bad tolerance.
        NotFound: no such model or version.
        ArtifactError: a kind that no graph is made of, a damaged file, or outputs that differ too much from PyTorch.
        Unavailable: the target needs a GPU or a package that is not here, or the disk is full.
    """
    goal = find_target(target, tolerance=tolerance)
    source = store.manifest(ref)
    check_convertible(source, goal.name)
    versions = _tool_versions(goal)
    done = _converted(store, source, goal, versions)
    if done is not None:
        log.info("%s already holds %s, nothing to do", done.ref, goal.name)
        if job:  # an attempt of it may have been cut off while it published the same
            store.withdraw(source.name, job)
        on_progress(STEPS, STEPS)
        return done
    cache = cache or Path(tempfile.gettempdir()) / "distillery-models"
    try:
        with tempfile.TemporaryDirectory(prefix="convert-", dir=work) as scratch:
            folder = Path(scratch) / "model"
            shutil.copytree(
                store.fetch(source.ref, cache), folder, ignore=shutil.ignore_patterns(MANIFEST, ".claim")
            )
            on_progress(1, STEPS)
            graphs = graphs_of(folder, source, store, cache, goal)
            report = _export(folder, graphs, source, goal, versions, cache)
            on_progress(STEPS - 1, STEPS)
            # older versions have none
            sample = source.parity or image_probe_of(load_artifact(store, source.ref, cache))
            draft = _manifest(source, report, job).model_copy(update={"parity": sample})
            published = store.publish(folder, draft, key=job)
    except OSError as error:
        raise Unavailable(
            f"cannot convert {source.ref}: {error.strerror or error}; see to the disk and retry"
        ) from None
    on_progress(STEPS, STEPS)
    return published


def _tool_versions(goal: Target) -> dict[str, str]:
    versions = onnx.tool_versions()
    if goal.runtime == "tensorrt":
        versions |= tensorrt.tool_versions()
    return versions | ({"calibration": int8.CALIBRATION} if goal.precision == "int8" else {})


def _converted(
    store: ArtifactStore, source: Manifest, goal: Target, versions: dict[str, str]
) -> Manifest | None:
    """The newest version from `source` on that has its weights and this export, made by the same tools."""
    for number in reversed(store.versions(source.name)):
        if number < source.version:
            return None
        candidate = store.manifest(f"{source.name}@{number}")
        report = candidate.exports.get(goal.name)
        made = report is not None and report.tool_versions == versions and _passes(report, goal)
        if made and _content(candidate) == _content(source):
            return candidate
    return None


def _content(manifest: Manifest) -> tuple[object, ...]:
    """Facts that decide an export: the weights with their configurations, and what the manifest says of their use."""
    files = {
        path: entry.sha256
        for path, entry in manifest.files.items()
        if path.endswith((".safetensors", "config.json")) and not path.startswith("exports/")
    }
    return files, manifest.kind, json.dumps(manifest.card, sort_keys=True)


def _passes(report: ExportReport, goal: Target) -> bool:
    return report.tolerance <= goal.max_abs or report.max_abs_difference <= goal.max_abs


def _export(
    folder: Path, loaded: list[Graph], source: Manifest, goal: Target, versions: dict[str, str], cache: Path
) -> ExportReport:
    """Write `exports/<target>/` inside `folder`, compare every graph with PyTorch, and report."""
    started = time.perf_counter()
    exports = folder / "exports" / goal.name
    shutil.rmtree(exports, ignore_errors=True)  # by other tool versions
    written = write_graphs(loaded, exports, goal, cache)
    for one in written:
        for name, text in one.graph.beside.items():
            (exports / name).write_text(text, encoding="utf-8")
        log.info(
            "%s as %s, %s: max abs %.3g, rel-L2 %.3g",
            *(source.ref, goal.name, one.graph.name, one.parity.max_abs, one.parity.rel_l2),
        )
        parity.require(one.parity, goal, model=source.ref, part=one.graph.name)
    samples = _samples(written, folder, source) if goal.lossy else None
    frechet.require(samples, goal, model=source.ref)
    return ExportReport(
        target=goal.name,
        files=tuple(
            sorted(path.relative_to(folder).as_posix() for path in exports.rglob("*") if path.is_file())
        ),
        opset=onnx.OPSETS[goal.precision],
        max_abs_difference=max(one.parity.max_abs for one in written),
        rel_l2=max(one.parity.rel_l2 for one in written),
        tolerance=goal.max_abs,
        batches=parity.BATCHES,
        seconds=round(time.perf_counter() - started, 3),
        tool_versions=versions,
        graphs={one.graph.name: one.report for one in written},
        frechet=samples,
    )


def _samples(written: list[WrittenGraph], folder: Path, source: Manifest) -> FrechetReport | None:
    """The worst report of the model's denoisers, with its decoder; None for what is no generator."""
    denoisers = [(one, one.graph.trajectory) for one in written if one.graph.trajectory is not None]
    card = generator_card(source)
    if card.image is None or not denoisers:
        return None
    decoder = next((one for one in written if one.graph.name == "decoder"), None)
    # an expert draws a part of the data only
    real = frechet.real_pictures(folder, card.image.picture) if card.partition is None else None
    reports = []
    for one, trajectory in denoisers:
        before = Side(one.graph.run, decoder.graph.run if decoder else None)
        after = Side(one.run, decoder.run if decoder else None)
        share = frechet.SECONDS / len(denoisers)
        reports.append(frechet.compare_samples(trajectory, before, after, real=real, seconds=share))
    measured = [report for report in reports if report is not None]
    return max(measured, key=lambda report: report.ratio, default=None)


def _manifest(source: Manifest, report: ExportReport, job: str) -> Manifest:
    changes = {"exports": {**source.exports, report.target: report}, "parents": (source.ref,), "job": job}
    return source.model_copy(update=changes)
