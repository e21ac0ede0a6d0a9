"""The transformer of DiT (Peebles & Xie 2022, arXiv 2212.09748), which is told a class."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distill_core.artifacts import CondSpec, ImageSpec
from distill_core.method import Cond
from distill_core.networks.families.base import Family, labelled, refuse_steering, without_variance
from distill_core.networks.guidance_adapters import told_to_attention
from distill_core.networks.prompts import PromptEncoder


class DiT(Family):
    """A table of classes whose last row is the null class; unconditional ones use their only row."""

    network: ClassVar[str] = "DiTTransformer2DModel"
    interface: ClassVar[tuple[str, ...]] = (*Family.interface, "num_embeds_ada_norm", "norm_type")
    variance_below: ClassVar[bool] = True

    def call(self, network: Any, x: Tensor, time: Tensor, cond: Cond, image: ImageSpec) -> Tensor:
        refuse_steering(cond, self.network)
        labels = cond.get("class_label")
        if labels is None:
            labels = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        told = told_to_attention(cond)
        return without_variance(network(x, timestep=time, class_labels=labels, **told).sample, x)

    def trunk(self, network: Any) -> nn.Module:
        blocks: nn.ModuleList = network.transformer_blocks
        return blocks[len(blocks) // 2]

    def called_apart(self, network: Any) -> list[nn.Module]:
        """The first block's embedding, of which the last layer takes its scale."""
        return [network.transformer_blocks[0].norm1.emb]

    def cond(self, config: Any, text: PromptEncoder | None) -> CondSpec:
        classes = config.get("num_embeds_ada_norm")
        return labelled(classes, classes)

    def new_args(self, num_classes: int | None, text: PromptEncoder | None) -> dict[str, Any]:
        classes = 1 if num_classes is None else num_classes
        return {"num_embeds_ada_norm": classes, "norm_type": "ada_norm_zero"}
