"""Stored soft labels of crops: the likeliest classes of each, and how they become probabilities again.

An item has n crops, each with its box (shares of the picture: top, left, height, width), whether it is mirrored, and
the k likeliest classes with their probabilities. The rest of the mass is spread evenly over the other classes.
"""

from __future__ import annotations

from torch import Tensor

CROP, FLIP, CLASSES, VALUES = "crop", "flip", "soft_classes", "soft_values"
STORED = {
    CROP: "the crops that the teacher saw",
    FLIP: "which of them are mirrored",
    CLASSES: "the teacher's likeliest classes",
    VALUES: "their probabilities",
}


def compressed(logits: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The `top` likeliest classes (…, k) int32 of logits (…, K), and their probabilities, float16."""
    values, classes = logits.float().softmax(-1).topk(top, dim=-1)
    return classes.int(), values.half()


def decompressed(classes: Tensor, values: Tensor, num_classes: int) -> Tensor:
    """Probabilities (…, K) of stored classes and values (…, k): (1 - sum) / (K - k) for every other class."""
    values, others = values.float(), num_classes - classes.shape[-1]
    rest = (1 - values.sum(-1, keepdim=True)).clamp_min(0) / max(others, 1)
    return rest.expand(*rest.shape[:-1], num_classes).scatter(-1, classes.long(), values)
