"""Flow matching: a velocity teacher from data on straight paths (rectified flow's interpolation).

    x_t = (1 - t) x0 + t eps,        min E[ |v(x_t, t, c) - (eps - x0)|^2 ],   logit(t) ~ N(mean, std^2)

With x_sigma = x_t / (1 - t) and sigma = t / (1 - t) the loss is |D - x0|^2 / t^2.
"""

from __future__ import annotations

from collections.abc import Iterator

from distill_core.data.source import Source
from distill_core.method import Batch, Method, Update
from distill_core.methods.pretrain._flow_matching_loss import FlowConfig, flow_matching_loss
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.recipe.tables import NetworkConfig


class FlowMatching(Method):
    paper = "Lipman et al. 2023, Flow Matching for Generative Modeling, arXiv 2210.02747"
    roles = ("teacher",)
    result = "teacher"

    def __init__(self, config: FlowConfig, *, network: NetworkConfig, data: Source) -> None:
        super().__init__()
        self.config = config
        self.teacher = build_denoiser(
            network,
            parameterisation="flow",
            shape=data.shape,
            num_classes=data.num_classes,
            class_names=data.class_names,
            prompts=data.prompts,
        )

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        yield Update("teacher", flow_matching_loss(self.teacher, batch, self.config))
