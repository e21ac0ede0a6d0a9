"""Likeness of two pictures. Figures are per picture; a set's figure is the mean over its pictures."""

from __future__ import annotations

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from distill_core.errors import DataError

SSIM_WINDOW = 11  # what sigma 1.5 gives


def _checked(prediction: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if prediction.shape != target.shape or prediction.ndim != 3:
        raise DataError(
            f"pictures of shapes {prediction.shape} and {target.shape} cannot be compared; give (H, W, C)"
        )
    return np.clip(prediction, 0, 1).astype(np.float64), np.clip(target, 0, 1).astype(np.float64)


def psnr(prediction: np.ndarray, target: np.ndarray, known: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB of pictures (H, W, C) in [0, 1], after clamping; infinite if equal.

    `known` (H, W) are the pixels that count; None: all.
    """
    prediction, target = _checked(prediction, target)
    if known is not None:
        prediction, target = prediction[known], target[known]
    if np.array_equal(prediction, target):
        return float("inf")
    return float(peak_signal_noise_ratio(target, prediction, data_range=1.0))  # type: ignore[no-untyped-call]


def ssim(prediction: np.ndarray, target: np.ndarray, known: np.ndarray | None = None) -> float:
    """Structural similarity of pictures (H, W, C) in [0, 1], mean over channels and the `known` pixels (H, W).

    Gaussian window 11x11, sigma 1.5, K 0.01 and 0.03, data range 1.

    Raises:
        DataError: a picture smaller than the window.
    """
    prediction, target = _checked(prediction, target)
    if min(target.shape[:2]) < SSIM_WINDOW:
        raise DataError(
            f"SSIM needs pictures of at least {SSIM_WINDOW} pixels per side, not {target.shape[:2]}"
        )
    options = {"channel_axis": -1, "data_range": 1.0, "gaussian_weights": True, "sigma": 1.5}
    mean, places = structural_similarity(  # type: ignore[no-untyped-call]
        target, prediction, use_sample_covariance=False, full=True, **options
    )
    if known is None:
        return float(mean)
    margin = SSIM_WINDOW // 2  # windows that reach over the edge are left out, as they are of the mean
    inside = np.zeros_like(known)
    inside[margin:-margin, margin:-margin] = True
    return float(places[known & inside if (known & inside).any() else known].mean())


def depth_error(prediction: np.ndarray, target: np.ndarray, covered: np.ndarray) -> float:
    """Mean absolute difference of distances (H, W), in their unit, over the pixels that are `covered` (H, W) in truth.

    Raises:
        DataError: the shapes differ, or no pixel is covered.
    """
    if not prediction.shape == target.shape == covered.shape:
        raise DataError(f"distances of shapes {prediction.shape} and {target.shape} cannot be compared")
    if not covered.any():
        raise DataError("no pixel of the true picture shows anything, so there is no depth to compare")
    return float(np.abs(prediction.astype(np.float64) - target)[covered].mean())
