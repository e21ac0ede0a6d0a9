"""KD: a student learns the softened predictions of a larger classifier beside the labels.

    L = (1 - w) CE(z_s, y) + w D(z_s, z_t, y)
    kd     D = T^2 KL(p_t || p_s)                             p = softmax(z / T)     Hinton et al. 2015
    dkd    D = T^2 [a KL(b_t || b_s) + b KL(r_t || r_s)]      b: (p_y, 1 - p_y); r: p among the other classes
    dist   D = T^2 [1 - rho(p_s, p_t) + g mean_c (1 - rho_c)]   rho: correlation over the classes; rho_c: over the batch

z_s, z_t: logits of student and teacher for the same view of the same item; T temperature, w weight. dkd is of
Zhao et al. 2022, arXiv 2203.08679, dist of Huang et al. 2022, arXiv 2205.10536; both write CE + D, which is w = 0.5 at
twice the learning rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from distill_core.data import Source
from distill_core.losses.distillation import dist, dkd, reduced
from distill_core.method import Batch, Method, MethodConfig, Update
from distill_core.methods.recognition._students import (
    LABELLED,
    agreement,
    new_classifier,
    taught,
    use_classes_of,
)
from distill_core.recipe.tables import NetworkConfig


class Config(MethodConfig):
    temperature: float = Field(4.0, gt=0)  # Hinton et al. 2015 use 2 to 20
    weight: float = Field(0.9, ge=0, le=1)  # of the teacher's predictions; 0: the labels alone
    loss: Literal["kd", "dkd", "dist"] = "kd"  # D
    label_weight: float = Field(1.0, ge=0)  # dkd: a, of the label's part
    others_weight: float = Field(
        8.0, ge=0
    )  # dkd: b, of the other classes' part; the paper has 1 to 8 by pair
    class_weight: float = Field(1.0, ge=0)  # dist: g, of the correlation over the batch

    @model_validator(mode="after")
    def _of_its_loss(self) -> Self:
        for key, loss in {"label_weight": "dkd", "others_weight": "dkd", "class_weight": "dist"}.items():
            if self.loss != loss and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is of loss = {loss!r}, and loss is {self.loss!r}; leave it out")
        return self


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of logits (B, K), mean over the batch.

    The factor keeps the gradient's size as T grows (section 2.1 of the paper).
    """
    target = F.log_softmax(teacher / temperature, dim=1)
    predicted = F.log_softmax(student / temperature, dim=1)
    return temperature**2 * F.kl_div(predicted, target, reduction="batchmean", log_target=True)


class KD(Method):
    paper = "Hinton et al. 2015, Distilling the Knowledge in a Neural Network, arXiv 1503.02531"
    kind = "predictor"
    roles = ("student",)

    def __init__(self, config: Config, *, teacher: nn.Module, network: NetworkConfig, data: Source) -> None:
        super().__init__()
        self.config, self.teacher = config, teacher
        use_classes_of(teacher, data, "kd")
        self.student = new_classifier(network, data)

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return LABELLED

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        x, labels, weight = batch.columns["x0"], batch.columns["class_label"], self.config.weight
        logits = self.student(x)
        loss = (1 - weight) * F.cross_entropy(logits, labels)
        if weight:
            loss = loss + weight * self.distance(logits, taught(self.teacher, x), labels)
        yield Update("student", loss, agreement(logits, labels))

    def distance(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """D (scalar) of logits (B, K)."""
        config = self.config
        if config.loss == "dkd":
            weights = (config.label_weight, config.others_weight)
            return reduced(dkd(student, teacher, labels, config.temperature, weights))
        if config.loss == "dist":
            return reduced(dist(student, teacher, config.temperature, config.class_weight))
        return soft_cross_entropy(student, teacher, config.temperature)
