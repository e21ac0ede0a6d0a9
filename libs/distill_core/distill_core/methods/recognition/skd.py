"""SKD: signal knowledge distillation: a small network of radio frames learns from a convolutional transformer.

    L = (1 - w) CE(z_s, y) + w T^2 KL(softmax(z_t / T) || softmax(z_s / T))

z_s, z_t: logits of student and teacher for the same I/Q frame (2, L); T temperature, w weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from distill_core.data import Source
from distill_core.losses.distillation import kl, reduced
from distill_core.method import Batch, Method, MethodConfig, Update
from distill_core.methods.recognition._students import agreement, taught, use_classes_of
from distill_core.networks.new_classifier import classifier_of_column
from distill_core.recipe.tables import NetworkConfig

COLUMN = "iq"


class Config(MethodConfig):
    temperature: float = Field(4.0, gt=0)  # the paper's is not given in its abstract; that of others, 1 to 10
    weight: float = Field(0.7, ge=0, le=1)  # of the teacher's predictions; 0: the labels alone


class SKD(Method):
    paper = (
        "Hou et al. 2023, ClST: A Convolutional Transformer Framework for Automatic Modulation Recognition by "
        "Knowledge Distillation, arXiv 2312.17446"
    )
    kind = "predictor"
    roles = ("student",)

    def __init__(self, config: Config, *, teacher: nn.Module, network: NetworkConfig, data: Source) -> None:
        super().__init__()
        self.config, self.teacher = config, teacher
        use_classes_of(teacher, data, "skd", COLUMN)
        self.student = classifier_of_column(network, data, COLUMN)

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return {COLUMN: "the frames that teacher and student see", "class_label": "the cross-entropy"}

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        frames, labels = batch.columns[COLUMN], batch.columns["class_label"]
        logits = self.student(frames)
        yield Update("student", self.loss(logits, frames, labels), agreement(logits, labels))

    def loss(self, logits: Tensor, frames: Tensor, labels: Tensor) -> Tensor:
        """The loss (scalar) of the student's logits (B, K) for frames (B, 2, L)."""
        config = self.config
        loss = (1 - config.weight) * F.cross_entropy(logits, labels)
        if config.weight:
            soft = kl(logits, taught(self.teacher, frames, COLUMN), config.temperature)
            loss = loss + config.weight * reduced(soft)
        return loss
