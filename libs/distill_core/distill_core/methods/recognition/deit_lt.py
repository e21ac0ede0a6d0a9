"""DeiT-LT: a transformer on long-tailed data; its class token knows the head, its distillation token the tail.

    L = 1/2 CE(z_cls, mixed smoothed label) + 1/2 CE(z_dist, argmax z_t)                  until the share `switch`
    L = 1/2 CE(z_cls, y) + 1/2 mean_i w_(t_i) CE(z_dist, t_i),  t = argmax z_t            after it, nothing is mixed
    w_c ~ (1 - beta) / (1 - beta^(n_c)),  sum_c w_c = K                                   n_c items of class c

The teacher, a convolutional network trained on the same items for rare classes and a flat minimum, is asked about the
very pictures that the student sees, mixed ones too: it does not know them. The answer is the mean of both heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from distill_core.data import Source
from distill_core.data.classes import class_counts
from distill_core.errors import ConfigError
from distill_core.losses.distillation import hard_ce, reduced, soft_ce
from distill_core.method import Batch, Method, MethodConfig, Update
from distill_core.methods.recognition._mixing import mixed_batch
from distill_core.methods.recognition._students import (
    LABELLED,
    agreement,
    new_classifier,
    taught,
    use_classes_of,
)
from distill_core.networks.predictor import Predictor
from distill_core.recipe.tables import NetworkConfig

HEADS = ("class_token", "distillation_token")


class Config(MethodConfig):
    switch: float = Field(
        0.92, gt=0, le=1
    )  # share of the steps before re-weighting; the paper's 1100 of 1200 epochs
    beta: float = Field(0.9999, ge=0, lt=1)  # of the effective number of items; 0: all classes alike
    label_smoothing: float = Field(0.1, ge=0, lt=1)  # of the labels while pictures are mixed
    mixup: float = Field(0.8, ge=0, le=8)  # alpha of its Beta distribution; 0: off
    cutmix: float = Field(1.0, ge=0, le=8)  # the same
    teacher_sees: Literal["mixed", "clean"] = "mixed"  # clean: the pictures before they are mixed
    weight: float = Field(0.5, ge=0, le=1)  # of the distillation token; 0: no teacher


def effective_number_weights(counts: Tensor, beta: float) -> Tensor:
    """Weights (K,) of classes with `counts` items, inverse to the effective number of these; their sum is K."""
    weights = (1 - beta) / (1 - torch.pow(torch.as_tensor(beta, dtype=torch.float64), counts.double()))
    return (weights / weights.sum() * len(counts)).float()


class DeiTLT(Method):
    paper = (
        "Rangwani et al. 2024, DeiT-LT: Distillation Strikes Back for Vision Transformer Training on Long-Tailed "
        "Datasets, arXiv 2404.02900"
    )
    kind = "predictor"
    roles = ("student",)
    weights: Tensor

    def __init__(
        self, config: Config, *, teacher: nn.Module, network: NetworkConfig, data: Source, steps: int
    ) -> None:
        super().__init__()
        self.config, self.teacher = config, teacher
        use_classes_of(teacher, data, "deit_lt")
        self.student = new_classifier(network, data)
        if not hasattr(self.student.network, "heads"):
            raise ConfigError(
                "deit_lt needs a network with a distillation token; set network.name = "
                f"'DeiTForImageClassificationWithTeacher', not {network.name!r}",
                field="network.name",
            )
        self.first_weighted = round(config.switch * steps)
        weights = effective_number_weights(class_counts(data), config.beta)
        self.register_buffer("weights", weights, persistent=False)

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return LABELLED

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        x0, labels, config = batch.columns["x0"], batch.columns["class_label"], self.config
        weighted = step >= self.first_weighted
        seen, target = x0, F.one_hot(labels, len(self.weights)).float()
        if not weighted:
            smoothed = target * (1 - config.label_smoothing) + config.label_smoothing / len(self.weights)
            seen, target = mixed_batch(x0, smoothed, config.mixup, config.cutmix)
        by_class, by_teacher = self.heads(seen)
        loss = (1 - config.weight) * reduced(soft_ce(by_class, target))
        if config.weight:
            wanted = taught(self.teacher, seen if config.teacher_sees == "mixed" else x0)
            items = self.weights[wanted.argmax(1)] if weighted else None
            loss = loss + config.weight * reduced(hard_ce(by_teacher, wanted), items)
        yield Update("student", loss, agreement((by_class + by_teacher) / 2, labels))

    def heads(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) of the class token and of the distillation token."""
        both: tuple[Tensor, Tensor] = self.student.network.heads(x0)  # type: ignore[operator]
        return both

    def references(self) -> Mapping[str, Any]:
        """The teacher, and the answers of either token alone."""
        alone = {name: Predictor(_Head(self.student.network, number), self.student.described)
                 for number, name in enumerate(HEADS)}  # fmt: skip
        return {"teacher": self.teacher, **alone}


class _Head(nn.Module):
    """One head of a network with two."""

    def __init__(self, network: nn.Module, number: int) -> None:
        super().__init__()
        self.network, self.number = network, number

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.network.heads(image)[self.number]  # type: ignore[operator]
        return logits
