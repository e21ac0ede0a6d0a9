"""Diversity of a set of pictures."""

from __future__ import annotations

import torch
from torch import Tensor


def within_class_std(pictures: Tensor, labels: Tensor | None = None) -> float:
    """Root mean variance of a pixel among pictures of one class; (N, C, H, W), (N,). Classes count equally.

    A generator that repeats itself has less of it than the data. Without labels all pictures are one class.
    """
    flat = pictures.double().flatten(1)
    labels = torch.zeros(len(flat), dtype=torch.long) if labels is None else labels.cpu()
    variances = [flat[labels == label].var(0, correction=0).mean() for label in labels.unique()]
    return float(torch.stack(variances).mean().sqrt())
