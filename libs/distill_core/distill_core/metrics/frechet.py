"""Distances between two sets of features: Fréchet distance, coverage, precision, recall. All in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_core.errors import DataError

_CHUNK = 1024  # rows of a distance matrix held at once


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance between the Gaussians fitted to two sets of features, (N, D) and (M, D).

    |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), Heusel et al. 2017, arXiv 1706.08500. The root's trace is the
    sum of the singular values of A^(1/2) B^(1/2): right for singular covariances, where a general root fails.

    Raises:
        DataError: fewer than two rows, different widths, or values that are not finite.
    """
    a, b = _checked(features_a, features_b, at_least=2)
    cov_a, cov_b = _covariance(a), _covariance(b)
    cross = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(float(distance), 0.0)  # rounding can leave -1e-15 for equal sets


def _covariance(features: Tensor) -> Tensor:
    centred = features - features.mean(0)
    return centred.T @ centred / (len(features) - 1)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def coverage(real: Tensor, fake: Tensor, k: int = 5) -> float:
    """Share of real samples whose ball, up to the k-th nearest other real sample, holds a generated one.

    Naeem et al. 2020, arXiv 2002.09797. Near 1 for a generator that misses nothing, 0 for one elsewhere.
    """
    real, fake = _checked(real, fake, at_least=k + 1)
    nearest = torch.cat([torch.cdist(rows, fake).amin(1) for rows in real.split(_CHUNK)])
    return float((nearest <= _radii(real, k)).double().mean())


def precision_recall(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Shares of generated samples in a real ball, and of real ones in a generated ball (arXiv 1904.06991)."""
    real, fake = _checked(real, fake, at_least=k + 1)
    return _share_inside(fake, real, k), _share_inside(real, fake, k)


def _share_inside(points: Tensor, centres: Tensor, k: int) -> float:
    radii = _radii(centres, k)
    inside = [(torch.cdist(rows, centres) <= radii).any(1) for rows in points.split(_CHUNK)]
    return float(torch.cat(inside).double().mean())


def _radii(points: Tensor, k: int) -> Tensor:
    """Distance of each point to its k-th nearest other point; the nearest of all is the point itself."""
    return torch.cat(
        [torch.cdist(rows, points).kthvalue(k + 1, dim=1).values for rows in points.split(_CHUNK)]
    )


def _checked(a: Tensor, b: Tensor, *, at_least: int) -> tuple[Tensor, Tensor]:
    a, b = torch.as_tensor(a).detach().double(), torch.as_tensor(b).detach().double()
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise DataError(
            f"features of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared; both are (N, D)"
        )
    if min(len(a), len(b)) < at_least:
        raise DataError(
            f"{min(len(a), len(b))} samples are too few for this figure; give at least {at_least}"
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise DataError("features hold NaN or infinity; the images that they were made from are not finite")
    return a, b
