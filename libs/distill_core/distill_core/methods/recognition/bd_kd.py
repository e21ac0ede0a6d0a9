"""BD-KD: a small and a large classifier learn at once from labels and each other; surer items cover, others seek.

    L_student = CE(z_s, y) + b mean_i [ v_i^F KL(p_t || p_s) + v_i^R KL(p_s || p_t) ]
    L_peer    = CE(z_t, y) + b mean_i KL(p_t || p_s)
    (v^F, v^R) = (1, d)  where H(p_s) > H(p_t), the student is less sure than its peer;  (d, 1)  elsewhere

p = softmax(z / T), every divergence times T^2. Both see the same batch, both losses are of the weights before either
is stepped, and each takes the other's logits as constants. d = 1 weights both directions alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from distill_core.data import Source
from distill_core.losses.distillation import entropy, kl, reduced, reverse_kl
from distill_core.method import Batch, Method, MethodConfig, Model, Update
from distill_core.methods.recognition._students import LABELLED, agreement, new_classifier
from distill_core.recipe.tables import NetworkConfig


class Config(MethodConfig):
    peer: NetworkConfig  # the large network; [network] is the student's
    temperature: float = Field(3.0, gt=0)  # the paper's is not known
    weight: float = Field(1.0, ge=0)  # b; 0: both learn from the labels alone
    balance: float = Field(2.0, ge=1)  # d
    divergences: Literal["balanced", "forward"] = (
        "balanced"  # forward: KL(other || own) for both, mutual learning
    )


def balanced_loss(student: Tensor, peer: Tensor, temperature: float, balance: float) -> Tensor:
    """(B,) both divergences of logits (B, K), of which `peer`'s are constant, each with the weight of its item."""
    peer = peer.detach()
    unsure = entropy(student, temperature) > entropy(peer, temperature)
    forward = torch.where(unsure, 1.0, balance)
    back = torch.where(unsure, balance, 1.0)
    return forward * kl(student, peer, temperature) + back * reverse_kl(student, peer, temperature)


class BDKD(Method):
    paper = "Amara et al. 2022, BD-KD: Balancing the Divergences for Online Knowledge Distillation, arXiv 2212.12965"
    kind = "predictor"
    roles = ("student", "peer")

    def __init__(self, config: Config, *, network: NetworkConfig, data: Source) -> None:
        super().__init__()
        self.config = config
        self.student = new_classifier(network, data)
        self.peer = new_classifier(config.peer, data, field="config.peer")

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return LABELLED

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        x0, labels = batch.columns["x0"], batch.columns["class_label"]
        student, peer = self.student(x0), self.peer(x0)
        of_student, of_peer = self.losses(student, peer)
        losses = F.cross_entropy(student, labels) + of_student, F.cross_entropy(peer, labels) + of_peer
        yield Update("student", losses[0], agreement(student, labels))
        yield Update("peer", losses[1])

    def losses(self, student: Tensor, peer: Tensor) -> tuple[Tensor, Tensor]:
        """What each pays (scalars) for its difference from the other."""
        config = self.config
        if config.divergences == "forward":
            own = kl(student, peer.detach(), config.temperature)
            others = kl(peer, student.detach(), config.temperature)
        else:
            own = balanced_loss(student, peer, config.temperature, config.balance)
            others = reverse_kl(peer, student.detach(), config.temperature)
        return config.weight * reduced(own), config.weight * reduced(others)

    def published(self) -> Mapping[str, Model]:
        return {"student": self.student, "peer": self.peer}

    def references(self) -> Mapping[str, Any]:
        return {"peer": self.peer}
