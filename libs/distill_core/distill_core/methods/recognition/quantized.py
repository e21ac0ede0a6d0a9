"""Quantised distillation: a student learns from a teacher with the weights of few bits that it will have.

    L = w T^2 KL(p_t || p_s) + (1 - w) CE(z_s, y),    z_s = f(x; Q(theta)),    theta <- theta - eta dL/dQ(theta)

Q rounds each weight to one of 2^bits equally spaced points between the least and the largest of its bucket. The
gradient, taken at Q(theta), is applied to the weights before rounding, so that small steps add up (straight-through).
What is published has the weights Q(theta), and its file their codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.func import functional_call

from distill_core.data import Source
from distill_core.method import Batch, Method, Model, Update
from distill_core.methods.recognition._quantized import (
    QuantizedConfig,
    sizes,
    taught_loss,
    weights_to_quantize,
)
from distill_core.methods.recognition._students import (
    LABELLED,
    agreement,
    new_classifier,
    taught,
    use_classes_of,
)
from distill_core.networks.packing import pack, quantized, uniform_points
from distill_core.networks.predictor import Predictor
from distill_core.recipe.tables import EvaluateConfig, NetworkConfig


class Config(QuantizedConfig):
    straight_through: bool = True  # False: trained in full precision, rounded once at the end


class Quantized(Method):
    paper = "Polino et al. 2018, Model compression via distillation and quantization, arXiv 1802.05668"
    kind = "predictor"
    roles = ("student",)

    def __init__(self, config: Config, *, teacher: nn.Module, network: NetworkConfig, data: Source) -> None:
        super().__init__()
        self.config, self.teacher = config, teacher
        use_classes_of(teacher, data, "quantized")
        self.student = new_classifier(network, data)
        self.rounded = weights_to_quantize(self.student, config)

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return LABELLED

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        x0, labels = batch.columns["x0"], batch.columns["class_label"]
        logits = functional_call(self.student.network, self.weights(), (x0,))
        loss = taught_loss(logits, labels, taught(self.teacher, x0), self.config)
        yield Update("student", loss, agreement(logits, labels))

    def weights(self) -> dict[str, Tensor]:
        """Q(theta) by name, with straight-through gradients; {} where training is in full precision."""
        if not self.config.straight_through:
            return {}
        weights = dict(self.student.network.named_parameters())
        return {name: quantized(weights[name], self.config.bits, self.config.bucket) for name in self.rounded}

    def published(self) -> Mapping[str, Model]:
        return {"student": self.baked()}

    def baked(self) -> Predictor:
        """The student with the weights Q(theta)."""
        if not self.rounded:
            return self.student
        weights = dict(self.student.network.named_parameters())
        points = uniform_points(self.config.bits).to(self.device)
        return self.student.baked(
            {name: pack(weights[name], points, self.config.bucket) for name in self.rounded}
        )

    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """What the student's weights take on disk."""
        return sizes(self.baked())
