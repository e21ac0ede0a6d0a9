"""KD: a student learns the softened predictions of a larger classifier beside the labels.

    L = (1 - w) CE(z_s, y) + w T^2 KL(softmax(z_t / T) || softmax(z_s / T))

z_s, z_t: logits of student and teacher for the same view of the same item; T temperature, w weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from distill_core.data import Source
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
            loss = loss + weight * soft_cross_entropy(
                logits, taught(self.teacher, x), self.config.temperature
            )
        yield Update("student", loss, agreement(logits, labels))
