"""HiPA: high-frequency-promoting adaptation, low-rank factors that make the teacher itself a one-step generator.

    min_LoRA  L_spatial(x, x*) + lambda L_hf(x, x*),   x = decode(D(sigma* z, c)),   x* = decode(ODE(z, c))
    L_hf      = mean | |S(x)| - |S(x*)| | + mean |A(x) - A(x*)|
    S: slopes (Sobel),   A: amplitudes of waves above the cutoff (Fourier), by their length

The teacher's own pictures of the noise z are the targets; no fake score, no real picture. Regression alone blurs,
and the blur is all in what L_hf looks at. Without a lambda, both terms begin equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from distill_core.data.pairs import PairBatch, Pairs
from distill_core.errors import ConfigError
from distill_core.losses.frequency import CUTOFF, high_frequency_distance
from distill_core.method import Batch, Method, MethodConfig, Update
from distill_core.metrics.image import psnr
from distill_core.metrics.texture import high_frequency_ratio
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.levels import few_step_sampler, student_levels
from distill_core.networks.perceptual import FeatureDistance
from distill_core.recipe.tables import EvaluateConfig

BALANCED_ON = 64  # pairs on which the two terms begin equal


class Config(MethodConfig):
    spatial: Literal["mse", "features"] = "mse"  # features: what the recipe's [extractor] sees, like DISTS
    hf_weight: float | None = Field(None, ge=0)  # lambda; unset: both terms begin equal; 0: plain regression
    cutoff: float = Field(CUTOFF, gt=0, lt=0.7)  # of the high frequencies, cycles per pixel
    held_out: int = Field(128, ge=1)  # the last pairs, for the figures alone


class HiPA(Method):
    paper = (
        "Zhang and Hooi 2023, HiPA: Enabling One-Step Text-to-Image Diffusion Models via High-Frequency-Promoting "
        "Adaptation, arXiv 2311.18158"
    )
    roles = ("student",)
    pairs: Pairs

    def __init__(
        self,
        config: Config,
        *,
        teacher: Denoiser,
        student: Denoiser,
        pairs: Pairs | None = None,
        extractor: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.config, self.teacher, self.student = config, teacher, student
        if pairs is None or len(pairs) <= config.held_out:
            raise ConfigError(
                f"hipa learns from the teacher's own pictures, more than the {config.held_out} that are held out: "
                "add a [pairs] table, e.g. pairs.count = 2048",
                field="pairs",
            )
        self.pairs = pairs
        self.features = (
            FeatureDistance(extractor, student.image.picture) if config.spatial == "features" else None
        )
        self.hf_weight = torch.tensor(float("nan") if config.hf_weight is None else config.hf_weight)
        student.sampler = few_step_sampler(student, student_levels(teacher))

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        if self.hf_weight.isnan():
            self.hf_weight = self.balanced_weight()
        chosen = torch.randint(len(self.pairs) - self.config.held_out, (batch.size,))
        spatial, high = self.distances(self.pairs.at(chosen))
        loss = spatial + self.hf_weight.to(spatial.device) * high if self.hf_weight else spatial
        yield Update("student", loss, {"spatial": spatial.detach(), "high_frequency": high.detach()})

    def distances(self, pairs: PairBatch) -> tuple[Tensor, Tensor]:
        """L_spatial and L_hf (scalars) of the student's pictures and the teacher's."""
        pictures, targets = self.pictures(pairs)
        spatial = F.mse_loss(pictures, targets) if self.features is None else self.features(pictures, targets)
        return spatial, high_frequency_distance(pictures, targets, self.config.cutoff)

    def pictures(self, pairs: PairBatch) -> tuple[Tensor, Tensor]:
        """The student's one step from the noise, decoded, and the teacher's pictures; (B, C, H, W) each."""
        spec = self.student.sampler
        cond = {name: value.to(self.device) for name, value in pairs.cond.items()}
        x = pairs.z.to(self.device) * spec.noise_scale
        x0 = self.student(x, x.new_full((len(x),), spec.sigmas[0]), cond)
        with torch.no_grad():
            targets = self.teacher.decode(pairs.x0.to(self.device))
        return self.student.decode(x0), targets

    @torch.no_grad()
    def balanced_weight(self) -> Tensor:
        """The lambda at which both terms weigh the same now, on pairs that are always the same."""
        count = min(BALANCED_ON, len(self.pairs) - self.config.held_out)
        spatial, high = self.distances(self.pairs.at(torch.arange(count)))
        return (spatial / high.clamp_min(1e-12)).float().cpu()

    def state(self) -> dict[str, Tensor]:
        return {"hf_weight": self.hf_weight}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.hf_weight = state["hf_weight"]

    @torch.no_grad()
    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """On the held-out pairs: likeness (dB), high-frequency power over the teacher's; and the share of weights."""
        first = len(self.pairs) - self.config.held_out
        indices = torch.arange(first, len(self.pairs)).split(config.batch_size)
        both = [self.pictures(self.pairs.at(part)) for part in indices]
        pictures, targets = (torch.cat(side).clamp(-1, 1).float().cpu() for side in zip(*both))
        trained = sum(parameter.numel() for parameter in self.student.parameters())
        likeness = [psnr(_unit(a), _unit(b)) for a, b in zip(pictures, targets)]
        return {
            "high_frequency_ratio": high_frequency_ratio(pictures, targets, self.config.cutoff),
            "pair_psnr": sum(likeness) / len(likeness),
            "trained_share": trained / sum(parameter.numel() for parameter in self.teacher.parameters()),
        }


def _unit(picture: Tensor) -> np.ndarray:
    """(C, H, W) in [-1, 1] as an array (H, W, C) in [0, 1]."""
    pixels: np.ndarray = ((picture + 1) / 2).permute(1, 2, 0).numpy()
    return pixels
