"""Samplers as plain functions of `denoise(x_sigma, sigma) -> x0`, condition and guidance bound by the caller.

Where a level has a network time of its own, `denoise(x_sigma, sigma, time)` is called.

Only arithmetic operators are used, so one code samples with torch tensors (training, evaluation) and with NumPy
arrays (the server's ONNX backend). All noise levels are standard deviations in data units (variance exploding):

    x_sigma = x0 + sigma eps,        dx/dsigma = (x - D(x, sigma)) / sigma        (Karras et al. 2022, Eq. 1 and 3)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, model_validator

from distill_core.config import Config
from distill_core.diffusion import schedulers
from distill_core.diffusion.image_to_image import InitImage
from distill_core.diffusion.schedulers import SchedulerSpec
from distill_core.diffusion.steps import Denoise, Path, follow, renoised
from distill_core.diffusion.steps import euler as euler_steps
from distill_core.errors import ConfigError

Array = Any  # torch.Tensor or numpy.ndarray
Size = tuple[int, int]  # (height, width) of x
NO_SIZE = (1, 1)  # for samplers whose levels do not depend on it


class SamplerSpec(Config):
    """Sampler of a published model; part of its manifest."""

    kind: Literal["few_step", "heun", "euler", "scheduler"]
    scheduler: SchedulerSpec | None = None  # scheduler: of the foreign folder that the model came from
    sigmas: tuple[
        float, ...
    ] = ()  # few_step: the levels that the student was trained at, descending, data std
    step_counts: tuple[int, ...] = ()  # the numbers of steps that it was trained for; () = any
    sigma_min: float = Field(0.002, gt=0)  # heun, euler: last level above 0
    sigma_max: float = Field(80.0, gt=0)  # heun, euler: first level; scheduler: that students begin at
    rho: float = Field(7.0, gt=0)  # heun, euler: Karras et al. 2022, Eq. 5
    noise_scale: float = Field(gt=0)  # the first x is noise_scale * unit noise
    eta: float = Field(
        1.0, ge=0, le=1
    )  # few_step: share of fresh noise at each next level; 0 is the ODE's chain
    num_steps: int = Field(ge=1, le=10**6)  # default
    max_steps: int = Field(ge=1, le=10**6)
    guidance: float = 1.0  # default; 1 is off
    clip: float | None = Field(
        None, gt=0
    )  # x0 is clamped to [-clip, clip] in every step, as DDPM's sampler does
    guidable: bool = (
        True  # False: distilled with guidance baked in, other values than the default are refused
    )
    assumed: str = ""  # what a foreign folder did not say and was taken for granted when it was read

    guidance_range: tuple[float, float] | None = (
        None  # the network is told its guidance, and was trained for these; one evaluation a step
    )

    @model_validator(mode="after")
    def _levels(self) -> SamplerSpec:
        if self.kind == "few_step" and (
            not self.sigmas or list(self.sigmas) != sorted(self.sigmas, reverse=True)
        ):
            raise ValueError("a few_step sampler needs its levels in descending order")
        if (self.kind == "scheduler") != (self.scheduler is not None):
            raise ValueError("a sampler of kind scheduler, and no other, has a scheduler")
        most = len(self.sigmas) if self.kind == "few_step" else self.max_steps
        if self.step_counts and not all(1 <= count <= most for count in self.step_counts):
            raise ValueError(f"step_counts must be 1 to {most}, the number of levels")
        return self

    @classmethod
    def few_step(
        cls, sigmas: tuple[float, ...], *, noise_scale: float, step_counts: tuple[int, ...] = ()
    ) -> SamplerSpec:
        """The sampler of a student distilled at `sigmas`, whose guidance, if any, is baked in.

        With `step_counts`, for these numbers of steps: N steps use every (K / N)-th of the K levels from the first on.
        """
        return cls(
            kind="few_step",
            sigmas=sigmas,
            step_counts=step_counts,
            noise_scale=noise_scale,
            num_steps=max(step_counts, default=len(sigmas)),
            max_steps=len(sigmas),
            guidable=False,
        )

    @property
    def start(self) -> float:
        """The level at which sampling begins, whatever the number of steps."""
        return self.sigmas[0] if self.kind == "few_step" else self.sigma_max

    @property
    def timed(self) -> bool:
        """Whether the network is told a time that its schedule does not tell of the level."""
        return self.scheduler is not None and self.scheduler.timed

    @property
    def fewest_steps(self) -> int:
        """A small number of steps that is allowed, for a quick look."""
        if self.kind == "scheduler" and not self.step_counts:
            return min(2, self.num_steps)  # with one, some schedulers begin where hardly any noise is left
        return min(self.step_counts, default=1)

    def check_steps(self, num_steps: int) -> None:
        """Refuse a number of steps that this model was not made for."""
        limit = len(self.sigmas) if self.kind == "few_step" else self.max_steps
        allowed = ", ".join(map(str, sorted(self.step_counts))) or f"1 to {limit}"
        if not 1 <= num_steps <= limit or (self.step_counts and num_steps not in self.step_counts):
            raise ConfigError(
                f"num_steps = {num_steps} is not allowed for this model: {allowed}", field="num_steps"
            )
        if self.scheduler is not None:
            schedulers.levels(self.scheduler, num_steps, NO_SIZE)

    def levels(self, num_steps: int, size: Size = NO_SIZE) -> list[float]:
        """The `num_steps` levels at which the network is evaluated, descending, for an x of `size`.

        Raises:
            ConfigError: a number of steps that this model was not made for.
        """
        self.check_steps(num_steps)
        if self.scheduler is not None:
            return [sigma for sigma, _ in schedulers.levels(self.scheduler, num_steps, size).visited]
        if self.kind != "few_step":
            return karras_levels(num_steps, sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho)
        if self.step_counts:
            return [self.sigmas[index * len(self.sigmas) // num_steps] for index in range(num_steps)]
        return list(self.sigmas[:1]) if num_steps == 1 else _thin(self.sigmas, num_steps)

    def path(self, num_steps: int, size: Size = NO_SIZE, first: int = 0) -> Path:
        """The steps from the level `first` on; of all kinds but `heun`, which is older than this form."""
        if self.scheduler is not None:
            self.check_steps(num_steps)
            return schedulers.path(self.scheduler, num_steps, size, first)
        levels = [(sigma, None) for sigma in self.levels(num_steps, size)[first:]]
        steps = renoised(levels, self.eta) if self.kind == "few_step" else euler_steps(levels)
        return Path(self.noise_scale, steps)

    def check_guidance(self, guidance: float) -> None:
        """Refuse a guidance scale that this model cannot honour."""
        if self.guidance_range is not None:
            low, high = self.guidance_range
            if not low <= guidance <= high:
                raise ConfigError(
                    f"guidance = {guidance:g} is not allowed: this student was distilled for {low:g} to {high:g}",
                    field="guidance",
                )
        elif not self.guidable and guidance != self.guidance:
            raise ConfigError(
                f"guidance = {guidance:g} is not allowed: this student was distilled at a fixed guidance, "
                f"leave it out or give {self.guidance:g}",
                field="guidance",
            )


def _thin(sigmas: tuple[float, ...], count: int) -> list[float]:
    last = len(sigmas) - 1
    return [sigmas[round(index * last / (count - 1))] for index in range(count)]


def karras_levels(num_steps: int, *, sigma_min: float, sigma_max: float, rho: float = 7.0) -> list[float]:
    """`num_steps` levels from `sigma_max` down to `sigma_min` (Karras et al. 2022, Eq. 5), without the final 0."""
    if num_steps == 1:
        return [sigma_max]
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(top + index / (num_steps - 1) * (bottom - top)) ** rho for index in range(num_steps)]


def sample(
    denoise: Denoise,
    spec: SamplerSpec,
    draw: Callable[[int], Array],
    num_steps: int,
    init_image: InitImage | None = None,
) -> Array:
    """The sample x0 for the noise stream `draw(k)`: draw 0 starts, draw k re-noises before evaluation k.

    `draw(k)` returns unit normal noise of the batch's shape (B, C, H, W). With an `init_image`, that image and its
    strength decide where it starts and what stays.
    """
    noise = draw(0)
    height, width = (*NO_SIZE, *noise.shape)[-2:]
    size = height, width
    settle = _settled(spec.clip, init_image)
    levels = spec.levels(num_steps, size)
    kept = levels if init_image is None else init_image.levels(levels)
    first = None if init_image is None else init_image.start(noise, kept[0])
    if spec.kind == "heun":
        answer = denoise if settle is None else lambda x_sigma, sigma: settle(denoise(x_sigma, sigma))
        return heun(answer, noise * spec.noise_scale if first is None else first, kept)
    path = spec.path(num_steps, size, len(levels) - len(kept))
    return follow(denoise, noise * path.start if first is None else first, path.steps, draw, settle)


def _settled(clip: float | None, init_image: InitImage | None) -> Callable[[Array], Array] | None:
    """What is made of each answer: it is clamped, and what is known of an init image stays."""
    if clip is None:
        return None if init_image is None else init_image.restore
    clamp: Callable[[Array], Array] = lambda x0: x0.clip(-clip, clip)  # noqa: E731
    return clamp if init_image is None else lambda x0: init_image.restore(clamp(x0))


def few_step(
    denoise: Denoise, x: Array, levels: list[float], draw: Callable[[int], Array], eta: float = 1.0
) -> Array:
    """Multi-step sampling of a few-step student: predict x0, go to the next level with noise, repeat.

    The noise is fresh (`eta` = 1, consistency models), what the student saw (0, DDIM), or both, by variance.
    """
    return follow(denoise, x, renoised([(sigma, None) for sigma in levels], eta), draw)


def heun(denoise: Denoise, x: Array, levels: list[float]) -> Array:
    """Second-order solution (Karras et al. 2022, Algorithm 1); 2 * len(levels) - 1 evaluations.

    In the paper's own order of operations: pictures of published models keep their bits. `schedulers.solvers.heun` is
    the same in coefficients.
    """
    for sigma, sigma_next in zip(levels, [*levels[1:], 0.0], strict=True):
        slope = (x - denoise(x, sigma)) / sigma
        x_next = x + slope * (sigma_next - sigma)
        if sigma_next > 0:
            slope_next = (x_next - denoise(x_next, sigma_next)) / sigma_next
            x_next = x + (slope + slope_next) * (0.5 * (sigma_next - sigma))
        x = x_next
    return x
