"""Sampling of a saved denoiser in plain diffusers: the scheduler that its folder keeps, and the call that uses it.

    few steps, vp      LCMScheduler: x0, noise again to the next level, x0 …; what `diffusion.sampling.few_step` does
      without noise    DDIMScheduler with trailing spacing, for numbers of steps that divide the timesteps
    Euler, vp          EulerDiscreteScheduler on Karras' levels
    few steps, flow    FlowMatchEulerDiscreteScheduler, not shifted and stochastic: x0, noise again to the next level …
    a folder's own     the scheduler that it came with
    one step, edm      EDMEulerScheduler, from a level where sqrt(1 + sigma^2) = sigma to 0.1 %
    scheduler          the one of the foreign folder, whose steps they are

Nothing else of diffusers takes the same steps. A teacher's scheduler spaces its steps otherwise, and at one step most
begin near no noise at all; a student's folder that kept it would open, and draw noise. A schedule that ends without
any signal is saved with the finite last level that it has here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch

from distill_core.artifacts import CondSpec, SamplerSpec
from distill_core.diffusion.schedule import NoiseSchedule, Parameterisation

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
OF_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
ON_GRID = 1e-2  # of a timestep: as near as float32 tells
TEXT_PIPELINES = (
    *("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
    *("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
)  # they take timesteps
SCALING_PIPELINES = (
    *TEXT_PIPELINES,
    "LDMPipeline",
)  # they scale what the network sees, as Euler's schedulers wish
EDM_START = 1e-3  # how far the noise that diffusers begins with may be from ours, as a share


@dataclass(frozen=True)
class PlainUse:
    """A scheduler, and for each number of steps the timesteps, or flow times, to name; none: spacing finds them.

    Without any number of steps the scheduler does not take the sampler's.
    """

    scheduler: Any
    steps: dict[int, tuple[float, ...]] = field(default_factory=dict)
    named: str = "timesteps"  # the pipeline's argument for them


def plain_use(
    scheduler: Any,
    schedule: NoiseSchedule,
    spec: SamplerSpec,
    parameterisation: Parameterisation,
    pipeline: str | None,
) -> PlainUse:
    """Scheduler that takes the steps of `spec` in plain diffusers, by the class `pipeline`, by hand if None."""
    if spec.kind == "scheduler":
        return PlainUse(scheduler, {spec.num_steps: ()})
    if schedule.kind == "flow" and spec.kind == "few_step" and pipeline is not None:
        return _renoising(scheduler, spec)
    if schedule.kind == "vp" and scheduler.config.get("rescale_betas_zero_snr"):
        scheduler = _finite(scheduler, schedule)
    if schedule.kind == "vp" and spec.kind == "few_step":
        timesteps = _timesteps(schedule, spec)
        if timesteps is not None and spec.eta == 0 and len(spec.sigmas) > 1:
            return _chain(scheduler, PREDICTIONS[parameterisation], timesteps)
        if timesteps is not None and (spec.eta == 1 or len(spec.sigmas) == 1):
            return _consistency(scheduler, spec, PREDICTIONS[parameterisation], timesteps)
        if len(spec.sigmas) == 1 and pipeline in SCALING_PIPELINES:  # between two timesteps
            return PlainUse(_euler(scheduler, spec, PREDICTIONS[parameterisation]), {1: ()})
    if schedule.kind == "vp" and spec.kind == "euler" and pipeline in SCALING_PIPELINES and spec.clip is None:
        return PlainUse(_euler(scheduler, spec, PREDICTIONS[parameterisation]), {spec.num_steps: ()})
    if type(scheduler).__name__.startswith("EDM") and _from_pure_noise(schedule, spec):
        return PlainUse(_edm(scheduler), {spec.num_steps: ()})
    return PlainUse(scheduler)


def pipeline_class(
    parts: dict[str, Any], cond: CondSpec, schedule: NoiseSchedule, *, tileable: bool, named: str = ""
) -> str | None:
    """The diffusers pipeline of a folder with these parts; None where no class calls such a network as it must be.

    `named` is the one pipeline of a network's family, where there is only one. A DDPMPipeline neither scales what the
    network sees nor knows classes; none pads a picture with its other side.
    """
    if named:
        return named if not tileable and {"vae", "text_encoder"} <= parts.keys() else None
    if tileable or schedule.kind == "flow":
        return None
    codec = parts.get("vae") or parts.get("vqvae")
    if codec is not None and codec.config.get("shift_factor"):  # which these pipelines do not read
        return None
    moments = codec is not None and codec.config.get("latents_mean") is not None  # read by SDXL's alone
    if "text_encoder_2" in parts and "vae" in parts:
        return "StableDiffusionXLPipeline"
    if "text_encoder" in parts and "vae" in parts:
        return None if moments else "StableDiffusionPipeline"
    if cond.kind != "none" or "unet" not in parts or schedule.kind != "vp" or moments:
        return None
    return "LDMPipeline" if "vqvae" in parts else "DDPMPipeline"


def opens(use: PlainUse, spec: SamplerSpec, pipeline: str) -> bool:
    """Whether the pipeline makes the model's pictures with the scheduler: a folder that does not has no index."""
    if spec.kind != "few_step":
        return pipeline == "DDPMPipeline" or bool(use.steps)
    named = use.steps.get(spec.num_steps)
    return named is not None and (not named or use.named == "sigmas" or pipeline in TEXT_PIPELINES)


def _timesteps(schedule: NoiseSchedule, spec: SamplerSpec) -> dict[int, tuple[int, ...]] | None:
    """For each number of steps the integers at which the network is called; None if a level lies between two."""
    counts = spec.step_counts or tuple(range(1, len(spec.sigmas) + 1))
    timesteps = {}
    for count in counts:
        times = schedule.network_time(torch.tensor(spec.levels(count)))
        if float((times - times.round()).abs().max()) > ON_GRID or int(times.round().min()) < 1:
            return None
        timesteps[count] = tuple(int(time) for time in times.round())
    return timesteps


def _renoising(scheduler: Any, spec: SamplerSpec) -> PlainUse:
    """A scheduler of flow matching that takes the named flow times as they are, and noises x0 to each."""
    counts = spec.step_counts or tuple(range(1, len(spec.sigmas) + 1))
    times = {count: tuple(round(s / (1 + s), 6) for s in spec.levels(count)) for count in counts}
    total = scheduler.config.num_train_timesteps
    plain = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=total, stochastic_sampling=True)
    return PlainUse(plain, times, named="sigmas")


def _consistency(
    scheduler: Any, spec: SamplerSpec, prediction: str, timesteps: dict[int, tuple[int, ...]]
) -> PlainUse:
    """The LCMScheduler whose own spacing finds the usual number of steps, and if it can the others."""
    total = int(scheduler.config.num_train_timesteps)
    first = timesteps[spec.num_steps][0] + 1
    best: PlainUse | None = None
    for original in [first, *range(1, total + 1)]:
        if (
            total // original * original != first and original != total
        ):  # the last: any, timesteps are named then
            continue
        candidate = PlainUse(_lcm(scheduler, prediction, original), dict(timesteps))
        for count, expected in timesteps.items():
            if count <= original and _spaced(total, original, count) == expected:
                candidate.steps[count] = ()
        if best is None or _ease(candidate, spec) > _ease(best, spec):
            best = candidate
    assert best is not None
    return best


def _chain(scheduler: Any, prediction: str, timesteps: dict[int, tuple[int, ...]]) -> PlainUse:
    """The DDIMScheduler that walks the chains whose timesteps its trailing spacing finds."""
    total = int(scheduler.config.num_train_timesteps)
    new = _like(
        diffusers.DDIMScheduler,
        scheduler,
        prediction_type=prediction,
        clip_sample=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )
    found: dict[int, tuple[float, ...]] = {
        count: ()
        for count, times in timesteps.items()
        if times == tuple(range(total - 1, -1, -(total // count))) and total % count == 0
    }
    return PlainUse(new, found)


def _spaced(total: int, original: int, count: int) -> tuple[int, ...]:
    """The timesteps of an LCMScheduler for `count` steps."""
    stride = total // original
    return tuple(
        (original - int(index * (original / count))) * stride - 1 for index in range(count)
    )  # its own floor of a float


def _ease(use: PlainUse, spec: SamplerSpec) -> tuple[bool, int]:
    return not use.steps[spec.num_steps], sum(not named for named in use.steps.values())


def _lcm(scheduler: Any, prediction: str, original: int) -> Any:
    return _like(
        diffusers.LCMScheduler,
        scheduler,
        prediction_type=prediction,
        original_inference_steps=original,
        timestep_scaling=1e6,  # the student's answer is x0 itself: nothing of the noised sample is mixed in
        clip_sample=False,
        steps_offset=1,  # what pipelines set, with a warning, where it is missing
        timestep_spacing="trailing",
    )


def _euler(scheduler: Any, spec: SamplerSpec, prediction: str) -> Any:
    low, high = (spec.sigma_min, spec.sigma_max) if spec.kind == "euler" else (spec.sigmas[0], spec.sigmas[0])
    return _like(
        diffusers.EulerDiscreteScheduler,
        scheduler,
        prediction_type=prediction,
        use_karras_sigmas=True,
        sigma_min=low,
        sigma_max=high,
        timestep_spacing="leading",  # noise to begin with of sqrt(1 + sigma^2); spacing does nothing else here
        steps_offset=1,
    )


def _finite(scheduler: Any, schedule: NoiseSchedule) -> Any:
    """A scheduler whose last level is ours: with no signal at all there, diffusers would divide by 0."""
    assert schedule.log_sigmas is not None
    alphas = 1 / (1 + (2 * schedule.log_sigmas).exp())
    betas = 1 - alphas / torch.cat([alphas.new_ones(1), alphas[:-1]])
    return diffusers.DDPMScheduler(num_train_timesteps=len(betas), trained_betas=betas.tolist())


def _edm(scheduler: Any) -> Any:
    names = ("sigma_min", "sigma_max", "sigma_data", "num_train_timesteps", "prediction_type")
    args = {name: scheduler.config[name] for name in names if name in scheduler.config}
    return diffusers.EDMEulerScheduler(**args)


def _from_pure_noise(schedule: NoiseSchedule, spec: SamplerSpec) -> bool:
    """edm: whether diffusers begins where the sampler does, and takes the same steps."""
    if abs(spec.start / schedule.sigma_max - 1) > EDM_START or spec.start**-2 / 2 > EDM_START:
        return False
    ends = abs(spec.sigma_min / schedule.sigma_min - 1) < EDM_START
    return len(spec.sigmas) == 1 if spec.kind == "few_step" else spec.kind == "euler" and ends


def _like(cls: Any, scheduler: Any, **options: Any) -> Any:
    """A scheduler of another class over the same betas."""
    config = {name: scheduler.config[name] for name in OF_BETAS if scheduler.config.get(name) is not None}
    try:
        new = cls(**config, **options)
        same = torch.equal(new.alphas_cumprod, scheduler.alphas_cumprod)
    except NotImplementedError:  # a shape of betas that only the other class knows
        same = False
    if not same:
        new = cls(num_train_timesteps=len(scheduler.betas), trained_betas=scheduler.betas.tolist(), **options)
    return new
