"""SSLD: a student repeats a frozen teacher on pictures whose labels nobody needs, then on those of the task alone.

    L = [KL(p_t || p_s) + KL(p_s || p_t)] / 2,    p = softmax(z)                        no label enters it

Stage `distil`: the task's pictures and, of `[data.unlabelled]`, the `top_k` of each class that the teacher is sure of.
Stage `tune`: the task's pictures alone, at a lower rate, which undoes the shift towards the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core.data import Source
from distill_core.errors import ConfigError
from distill_core.losses.distillation import DIVERGENCES, Divergence, reduced
from distill_core.method import Batch, Method, MethodConfig, Stage, Update
from distill_core.methods.recognition._students import classes_of, new_classifier, taught
from distill_core.recipe.tables import EvaluateConfig, NetworkConfig


class Config(MethodConfig):
    divergence: Divergence = (
        "symmetric_kl"  # the paper says Jensen-Shannon, its code is this; js is the other
    )
    temperature: float = Field(1.0, gt=0)  # of both softmaxes
    top_k: int = Field(1000, ge=0, le=10_000_000)  # unlabelled pictures of each predicted class; 0: none
    distil_steps: int | None = Field(None, ge=1)  # of the first stage, the rest are of the second; unset: all


def surest_of_each_class(logits: Tensor, top_k: int) -> Tensor:
    """Items (M,), ascending: of each class that logits (N, K) predict the `top_k` with the highest probability."""
    confidence, predicted = logits.float().softmax(1).max(1)
    chosen = []
    for label in predicted.unique():
        members = (predicted == label).nonzero().squeeze(1)
        chosen.append(members[confidence[members].argsort(descending=True, stable=True)[:top_k]])
    return torch.cat(chosen).sort().values


class SSLD(Method):
    paper = (
        "Cui et al. 2021, Beyond Self-Supervision: A Simple Yet Effective Network Distillation Alternative to "
        "Improve Backbones, arXiv 2103.05959"
    )
    kind = "predictor"
    roles = ("student",)
    plan = "step"  # which pictures are chosen depends on the teacher's answers

    def __init__(
        self, config: Config, *, teacher: nn.Module, network: NetworkConfig, data: Source, unlabelled: Source
    ) -> None:
        super().__init__()
        self.config, self.teacher, self.unlabelled = config, teacher, unlabelled
        names = classes_of(teacher, data, "ssld")
        if unlabelled.shape != data.shape:
            raise ConfigError(
                f"the unlabelled pictures are {unlabelled.shape}, and those of the task {data.shape}; set "
                "data.unlabelled.size, or choose pictures of the same shape",
                field="data.unlabelled",
            )
        self.found = unlabelled.size
        if config.top_k:
            unlabelled.keep(surest_of_each_class(answers(teacher, unlabelled), config.top_k))
        self.student = new_classifier(network, data, class_names=names)

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return {"x0": "the views that teacher and student see"}

    @classmethod
    def stages(cls, config: Config, steps: int) -> tuple[Stage, ...]:
        streams = ("unlabelled",) if config.top_k else ()
        first = Stage("distil", config.distil_steps or steps, cls.roles, streams=streams)
        if config.distil_steps is None:
            return (first,)
        return first, Stage("tune", max(steps - config.distil_steps, 1), cls.roles, restart=True)

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        batches = [batch, *batch.also.values()]
        x0 = torch.cat([one.columns["x0"] for one in batches])
        logits, wanted = self.student(x0), taught(self.teacher, x0)
        loss = DIVERGENCES[self.config.divergence](logits, wanted, self.config.temperature)
        agree = (logits.argmax(1) == wanted.argmax(1)).float().mean()
        yield Update("student", reduced(loss), {"agreement": agree})

    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """Unlabelled pictures that there were, and that were chosen."""
        chosen = self.unlabelled.size if self.config.top_k else 0
        return {"unlabelled_items": float(self.found), "chosen_items": float(chosen)}


def answers(teacher: nn.Module, source: Source, *, batch_size: int = 256) -> Tensor:
    """The teacher's logits (N, K) for every item of `source`, on the CPU."""
    device = next(teacher.parameters()).device
    batches = (source.items(part).columns["x0"] for part in torch.arange(source.size).split(batch_size))
    return torch.cat([taught(teacher, x0.to(device)).cpu() for x0 in batches])
