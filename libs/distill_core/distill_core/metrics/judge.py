"""The judge: a classifier that tells how far generated pictures are from real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from distill_core.errors import DataError
from distill_core.method import Batch
from distill_core.metrics.classification import accuracy
from distill_core.metrics.extractors import fingerprint
from distill_core.metrics.frechet import set_figures
from distill_core.networks.classifier import Classifier, load_classifier, predict


class Judge:
    """Figures of pictures in one classifier's feature space. Figures of two judges cannot be compared."""

    def __init__(
        self, classifier: Classifier, *, batch_size: int = 256, described: str = "classifier"
    ) -> None:
        self.classifier = classifier.eval()
        self.batch_size, self.described = batch_size, described

    def to(self, device: torch.device | str) -> Self:
        self.classifier.to(device)
        return self

    def figures(self, images: Tensor, labels: Tensor | None, real: Batch) -> dict[str, float]:
        """`set_figures` of `images` (N, C, H, W) in [-1, 1] against `real`.

        With `labels` (N,), also `accuracy`: the share of images in which the judge sees the label asked for.

        Raises:
            DataError: pictures of another shape than the judge's, not finite, or nothing to compare with.
        """
        if real.x0 is None:
            raise DataError(
                "the data has no pictures to compare generated ones with; choose data that has",
                field="data.name",
            )
        features, logits = self.predict(images, "generated pictures")
        figures = set_figures(self.features(real.x0, "the data's pictures"), features)
        if labels is not None:
            figures["accuracy"] = self.accuracy(logits, labels)
        return figures

    def features(self, images: Tensor, what: str = "the pictures") -> Tensor:
        """(N, D) on the CPU."""
        return self.predict(images, what)[0]

    def predict(self, images: Tensor, what: str = "the pictures") -> tuple[Tensor, Tensor]:
        """Features (N, D) and logits (N, K) on the CPU; `what` is what an error calls the images.

        Raises:
            DataError: pictures of another shape than the judge's, or not finite.
        """
        if tuple(images.shape[1:]) != self.classifier.shape:
            raise DataError(
                f"{what} have the shape {tuple(images.shape[1:])}, this judge reads {self.classifier.shape}; "
                "train a judge on data of that shape and set evaluate.judge",
                field="evaluate.judge",
            )
        if not images.isfinite().all():
            raise DataError(f"{what} hold NaN or infinity and cannot be judged")
        return predict(self.classifier, images.float(), batch_size=self.batch_size)

    def accuracy(self, logits: Tensor, labels: Tensor) -> float:
        """Share of answers (N, K) whose highest logit is the label (N,) asked for.

        Raises:
            DataError: labels that the judge does not know, or not one for each picture.
        """
        if len(labels) != len(logits) or int(labels.max()) >= logits.shape[1] or int(labels.min()) < 0:
            raise DataError(
                f"{len(labels)} labels up to {int(labels.max())} do not fit {len(logits)} pictures "
                f"and a judge of {logits.shape[1]} classes; train a judge on the same data",
                field="evaluate.judge",
            )
        return accuracy(logits, labels.cpu())


def load_judge(folder: Path, *, device: str = "cpu") -> Judge:
    """The judge in `folder`, as the recipes judge_digits and judge_cifar10 publish it.

    Raises:
        ArtifactError: not a classifier's folder, or a damaged one.
    """
    classifier = load_classifier(Path(folder), device=device)
    return Judge(classifier, described=f"classifier, sha256 {fingerprint(Path(folder))}")
