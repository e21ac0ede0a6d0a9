"""MSD: multi-student distillation. K one-step students, each for its own part of the conditions, served as one model.

    dL/dtheta_k = E[ DMD2's gradient for theta_k with its own fake score phi_k | route(c) = k ],   k = 1 ... K
    G(z, c)     = G_theta_k(z, c),   k = route(c)

One step trains every expert on its items of the batch, and a loss is the mean over all items: one part is DMD2.
A small student must know the teacher's scores before it can match distributions: train it with `tsm` first, then
begin every expert as its result (`student.recipe`). Regression pairs, if any, are seen by every expert.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from distill_core.data.pairs import Pairs
from distill_core.data.source import Source
from distill_core.diffusion.routing import pooled
from distill_core.errors import ConfigError
from distill_core.methods.diffusion._distribution_matching import DistributionMatching, MatchingConfig
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.fake_score import FakeScore
from distill_core.networks.routed import ConditionPartition, RoutedDenoiser, RoutedFakeScore
from distill_core.recipe.tables import EvaluateConfig

MAX_PROMPTS = 20_000  # that the clusters are made from
CHUNK = 256


class Config(MatchingConfig):
    # Experts; the paper has 4. Prompts fall into k-means clusters of equal size.
    parts: int = Field(4, ge=1, le=4096)
    classes: tuple[tuple[int, ...], ...] = ()  # the class labels of each part; () = consecutive blocks


class MSD(DistributionMatching):
    paper = "Song et al. 2024, Multi-student Diffusion Distillation for Better One-step Generators, arXiv 2410.23274"
    config: Config
    student: RoutedDenoiser

    def __init__(
        self,
        config: Config,
        *,
        teacher: Denoiser,
        student: Denoiser,
        data: Source,
        seed: int = 0,
        pairs: Pairs | None = None,
    ) -> None:
        if not isinstance(student, RoutedDenoiser):
            partition = make_partition(config, teacher, data, seed)
            student = RoutedDenoiser([copy.deepcopy(student) for _ in range(config.parts)], partition)
        elif student.partition.parts != config.parts or config.classes:
            raise ConfigError(
                f"the student to begin from has {student.partition.parts} parts of its own; set config.parts so "
                "and leave config.classes out",
                field="config.parts",
            )
        super().__init__(config, teacher=teacher, student=student, pairs=pairs)
        others = [FakeScore(teacher, discriminate=self.discriminates) for _ in range(1, config.parts)]
        assert isinstance(self.fake_score, FakeScore)
        self.fake_score = RoutedFakeScore([self.fake_score, *others], student.partition)

    def regression_loss(self, count: int) -> Tensor:
        """DMD2's, of every expert on pairs of all conditions: its own part's alone would narrow what it makes."""
        assert self.pairs is not None
        pairs = self.pairs.draw(count)
        cond = {name: value.to(self.device) for name, value in pairs.cond.items()}
        x = pairs.z.to(self.device) * self.student.sampler.noise_scale
        sigma, x0 = x.new_full((count,), self.levels[0]), pairs.x0.to(self.device)
        return torch.stack([F.mse_loss(expert(x, sigma, cond), x0) for expert in self.student.experts]).mean()

    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """The size of what answers one request, as a share of the teacher's."""
        sizes = [sum(p.numel() for p in net.parameters()) for net in (self.student.experts[0], self.teacher)]
        return {"expert_parameters": sizes[0], "expert_share": sizes[0] / sizes[1]}


def make_partition(config: Config, teacher: Denoiser, data: Source, seed: int) -> ConditionPartition:
    """The recipe's split of what the teacher is conditioned on."""
    if config.classes and len(config.classes) != config.parts:
        raise ConfigError(
            f"config.classes lists {len(config.classes)} parts and config.parts is {config.parts}; make them equal",
            field="config.classes",
        )
    if teacher.cond.kind == "class_label" and config.classes:
        return ConditionPartition.of_classes(config.classes, data.num_classes or 0)
    if config.classes or (teacher.cond.kind == "none" and config.parts > 1):
        raise ConfigError(
            f"the teacher's condition is {teacher.cond.kind!r}: classes split class labels, and no condition "
            "cannot be split; leave config.classes out, or set config.parts = 1",
            field="config.classes" if config.classes else "config.parts",
        )
    if teacher.cond.kind == "class_label":
        return ConditionPartition.blocks(data.num_classes or 0, config.parts)
    if config.parts == 1:
        return ConditionPartition.whole()
    return ConditionPartition.of_prompts(pooled_prompts(data, seed), config.parts, seed=seed)


def pooled_prompts(data: Source, seed: int) -> Tensor:
    """The pooled embeddings (N, D) of the training prompts, or of `MAX_PROMPTS` of them."""
    chosen = torch.arange(data.size)
    if data.size > MAX_PROMPTS:
        chosen = torch.randperm(data.size, generator=torch.Generator().manual_seed(seed))[:MAX_PROMPTS]
    embeds = (data.conditions(part)["prompt_embeds"] for part in chosen.split(CHUNK))
    return torch.cat([pooled(values.float().cpu()) for values in embeds])
