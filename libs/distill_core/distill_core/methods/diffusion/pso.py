"""PSO: pairwise sample optimisation tunes a distilled student itself, on a preferred sample against one of its own.

    offline   L = -log sigmoid(beta ([e_ref(x_w) - e(x_w)] - eta [e_ref(x_l) - e(x_l)]))
    concept   L = max(0, 1 + beta (e(x_w) - eta e(x_l))) + prior_weight e(x_l)
              e(x) = mean |D(x + sigma eps, sigma) - x|^2 / sigma^2,  one eps and one of the student's levels for both
    online    L = -log sigmoid(beta (log r_w - log r_l)),  r = clip(p(x_{k+1} | x_k) / p_ref(x_{k+1} | x_k), 1 +- clip)
              p = N(D(x_k, sigma_k), sigma_{k+1}^2);  the last step draws nothing and is left out

The student is low-rank factors over a few-step student; the reference is the same network with them off. x_l is
sampled from the reference anew in each update: there is no fixed point, only beta, the clip and stopping bound it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core.data.classes import naming_classes
from distill_core.data.source import Source
from distill_core.diffusion.levels import expand
from distill_core.errors import ConfigError
from distill_core.losses.pairwise import (
    clipped_log_ratio,
    margin_loss,
    noise_error,
    preference_loss,
    transition_log_density,
)
from distill_core.losses.reward import RewardConfig, build_reward, mean_reward
from distill_core.method import Batch, Cond, Method, MethodConfig, Update
from distill_core.metrics.diversity import within_class_std
from distill_core.networks.adapters import LoraDenoiser
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.generation import default_cond, generate
from distill_core.recipe.tables import EvaluateConfig

Pair = tuple[Tensor, Tensor]  # of the preferred sample, and of the student's own; (B,) each
RANKING_BATCH = 256


class Config(MethodConfig):
    mode: Literal["offline", "concept", "online"] = "offline"
    beta: float = Field(
        50.0, gt=0
    )  # official: 50, concept 5; relates to means over pixels, whatever their number
    eta: float = Field(1.0, ge=0)  # weight of the student's own sample; 1 in theory, official code 0.1
    prior_weight: float = Field(0.5, ge=0)  # concept: against forgetting
    clip: float = Field(0.1, gt=0, lt=1)  # online
    reward: RewardConfig = RewardConfig()  # what ranks the data; online: two samples
    preferred_share: float = Field(
        0.3, gt=0, le=1
    )  # offline, concept: the best of the data; 1 = all, unranked
    ranked: int = Field(10_000, ge=1)  # at most so many items of the data are ranked


def offline_loss(error: Pair, reference: Pair, *, beta: float, eta: float) -> Tensor:
    """Logistic loss (scalar) of what the student gained over its reference, on the preferred sample and its own."""
    gain = (reference[0] - error[0]) - eta * (reference[1] - error[1])
    return preference_loss(gain, beta)


def concept_loss(error: Pair, *, beta: float, eta: float, prior_weight: float) -> Tensor:
    """Hinge loss (scalar) without a reference; eta 0 and prior_weight 0 leave plain fine-tuning on the preferred."""
    return margin_loss(eta * error[1] - error[0], beta) + prior_weight * error[1].mean()


class PSO(Method):
    paper = (
        "Miao et al. 2025, Tuning Timestep-Distilled Diffusion Model Using Pairwise Sample Optimization, "
        "arXiv 2410.03190"
    )
    roles = ("student",)
    student: LoraDenoiser

    def __init__(
        self, config: Config, *, student: Denoiser, data: Source, extractor: nn.Module | None = None
    ) -> None:
        super().__init__()
        asked = config.reward.name == "class_probability"
        extractor = naming_classes(extractor, student.cond, asked=asked)
        self.config, self.data, self.extractor = config, data, extractor
        self.reward = build_reward(config.reward, extractor, num_classes=data.num_classes)
        self.student = _with_adapter(student)
        self.levels = self.checked_levels()
        self.preferred = None if config.mode == "online" else self.rank()

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return {} if config.mode == "online" else {"x0": "the preferred samples"}

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        if self.config.mode == "online":
            yield from self.online_updates(batch)
            return
        x0, x_sigma, sigma, cond = self.draw_pair(batch.size)
        error = self.errors(x0, x_sigma, sigma, cond)
        if self.config.mode == "concept":
            loss = concept_loss(
                error, beta=self.config.beta, eta=self.config.eta, prior_weight=self.config.prior_weight
            )
        else:
            with torch.no_grad(), self.student.off():
                reference = self.errors(x0, x_sigma, sigma, cond)
            loss = offline_loss(error, reference, beta=self.config.beta, eta=self.config.eta)
        yield Update("student", loss, {"preferred_error": error[0].mean(), "own_error": error[1].mean()})

    def draw_pair(self, count: int) -> tuple[Tensor, Tensor, Tensor, Cond]:
        """x0, x_sigma, sigma and condition of `count` preferred samples, then of the reference's; noise is shared."""
        assert self.preferred is not None  # online learns from no data
        chosen = self.preferred[torch.randint(len(self.preferred), (count,))]
        preferred = self.data.items(chosen).to(self.device)
        with torch.no_grad(), self.student.off():
            own, _ = self.trajectory(count, preferred.cond)
            x0 = torch.cat([self.student.encode(preferred.columns["x0"]), own])
        index = torch.randint(len(self.levels), (count,), device=x0.device)
        sigma = x0.new_tensor(self.levels)[index].repeat(2)
        eps = torch.randn_like(own).repeat(2, *[1] * (own.ndim - 1))
        return x0, x0 + expand(sigma, x0) * eps, sigma, _twice(preferred.cond)

    def errors(self, x0: Tensor, x_sigma: Tensor, sigma: Tensor, cond: Cond) -> Pair:
        """The noise errors of both halves of a pair, (B,) each."""
        preferred, own = noise_error(self.student(x_sigma, sigma, cond), x0, sigma).chunk(2)
        return preferred, own

    def online_updates(self, batch: Batch) -> Iterator[Update]:
        """An update per drawn transition of two samples of each condition, of which the reward prefers one."""
        cond = _twice(batch.cond)
        with torch.no_grad():
            x0, states = self.trajectory(2 * batch.size, cond)
            first, second = self.reward.score(self.student.decode(x0), cond).chunk(2)
        preferred = torch.sign(first - second)  # 0 for a tie: its loss is constant
        for k in range(len(self.levels) - 1):
            first_ratio, second_ratio = self.log_ratio(states[k], states[k + 1], k, cond).chunk(2)
            gain = preferred * (first_ratio - second_ratio)
            yield Update("student", preference_loss(gain, self.config.beta), {"reward": first.mean()})

    def log_ratio(self, x: Tensor, x_next: Tensor, k: int, cond: Cond) -> Tensor:
        """Clipped log ratio (B,) of the transition `k` under the student and its reference."""
        density = transition_log_density(self.call(x, k, cond), x_next, self.levels[k + 1])
        with torch.no_grad(), self.student.off():
            reference = transition_log_density(self.call(x, k, cond), x_next, self.levels[k + 1])
        return clipped_log_ratio(density, reference, self.config.clip)

    def trajectory(self, count: int, cond: Cond) -> tuple[Tensor, list[Tensor]]:
        """x0 of the student's own sampling from fresh noise, and the x_k that led to it."""
        image = self.student.image
        z = torch.randn(count, image.channels, image.height, image.width, device=self.device)
        states = [z * self.student.sampler.noise_scale]
        for k, following in enumerate(self.levels[1:]):
            states.append(self.call(states[k], k, cond) + following * torch.randn_like(z))
        return self.call(states[-1], len(states) - 1, cond), states

    def call(self, x: Tensor, k: int, cond: Cond) -> Tensor:
        x0: Tensor = self.student(x, x.new_full((len(x),), self.levels[k]), cond)
        return x0

    @torch.no_grad()
    def rank(self) -> Tensor:
        """Indices of the preferred share of the data, by reward."""
        count = min(self.data.size, self.config.ranked)
        indices = torch.linspace(0, self.data.size - 1, count, dtype=torch.float64).long()
        if self.config.preferred_share == 1:
            return indices
        items = (self.data.items(part) for part in indices.split(RANKING_BATCH))
        scores = torch.cat([self.reward.score(item.columns["x0"], item.cond) for item in items])
        return indices[scores.topk(max(1, round(self.config.preferred_share * count))).indices]

    @torch.no_grad()
    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """Reward and spread of the student's samples, of the reference's (`start_`), and of the preferred data."""
        cond = default_cond(self.student.cond, config.num_samples, self.student)
        figures = self.describe(self.sampled(cond, config), cond)
        with self.student.off():
            start = self.describe(self.sampled(cond, config), cond)
        figures |= {f"start_{name}": value for name, value in start.items()}
        if self.preferred is not None:
            items = self.data.items(self.preferred)
            described = self.describe(items.columns["x0"], items.cond)
            figures |= {f"preferred_{name}": value for name, value in described.items()}
        return figures

    def sampled(self, cond: Cond, config: EvaluateConfig) -> Tensor:
        return generate(
            self.student, cond, config.num_samples, seed=config.seed, batch_size=config.batch_size
        )

    def describe(self, pictures: Tensor, cond: Cond) -> dict[str, float]:
        """Mean reward, and within-class standard deviation of a pixel."""
        return {
            "reward": mean_reward(self.reward, pictures, cond, device=self.device),
            "within_class_std": within_class_std(pictures, cond.get("class_label")),
        }

    def checked_levels(self) -> list[float]:
        """The levels at which the student is called, descending."""
        spec = self.student.sampler
        if spec.kind != "few_step":
            raise ConfigError(
                "pso tunes a student that has been distilled to few steps: set student.artifact, .path or .recipe",
                field="student",
            )
        levels = spec.levels(spec.num_steps)
        if self.config.mode == "online" and len(levels) < 2:
            raise ConfigError(
                "a one-step student draws nothing on its way, so online has no density to compare: "
                "use config.mode = 'offline', or a student of several steps",
                field="config.mode",
            )
        return levels


def _with_adapter(student: Denoiser) -> LoraDenoiser:
    if not isinstance(student, LoraDenoiser):
        raise ConfigError(
            "pso trains low-rank factors, and its reference is the student without them: set student.lora",
            field="student.lora",
        )
    return student


def _twice(cond: Cond) -> Cond:
    return {name: torch.cat([value, value]) for name, value in cond.items()}
