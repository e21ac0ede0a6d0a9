"""PS-KD: a classifier is its own teacher; targets move from the labels towards what it said an epoch ago.

    L = -mean_i sum_c q_ic log p_ic,    q_i = (1 - alpha_e) onehot(y_i) + alpha_e M_i,    alpha_e = alpha (e + 1) / E
    M_i <- p_i                          of this very forward pass, so that the next epoch has it as its target

M: memory of predictions by item, the labels at first; e the epoch of E; alpha its last weight. alpha = 0 is training
on the labels. Computed as (1 - alpha_e) CE(z, y) + alpha_e CE(z, M), which is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from distill_core.data import Source
from distill_core.losses.distillation import reduced, soft_ce
from distill_core.method import Batch, Method, MethodConfig, Update
from distill_core.methods.recognition._memory import PredictionMemory
from distill_core.methods.recognition._schedules import Course, Epochs
from distill_core.methods.recognition._students import LABELLED, agreement, new_classifier
from distill_core.recipe.tables import NetworkConfig


class Config(MethodConfig):
    alpha: float = Field(
        0.8, ge=0, le=1
    )  # weight of its own predictions in the last epoch; the paper's is 0.8
    course: Course = (
        "linear"  # how alpha_e comes there: by epoch, as in the paper, or constant from the first on
    )


def progressive_loss(logits: Tensor, labels: Tensor, remembered: Tensor, alpha: float) -> Tensor:
    """Cross-entropy (scalar) of logits (B, K) with labels (B,) mixed with probabilities `remembered` (B, K)."""
    if not alpha:
        return F.cross_entropy(logits, labels)
    return (1 - alpha) * F.cross_entropy(logits, labels) + alpha * reduced(soft_ce(logits, remembered))


class PSKD(Method):
    paper = "Kim et al. 2021, Self-Knowledge Distillation with Progressive Refinement of Targets, arXiv 2006.12000"
    kind = "predictor"
    roles = ("student",)
    plan = "step"  # the memory is of real items

    def __init__(
        self, config: Config, *, network: NetworkConfig, data: Source, steps: int, batch_size: int
    ) -> None:
        super().__init__()
        self.config = config
        self.epochs = Epochs(data.order.epoch, batch_size, steps)
        self.student = new_classifier(network, data)
        self.memory = PredictionMemory(data)

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return LABELLED

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        labels, alpha = batch.columns["class_label"], self.alpha(step)
        logits = self.student(batch.columns["x0"])
        loss = progressive_loss(logits, labels, self.memory.at(batch.index), alpha)
        self.memory.put(batch.index, logits.float().softmax(1))
        yield Update("student", loss, {"alpha": alpha, **agreement(logits, labels)})

    def alpha(self, step: int) -> float:
        """The weight of the memory in the epoch of a step."""
        return self.epochs.weight(self.config.alpha, step, self.config.course)

    def state(self) -> dict[str, Tensor]:
        return self.memory.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.memory.load_state(state)
