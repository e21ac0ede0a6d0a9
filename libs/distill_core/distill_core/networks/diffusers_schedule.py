"""Schedulers of diffusers as noise schedules, and what a network under each of them answers."""

from __future__ import annotations

from typing import Any

from distill_core.diffusion.schedule import NoiseSchedule, Parameterisation
from distill_core.errors import ArtifactError
from distill_core.networks.fake_tensors import real_tensors

PREDICTIONS: dict[str, Parameterisation] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
CLAMPING = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
)  # with `clip_sample`; others only write that down
FLOWING = ("FlowMatch", "SCM")  # x = (1 - t) x0 + t eps, the latter with t = sin / (sin + cos) of its angle
LEARNED = ("learned", "learned_range")  # variance_type: the second half of the output is no x0


@real_tensors()
def schedule_of(scheduler: Any) -> NoiseSchedule:
    """The noise schedule that a diffusers scheduler's config describes.

    Raises:
        ArtifactError: of an unknown kind, or betas that are none.
    """
    config, name = scheduler.config, type(scheduler).__name__
    if name.startswith("EDM"):
        return NoiseSchedule(
            "edm", sigma_min=config.sigma_min, sigma_max=config.sigma_max, sigma_data=config.sigma_data
        )
    if _flows(scheduler):
        return NoiseSchedule(
            "flow", sigma_min=1e-3, sigma_max=999.0, num_timesteps=config.num_train_timesteps
        )
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ArtifactError(
            f"scheduler {name} is not supported; known: EDM*, FlowMatch*, SCM and those with betas"
        )
    alphas, zero_snr = scheduler.alphas_cumprod, bool(config.get("rescale_betas_zero_snr"))
    falling = bool((alphas[1:-1] < alphas[:-2]).all()) and float(alphas[0]) < 1 and float(alphas[-1]) >= 0
    falling = falling and (zero_snr or float(alphas[-1]) < float(alphas[-2]))
    if not falling or len(alphas) != config.num_train_timesteps:
        raise ArtifactError(
            f"the betas of scheduler {name} are no noise schedule: there is one for each of the "
            f"num_train_timesteps = {config.num_train_timesteps}, above 0 and at most 1"
        )
    if is_continuous(scheduler):  # EDM's scaling for data of standard deviation 1, and its time
        low, high = config.get("sigma_min"), config.get("sigma_max")
        sigmas = ((1 - alphas) / alphas).sqrt()
        low, high = low or float(sigmas[0]), high or float(sigmas[-1])
        return NoiseSchedule("edm", sigma_min=low, sigma_max=high, sigma_data=1.0)
    return NoiseSchedule("vp", alphas_cumprod=alphas, zero_snr=zero_snr)


def parameterisation_of(scheduler: Any) -> Parameterisation:
    """Quantity that a network trained under `scheduler` predicts.

    Raises:
        ArtifactError: something that is not understood.
    """
    config, name = scheduler.config, type(scheduler).__name__
    prediction = config.get("prediction_type", "epsilon")
    if name.startswith(FLOWING):
        return "flow"
    if _flows(scheduler) != (prediction == "flow_prediction"):
        raise _refused(
            name, f"prediction_type = {prediction} with use_flow_sigmas = {_flows(scheduler)}".lower()
        )
    if _flows(scheduler):
        return "flow"
    if name.startswith("EDM"):
        if prediction == "epsilon":
            return "edm"
        if prediction != "v_prediction" or config.sigma_data != 1:
            raise _refused(name, f"prediction_type = {prediction} with sigma_data = {config.sigma_data}")
    if prediction not in PREDICTIONS:
        raise _refused(name, f"prediction_type = {prediction}")
    return PREDICTIONS[prediction]


def learns_variance(scheduler: Any) -> bool:
    """Whether a network under `scheduler` answers a variance below what it predicts."""
    return scheduler.config.get("variance_type") in LEARNED


def clip_of(scheduler: Any) -> float | None:
    """To which [-clip, clip] a scheduler clamps x0 in its steps; None: it does not."""
    clamps = scheduler.config.get("clip_sample") and type(scheduler).__name__ in CLAMPING
    return float(scheduler.config.get("clip_sample_range", 1.0)) if clamps else None


def _refused(name: str, setting: str) -> ArtifactError:
    return ArtifactError(
        f"scheduler/scheduler_config.json of {name} says {setting}, which is not understood; known are epsilon, "
        "v_prediction and sample, flow_prediction with use_flow_sigmas, and for EDM* epsilon, or v_prediction with "
        "sigma_data = 1"
    )


def _flows(scheduler: Any) -> bool:
    return type(scheduler).__name__.startswith(FLOWING) or bool(scheduler.config.get("use_flow_sigmas"))


def is_continuous(scheduler: Any) -> bool:
    """Whether a network under a scheduler of betas is told ln(sigma) / 4, as EDM's are."""
    config = scheduler.config
    return bool(config.get("timestep_type") == "continuous" and config.prediction_type == "v_prediction")
