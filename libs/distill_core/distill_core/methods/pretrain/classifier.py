"""Classifier: a network that names what a picture shows; its penultimate features judge generated pictures.

Paper: Szegedy et al. 2016, "Rethinking the Inception Architecture", arXiv 1512.00567, section 7.
Heusel et al. 2017, arXiv 1706.08500, judge generated pictures by such features.

    L = -sum_k q_k log p_k(x),    q_k = (1 - s) [k = label] + s / K,    s = label_smoothing
    balanced:        p = softmax(z + log n),   n_k items of class k      (Ren et al. 2020, arXiv 2007.10740)
    sam_radius r:    L at w + r g / |g|,       g = dL / dw               (Foret et al. 2021, arXiv 2010.01412)

The last two are for teachers of long-tailed data: rare classes count as much as others, and the minimum is flat.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.func import functional_call

from distill_core.config import DataTable
from distill_core.data import Source, build_source
from distill_core.data.classes import class_counts
from distill_core.errors import ConfigError, DataError, nearest
from distill_core.method import Batch, Method, MethodConfig, Update
from distill_core.metrics.classification import accuracy, calibration_error, negative_log_likelihood
from distill_core.networks.classifier import Classifier, ClassifierConfig, predict
from distill_core.networks.modes import evaluating
from distill_core.recipe.tables import EvaluateConfig, NetworkConfig


class Config(MethodConfig):
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    shift: int = Field(0, ge=0, le=64)  # random translation, pixels to each side; the border is repeated
    flip: bool = False  # random mirror image: right for photographs, wrong for digits
    noise: float = Field(0.0, ge=0, le=10)  # standard deviation of added noise, in data units
    balanced: bool = False  # whether rare classes are to count as much as others
    sam_radius: float = Field(0.0, ge=0, le=1)  # of sharpness-aware minimisation, e.g. 0.05; 0: off
    held_out: DataTable = {}  # what to change in [data] to get unseen data, e.g. { split = "test" }


def classification_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with label smoothing, mean over the batch. `logits` (B, K), `labels` (B,)."""
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def moved_uphill(loss: Tensor, weights: Mapping[str, Tensor], radius: float) -> dict[str, Tensor]:
    """`weights` by name, moved by `radius` in the direction in which `loss` grows most; gradients go to the weights."""
    gradients = torch.autograd.grad(loss, list(weights.values()))
    norm = torch.stack([value.square().sum() for value in gradients]).sum().sqrt()
    step = radius / (norm + 1e-12)
    return {name: value + step * up for (name, value), up in zip(weights.items(), gradients)}


def shifted(x: Tensor, shift: int) -> Tensor:
    """Each picture (B, C, H, W) moved by its own whole number of pixels, at most `shift` along each axis."""
    if shift == 0:
        return x
    b, _, h, w = x.shape
    padded = F.pad(x, (shift,) * 4, mode="replicate")
    top, left = torch.randint(0, 2 * shift + 1, (2, b, 1), device=x.device)
    rows, columns = torch.arange(h, device=x.device) + top, torch.arange(w, device=x.device) + left
    item = torch.arange(b, device=x.device)[:, None, None]
    return padded[item, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class ClassifierTraining(Method):
    paper = "Szegedy et al., 2016, Rethinking the Inception Architecture, arXiv 1512.00567"
    roles = ("classifier",)
    result = "classifier"
    kind = "predictor"

    def __init__(self, config: Config, *, network: NetworkConfig | None, data: Source) -> None:
        super().__init__()
        self.config = config
        self.data = data
        self.classifier = Classifier(_network_config(network, data))
        self.held_out = _held_out(data, config.held_out)
        self.priors = class_counts(data).log() if config.balanced else torch.zeros(())

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        x, labels = self.augmented(batch.columns["x0"]), batch.cond["class_label"]
        logits = self.classifier(x)
        loss = self.loss(logits, labels)
        if self.config.sam_radius:
            weights = moved_uphill(loss, dict(self.classifier.named_parameters()), self.config.sam_radius)
            loss = self.loss(functional_call(self.classifier, weights, (x,)), labels)
        yield Update("classifier", loss, {"train_accuracy": (logits.argmax(1) == labels).float().mean()})

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss (scalar) of logits (B, K) and labels (B,)."""
        if self.config.balanced:
            logits = logits + self.priors.to(logits)
        return classification_loss(logits, labels, self.config.label_smoothing)

    def augmented(self, x0: Tensor) -> Tensor:
        x = shifted(x0, self.config.shift)
        if self.config.flip:
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
        return x + self.config.noise * torch.randn_like(x) if self.config.noise else x

    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """Figures on the held-out part; without one only `train_accuracy`, which says little."""
        figures = {"train_accuracy": accuracy(*self._answers(self.data, config))}
        if self.held_out is not None:
            logits, labels = self._answers(self.held_out, config)
            figures["accuracy"] = accuracy(logits, labels)
            figures["negative_log_likelihood"] = negative_log_likelihood(logits, labels)
            figures["calibration_error"] = calibration_error(logits, labels)
        return figures

    def _answers(self, source: Source, config: EvaluateConfig) -> tuple[Tensor, Tensor]:
        real = source.all(config.num_samples)
        with evaluating(self.classifier):
            logits = predict(self.classifier, real.columns["x0"], batch_size=config.batch_size)[1]
        return logits, real.cond["class_label"]


def _network_config(network: NetworkConfig | None, data: Source) -> ClassifierConfig:
    if data.shape is None or data.num_classes is None:
        raise DataError(
            "a classifier needs pictures with labels, and this data has not both; choose labelled data",
            field="data.name",
        )
    if network is not None and network.name != "classifier":
        raise ConfigError(
            f"this method trains no network {network.name!r}{nearest(network.name, ['classifier'])}",
            field="network.name",
        )
    args = {} if network is None else network.args
    fixed = {"shape": data.shape, "num_classes": data.num_classes, "class_names": data.class_names}
    if taken := sorted(fixed.keys() & args.keys()):
        raise ConfigError(
            f"network.args.{taken[0]} follows from the data; remove it", field=f"network.args.{taken[0]}"
        )
    return ClassifierConfig.parse({**args, **fixed}, where="network.args")


def _held_out(data: Source, options: dict[str, Any]) -> Source | None:
    if not options:
        return None
    same = {} if "name" in options else data.config.model_dump(exclude_none=True)
    held_out = build_source({**same, **options})
    if held_out.shape != data.shape or held_out.class_names != data.class_names:
        raise DataError(
            f"held-out pictures are {held_out.shape} in {held_out.num_classes} classes, "
            f"the training data's {data.shape} in {data.num_classes}; check config.held_out",
            field="config.held_out",
        )
    return held_out
