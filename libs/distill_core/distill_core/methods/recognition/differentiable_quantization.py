"""Differentiable quantisation: the weights of a trained classifier stay, and the points that they are rounded to learn.

    w'_j = b + a c_k(j),    k(j) = argmin_k |v_j - c_k|,  v_j = (w_j - b) / a;  dL/dc_k = sum_(j: k(j) = k) a dL/dw'_j
    L = w T^2 KL(p_t || p_s) + (1 - w) CE(z_s, y),    teacher: the same classifier before it is rounded

c: 2^bits points for each tensor, at quantiles of its v at first; a and b of the weight's bucket. A point's gradient is
a sum over all its weights, often thousands: the rate is small. BatchNorm keeps the statistics of this run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from distill_core.data import Source
from distill_core.errors import ConfigError
from distill_core.method import Batch, Method, Model, Update
from distill_core.methods.recognition._quantized import (
    QuantizedConfig,
    sizes,
    taught_loss,
    weights_to_quantize,
)
from distill_core.methods.recognition._students import LABELLED, agreement, taught, use_classes_of
from distill_core.networks.classifier import Classifier
from distill_core.networks.packing import at_points, bucket_scales, nearest_codes, pack, scaled
from distill_core.networks.predictor import Predictor, image_classifier
from distill_core.recipe.tables import EvaluateConfig, NetworkConfig


class Config(QuantizedConfig):
    pass


def quantile_points(values: Tensor, bits: int) -> Tensor:
    """2^bits points, ascending, that each stand for as many of `values` (N,)."""
    ordered, count = values.sort().values, 2**bits
    places = (torch.arange(count, device=values.device) + 0.5) / count * (len(ordered) - 1)
    return ordered[places.round().long()].clone()


class Codebooks(nn.Module):
    """A predictor whose weights of these names are rounded to learnt points; all else of it stays."""

    def __init__(self, predictor: Predictor, names: list[str], bits: int, bucket: int) -> None:
        super().__init__()
        self.predictor, self.names, self.bucket = predictor.requires_grad_(False), names, bucket
        self.points = nn.ParameterList(quantile_points(self.scaled(name), bits) for name in names)

    def scaled(self, name: str) -> Tensor:
        """V (N,) of a tensor."""
        weight = self.predictor.network.get_parameter(name)
        return scaled(weight, *bucket_scales(weight, self.bucket), self.bucket)

    def weights(self) -> dict[str, Tensor]:
        """The rounded weights by name, differentiable in the points."""
        found = {}
        for name, points in zip(self.names, self.points):
            weight, ordered = self.predictor.network.get_parameter(name), points.sort().values
            scales, offsets = bucket_scales(weight, self.bucket)
            codes = nearest_codes(self.scaled(name), ordered)
            found[name] = at_points(codes, ordered, scales, offsets, self.bucket).reshape(weight.shape)
        return found

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = functional_call(self.predictor.network, self.weights(), (image,))
        return logits

    def baked(self) -> Predictor:
        """The predictor with rounded weights."""
        network = self.predictor.network
        pairs = zip(self.names, self.points)
        return self.predictor.baked(
            {
                name: pack(network.get_parameter(name), points.sort().values, self.bucket)
                for name, points in pairs
            }
        )


def as_predictor(teacher: nn.Module) -> Predictor:
    """A copy in training mode of a predictor, or of a judge."""
    own = copy.deepcopy(teacher).train()
    if isinstance(own, Predictor):
        return own
    if not isinstance(own, Classifier):
        raise ConfigError(
            f"differentiable_quantization keeps predictors and judges in few bits, not {type(own).__name__}; choose "
            "another teacher",
            field="teacher",
        )
    names = own.card().class_names
    return image_classifier(own, NetworkConfig(name="classifier"), shape=own.shape, class_names=names)


class DifferentiableQuantization(Method):
    paper = "Polino et al. 2018, Model compression via distillation and quantization, arXiv 1802.05668"
    kind = "predictor"
    roles = ("student",)

    def __init__(self, config: Config, *, teacher: nn.Module, data: Source) -> None:
        super().__init__()
        self.config, self.teacher = config, teacher
        if not config.bits:
            raise ConfigError(
                "config.bits = 0 leaves no point to learn; differentiable_quantization takes 1 to 8",
                field="config.bits",
            )
        use_classes_of(teacher, data, "differentiable_quantization")
        own = as_predictor(teacher)
        names = weights_to_quantize(own, config)
        self.student = Codebooks(own, names, config.bits, config.bucket)

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return LABELLED

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        x0, labels = batch.columns["x0"], batch.columns["class_label"]
        logits = self.student(x0)
        loss = taught_loss(logits, labels, taught(self.teacher, x0), self.config)
        yield Update("student", loss, agreement(logits, labels))

    def published(self) -> Mapping[str, Model]:
        return {"student": self.student.baked()}

    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """What the student's weights take on disk."""
        return sizes(self.student.baked())
