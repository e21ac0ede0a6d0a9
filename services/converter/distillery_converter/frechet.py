"""Are a converted model's pictures as good? The Fréchet distance of its samples, over that of PyTorch's own.

Both are compared with the pictures of the data that the model's recipe names, where this machine has them. Elsewhere
with other samples of the PyTorch model, which asks for more: the distance before is then what another noise alone
makes, the smallest there is.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

from distill_core.artifacts import FrechetReport
from distill_core.data import build_source
from distill_core.errors import ArtifactError, DistilleryError
from distill_core.metrics.frechet import FeatureSet, frechet_distance
from distill_core.recipe import load_recipe
from distillery_converter.calibration import CalibrationTrajectory, Run
from distillery_converter.targets import Target

SAMPLES = 512  # of each set, at most
FEWEST = 64  # below it the distance says little, and it is not measured
SECONDS = 120.0  # that all sets may take, about
BATCH = 16
CELLS = 8  # a side
SEED, REFERENCE_SEED = 20_260_103, 20_260_104
FEATURES = f"mean and deviation of {CELLS}x{CELLS} cells"

RECIPE = "recipe.toml"  # of a model's folder: what trained it

log = logging.getLogger(__name__)


class Real(NamedTuple):
    """Pictures (N, C, H, W) that a model was trained for, and their name."""

    pictures: np.ndarray
    name: str


class Side(NamedTuple):
    """A denoiser, and the decoder of latent models."""

    denoise: Run
    decode: Run | None


def compare_samples(
    trajectory: CalibrationTrajectory,
    before: Side,
    after: Side,
    *,
    real: Real | None = None,
    seconds: float = SECONDS,
) -> FrechetReport | None:
    """The distances of `before`'s and `after`'s samples to the reference; None where samples are too dear.

    Samples take the fewest steps that the model allows; the noise is the same before and after.
    """
    count = _affordable(trajectory, before, after, seconds)
    if count < FEWEST:
        log.info("Fréchet distance left out: %d samples in %.0f s are too few", count, seconds)
        return None
    if real is not None:
        reference, name = FeatureSet(features(real.pictures)), real.name
    else:
        reference, name = _features(trajectory, before, REFERENCE_SEED, count), "other samples of the model"
    distances = [
        frechet_distance(reference, _features(trajectory, side, SEED, count)) for side in (before, after)
    ]
    return FrechetReport(
        before=distances[0],
        after=distances[1],
        ratio=distances[1] / max(distances[0], 1e-12),
        samples=count,
        num_steps=trajectory.fewest_steps,
        features=FEATURES,
        reference=name,
    )


def real_pictures(folder: Path, shape: tuple[int, int, int]) -> Real | None:
    """Pictures of `shape` of the data that the model in `folder` was trained for; None where they are not here."""
    file = folder / RECIPE
    try:
        recipe = load_recipe(file) if file.is_file() else None
        if recipe is None or recipe.data is None:
            return None
        source = build_source(recipe.data)
        if source.pixels is None or source.shape != shape or source.size < FEWEST:
            return None
        pictures = source.pixels.take(source.picked(SAMPLES)).numpy()
    except DistilleryError as error:  # e.g. a folder of the machine that trained it
        log.info("the model's own data is not used: %s", error)
        return None
    return Real(pictures, f"{len(pictures)} pictures of the data {recipe.data['name']!r}")


def require(report: FrechetReport | None, target: Target, *, model: str) -> None:
    """Refuse a conversion whose samples are worse than the target allows.

    Raises:
        ArtifactError: they are; the sentence gives the figures.
    """
    if report is None or target.frechet_ratio is None or report.ratio <= target.frechet_ratio:
        return
    raise ArtifactError(
        f"{model} as {target.name} makes other pictures: their Fréchet distance is {report.after:.3g} where that of "
        f"PyTorch's is {report.before:.3g}, {report.ratio:.3f} times it (allowed {target.frechet_ratio:g}; "
        f"{report.samples} samples, {report.features}, {report.reference}), so nothing was published; "
        "choose a target of higher precision",
        field="target",
    )


def features(pictures: np.ndarray) -> torch.Tensor:
    """(B, 2 C K) of pictures (B, C, H, W): mean and standard deviation inside each of at most 8 x 8 cells."""
    x = torch.from_numpy(pictures).double()
    cells = min(CELLS, x.shape[2]), min(CELLS, x.shape[3])
    mean = adaptive_avg_pool2d(x, cells)
    spread = (adaptive_avg_pool2d(x.square(), cells) - mean.square()).clamp_min(0).sqrt()
    return torch.cat([mean.flatten(1), spread.flatten(1)], 1)


def _affordable(trajectory: CalibrationTrajectory, before: Side, after: Side, seconds: float) -> int:
    """Samples of each set that fit into the time: two sets by `before`, one by `after`, after a first try of each."""
    spent = 0.0
    for side, sets in ((before, 2), (after, 1)):
        _pictures(trajectory, side, SEED, range(1))
        started = time.perf_counter()
        _pictures(trajectory, side, SEED, range(BATCH))
        spent += sets * (time.perf_counter() - started) / BATCH
    return min(SAMPLES, int(seconds / spent) // BATCH * BATCH)


def _features(trajectory: CalibrationTrajectory, side: Side, seed: int, count: int) -> FeatureSet:
    parts = (range(start, start + BATCH) for start in range(0, count, BATCH))
    return FeatureSet(torch.cat([features(_pictures(trajectory, side, seed, part)) for part in parts]))


def _pictures(trajectory: CalibrationTrajectory, side: Side, seed: int, indices: range) -> np.ndarray:
    x0 = trajectory.x0(side.denoise, seed=seed, indices=indices, num_steps=trajectory.fewest_steps)
    return np.clip(side.decode({"x0": x0}) if side.decode else x0, -1, 1)
