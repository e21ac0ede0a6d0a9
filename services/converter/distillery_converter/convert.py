"""`convert`: a published version and a target in, a new version with the export and its parity report out."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from distill_core.artifacts import MANIFEST, ArtifactStore, ExportReport, Manifest
from distill_core.building import load_artifact
from distill_core.errors import ArtifactError, Unavailable
from distillery_converter import onnx, parity, tensorrt
from distillery_converter.fields import field_graphs
from distillery_converter.graphs import Graph, in_half, load_graphs
from distillery_converter.targets import Target, find_target

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
        ConfigError: an unknown target or a bad tolerance. NotFound: no such model or version.
        ArtifactError: neither denoiser nor field, a damaged file, or outputs that differ too much from PyTorch.
        Unavailable: the target needs a GPU or a package that is not here, or the disk is full.
    """
    goal = find_target(target, tolerance=tolerance)
    source = store.manifest(ref)
    _require_convertible(source)
    versions = _tool_versions(goal)
    done = _converted(store, source, goal, versions)
    if done is not None:
        log.info("%s already holds %s, nothing to do", done.ref, goal.name)
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
            if source.kind == "field":
                graphs = field_graphs(folder, goal)
            else:
                graphs = load_graphs(folder, source, lambda ref: load_artifact(store, ref, cache))
            report = _export(folder, graphs, source, goal, versions, cache)
            on_progress(STEPS - 1, STEPS)
            published = store.publish(folder, _manifest(source, report, job), key=job)
    except OSError as error:
        raise Unavailable(
            f"cannot convert {source.ref}: {error.strerror or error}; see to the disk and retry"
        ) from None
    on_progress(STEPS, STEPS)
    return published


def _require_convertible(source: Manifest) -> None:
    if source.kind not in ("denoiser", "field"):
        raise ArtifactError(
            f"{source.ref} is of kind {source.kind}, and only denoisers and fields can be converted; "
            "`distillery models` shows the kinds",
            field="artifact",
        )


def _tool_versions(goal: Target) -> dict[str, str]:
    extra = tensorrt.tool_versions() if goal.runtime == "tensorrt" else {}
    return {**onnx.tool_versions(), **extra}


def _converted(
    store: ArtifactStore, source: Manifest, goal: Target, versions: dict[str, str]
) -> Manifest | None:
    """The newest version that is `source` or was made from it and has this export, made by the same tools."""
    for number in reversed(store.versions(source.name)):
        if number < source.version:
            return None
        found = store.manifest(f"{source.name}@{number}")
        report = found.exports.get(goal.name)
        related = found.version == source.version or found.parents == (source.ref,)
        if related and report is not None and report.tool_versions == versions and _passes(report, goal):
            return found
    return None


def _passes(report: ExportReport, goal: Target) -> bool:
    return report.tolerance <= goal.max_abs or report.max_abs_difference <= goal.max_abs


def _export(
    folder: Path, loaded: list[Graph], source: Manifest, goal: Target, versions: dict[str, str], cache: Path
) -> ExportReport:
    """Write `exports/<target>/` inside `folder`, compare every graph with PyTorch, and report."""
    started = time.perf_counter()
    exports = folder / "exports" / goal.name
    shutil.rmtree(exports, ignore_errors=True)  # by other tool versions
    found = parity.Parity(0.0, 0.0, 0.0)
    for graph, run in zip(loaded, _converted_graphs(loaded, exports, goal, cache), strict=True):
        found = found.worst(parity.compare(graph, run))
    log.info("%s as %s: max abs %.3g, rel-L2 %.3g", source.ref, goal.name, found.max_abs, found.rel_l2)
    parity.require(found, goal, model=source.ref)
    return ExportReport(
        target=goal.name,
        files=tuple(sorted(path.relative_to(folder).as_posix() for path in exports.iterdir())),
        opset=onnx.OPSET,
        max_abs_difference=found.max_abs,
        rel_l2=found.rel_l2,
        tolerance=goal.max_abs,
        batches=parity.BATCHES,
        seconds=round(time.perf_counter() - started, 3),
        tool_versions=versions,
    )


def _converted_graphs(loaded: list[Graph], exports: Path, goal: Target, cache: Path) -> list[parity.Run]:
    onnx_folder = (
        exports if goal.runtime == "onnx" else exports.parents[2] / "onnx"
    )  # beside the model: not published
    wanted = [in_half(graph) for graph in loaded] if goal.precision == "fp16" else loaded
    files = [onnx.export(graph, onnx_folder) for graph in wanted]
    if goal.runtime == "tensorrt":
        return tensorrt.build(files, loaded, exports, target=goal.name, cache=cache)
    return [parity.onnx_runner(path) for path in files]


def _manifest(source: Manifest, report: ExportReport, job: str) -> Manifest:
    changes = {"exports": {**source.exports, report.target: report}, "parents": (source.ref,), "job": job}
    return source.model_copy(update=changes)
