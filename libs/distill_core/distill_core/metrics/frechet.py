"""Figures of two sets of features (N, D), real and generated, in float64 and in memory linear in N.

    Fréchet distance   |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2))                                  arXiv 1706.08500
    kernel distance    E k(a, a') + E k(b, b') - 2 E k(a, b),   k(x, y) = (x.y / D + 1)^3         arXiv 1801.01401
    precision          share of generated samples inside the ball of some real one                arXiv 1904.06991
    recall             share of real samples inside the ball of some generated one
    density            mean number of real balls around a generated sample, over k                arXiv 2002.09797
    coverage           share of real samples whose ball holds a generated one

A sample's ball reaches to its k-th nearest other sample of the same set.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from distill_core.errors import DataError

NEIGHBOURS = 5  # k of the balls, as in arXiv 2002.09797
_ENTRIES = 2**24  # of a matrix of all pairs held at once: 128 MiB


class Neighbours(NamedTuple):
    """Figures of the second of two sets by balls around the samples of both."""

    precision: float
    recall: float
    density: float
    coverage: float


class FeatureSet:
    """One set's features (N, D), with what comparisons need of them computed once.

    Raises:
        DataError: not (N, D), or values that are not finite.
    """

    def __init__(self, features: Tensor) -> None:
        self.values = torch.as_tensor(features).detach().double()
        if self.values.ndim != 2:
            raise DataError(f"features of shape {tuple(features.shape)} cannot be compared; they are (N, D)")
        if not self.values.isfinite().all():
            raise DataError(
                "features hold NaN or infinity; the images that they were made from are not finite"
            )

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def mean(self) -> Tensor:
        """(D,)."""
        return self.values.mean(0)

    @cached_property
    def covariance_root(self) -> Tensor:
        """The symmetric root of the covariance (D, D); its square's trace is the total variance."""
        centred = self.values - self.mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / (len(centred) - 1))
        root: Tensor = vectors * values.clamp_min(0).sqrt() @ vectors.T
        return root

    @cached_property
    def radii(self) -> Tensor:
        """(N,) distance of each sample to its k-th nearest other one; the nearest of all is the sample itself."""
        return torch.cat(
            [
                torch.cdist(rows, self.values).kthvalue(NEIGHBOURS + 1, dim=1).values
                for rows in _rows(self, self)
            ]
        )

    @cached_property
    def likeness(self) -> float:
        """Mean kernel of all pairs of different samples."""
        alike = (self.values.square().sum(1) / self.values.shape[1] + 1).pow(3).sum()
        return float((_kernel_sum(self, self) - alike) / (len(self) * (len(self) - 1)))


def _rows(of: FeatureSet, against: FeatureSet) -> Iterator[Tensor]:
    yield from of.values.split(max(1, _ENTRIES // len(against)))


def _kernel_sum(a: FeatureSet, b: FeatureSet) -> Tensor:
    return torch.stack([(rows @ b.values.T / rows.shape[1] + 1).pow(3).sum() for rows in _rows(a, b)]).sum()


def frechet_distance(real: FeatureSet | Tensor, fake: FeatureSet | Tensor) -> float:
    """Fréchet distance between the Gaussians fitted to two sets of features.

    The trace of the root of A B is the sum of the singular values of A^(1/2) B^(1/2): right for singular
    covariances, where a general root fails.

    Raises:
        DataError: fewer than two rows, different widths, or values that are not finite.
    """
    a, b = _comparable(real, fake, at_least=2)
    cross = torch.linalg.svdvals(a.covariance_root @ b.covariance_root).sum()
    spread = a.covariance_root.square().sum() + b.covariance_root.square().sum()
    distance = (a.mean - b.mean).square().sum() + spread - 2 * cross
    return max(float(distance), 0.0)  # rounding can leave -1e-15 for equal sets


def kernel_distance(real: FeatureSet | Tensor, fake: FeatureSet | Tensor) -> float:
    """Kernel distance (KID) over all pairs: unbiased, so slightly below 0 at times for sets of one distribution."""
    a, b = _comparable(real, fake, at_least=2)
    return a.likeness + b.likeness - 2 * float(_kernel_sum(a, b)) / (len(a) * len(b))


def neighbours(real: FeatureSet | Tensor, fake: FeatureSet | Tensor) -> Neighbours:
    """Precision, recall, density and coverage, all with the same k.

    Raises:
        DataError: no more than k rows, different widths, or values that are not finite.
    """
    a, b = _comparable(real, fake, at_least=NEIGHBOURS + 1)
    around = torch.zeros(
        len(b), dtype=torch.long, device=b.values.device
    )  # real balls around each generated one
    covered, recalled, begin = [], [], 0
    for rows in _rows(a, b):
        distances = torch.cdist(rows, b.values)
        held = distances <= a.radii[begin : begin + len(rows), None]
        around += held.sum(0)
        covered.append(held.any(1))
        recalled.append((distances <= b.radii).any(1))
        begin += len(rows)
    return Neighbours(
        precision=_share(around > 0),
        recall=_share(torch.cat(recalled)),
        density=float(around.double().mean() / NEIGHBOURS),
        coverage=_share(torch.cat(covered)),
    )


def set_figures(real: FeatureSet | Tensor, fake: FeatureSet | Tensor) -> dict[str, float]:
    """All figures of this module by name."""
    real, fake = _comparable(real, fake, at_least=NEIGHBOURS + 1)
    return {
        "frechet_distance": frechet_distance(real, fake),
        "kernel_distance": kernel_distance(real, fake),
        **neighbours(real, fake)._asdict(),
    }


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())


def _comparable(
    a: FeatureSet | Tensor, b: FeatureSet | Tensor, *, at_least: int
) -> tuple[FeatureSet, FeatureSet]:
    a, b = (features if isinstance(features, FeatureSet) else FeatureSet(features) for features in (a, b))
    if a.values.shape[1] != b.values.shape[1]:
        raise DataError(
            f"features of shapes {tuple(a.values.shape)} and {tuple(b.values.shape)} cannot be compared; "
            "both are (N, D) of one extractor"
        )
    if min(len(a), len(b)) < at_least:
        raise DataError(
            f"{min(len(a), len(b))} samples are too few for this figure; give at least {at_least}"
        )
    return a, b
