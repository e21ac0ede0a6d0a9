"""Hyper-SD, human feedback: low-rank factors of their own over a distilled student, which may be merged by a weight.

    L = max(0, threshold - r(decode(x0), c)) + perception_weight CE(q(decode(G(x + sigma_k eps, sigma_k))), c)
    x0 = G(x_k, sigma_k): sampling's own x_k without gradient, then one call with;   W = W_student + b D_feedback

The hinge is what stops the reward from being chased for its own sake. The perception term reads a real picture x that
was noised and recovered in one call; q is a classifier (the paper's: an instance segmenter) and c its annotation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from distill_core.data.classes import naming_classes
from distill_core.diffusion.sampling import few_step
from distill_core.errors import ConfigError
from distill_core.losses.denoising import add_noise
from distill_core.losses.reward import RewardConfig, build_reward, hinge_loss, mean_reward
from distill_core.method import Batch, Cond, Method, MethodConfig, Update
from distill_core.metrics.diversity import within_class_std
from distill_core.networks.adapters import LoraDenoiser
from distill_core.networks.classifier import Classifier
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.generation import default_cond, generate
from distill_core.recipe.tables import EvaluateConfig

STRENGTHS = {"off": 0.0, "half": 0.5, "full": 1.0}  # b, by the names of the figures


class Config(MethodConfig):
    reward: RewardConfig = RewardConfig()
    threshold: float  # a reward from which nothing more is wanted; beyond any reward: no hinge
    perception_weight: float = Field(0.0, ge=0)


class HyperSDFeedback(Method):
    paper = (
        "Ren et al. 2024, Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis, "
        "arXiv 2404.13686"
    )
    roles = ("student",)
    student: LoraDenoiser

    def __init__(self, config: Config, *, student: Denoiser, extractor: nn.Module | None = None) -> None:
        super().__init__()
        asked = config.reward.name == "class_probability" or config.perception_weight > 0
        extractor = naming_classes(extractor, student.cond, asked=asked)
        self.config, self.extractor = config, extractor
        self.reward = build_reward(config.reward, extractor, num_classes=student.cond.num_classes)
        self.student = _distilled(student)
        self._check_extractor()

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return {"x0": "the perception term (config.perception_weight)"} if config.perception_weight else {}

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        score = self.reward.score(self.student.decode(self.generate(batch)), batch.cond)
        loss = hinge_loss(score, self.config.threshold)
        if self.config.perception_weight:
            loss = loss + self.config.perception_weight * self.perception_loss(batch)
        yield Update("student", loss, {"reward": score.detach().mean()})

    def generate(self, batch: Batch) -> Tensor:
        """x0 of the student's call at a random level of a random path; the calls before it have no gradient."""
        spec, image = self.student.sampler, self.student.image
        counts = spec.step_counts or (spec.num_steps,)
        levels = spec.levels(counts[int(torch.randint(len(counts), ()))])
        chosen = int(torch.randint(len(levels), ()))
        x = torch.randn(batch.size, image.channels, image.height, image.width, device=self.device)
        x = x * spec.noise_scale
        if chosen:
            with torch.no_grad():
                x0 = few_step(self.bound(batch.cond), x, levels[:chosen], lambda _: torch.randn_like(x))
            x = add_noise(x0, x.new_full((batch.size,), levels[chosen]))
        return self.bound(batch.cond)(x, levels[chosen])

    def bound(self, cond: Cond) -> Callable[[Tensor, float], Tensor]:
        """The student as samplers call it."""
        return lambda x, level: self.student(x, x.new_full((len(x),), level), cond)

    def perception_loss(self, batch: Batch) -> Tensor:
        """Cross-entropy (scalar) of the classifier on real pictures, noised to one of the levels and recovered."""
        assert self.extractor is not None
        sigmas, x0 = self.student.sampler.sigmas, batch.columns["x0"]
        level = sigmas[int(torch.randint(len(sigmas), ()))]
        x_sigma = add_noise(self.student.encode(x0), x0.new_full((batch.size,), level))
        picture = self.student.decode(self.bound(batch.cond)(x_sigma, level))
        return F.cross_entropy(self.extractor(picture), batch.cond["class_label"])

    @torch.no_grad()
    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """Mean reward, and spread within classes, with none, half and all of the adapter (`off_`, `half_`, `full_`)."""
        cond, trained = (
            default_cond(self.student.cond, config.num_samples, self.student),
            self.student.strength,
        )
        figures = {}
        try:
            for name, strength in STRENGTHS.items():
                self.student.strength = strength
                pictures = generate(
                    self.student, cond, config.num_samples, seed=config.seed, batch_size=config.batch_size
                )
                figures[f"{name}_reward"] = mean_reward(self.reward, pictures, cond, device=self.device)
                figures[f"{name}_within_class_std"] = within_class_std(pictures, cond.get("class_label"))
        finally:
            self.student.strength = trained
        return figures

    def _check_extractor(self) -> None:
        classes = self.student.cond.num_classes
        fits = isinstance(self.extractor, Classifier) and self.extractor.config.num_classes == classes
        if self.config.perception_weight and not fits:
            raise ConfigError(
                f"the perception term reads pictures with a classifier of the student's {classes or 0} classes: "
                "set [extractor]",
                field="extractor",
            )


def _distilled(student: Denoiser) -> LoraDenoiser:
    if not isinstance(student, LoraDenoiser) or student.sampler.kind != "few_step":
        raise ConfigError(
            "hyper_sd_feedback trains low-rank factors over a distilled student: set student.lora, and one of "
            "student.artifact, .path and .recipe",
            field="student",
        )
    return student
