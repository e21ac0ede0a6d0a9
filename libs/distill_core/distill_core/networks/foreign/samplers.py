"""The sampler of a foreign folder: what its scheduler's config says, as data, and what is known of few-step students.

No file says that a model was distilled. What tells it is the scheduler that its folder was saved with:

    LCMScheduler                                  4 steps, guidance 1      Latent Consistency Models, LCM-LoRA: 2 to 8
    TCDScheduler                                  4 steps, guidance 1      TCD, Hyper-SD's unified LoRA: 1 to 8 and more
    Euler or Euler ancestral, trailing, epsilon   4 steps, guidance 1      SD-Turbo, SDXL-Turbo, Lightning: 1 to 4
    FlowMatchEuler, shift 1, FLUX without guide   4 steps, guidance 1      FLUX.1-schnell: 1 to 4
    SCMScheduler                                  2 steps, guidance 1      SANA-Sprint: 1 to 4

Their cards' "guidance 0" is the conditional prediction, which is 1 here.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill_core.diffusion import schedulers
from distill_core.diffusion.sampling import SamplerSpec, Size
from distill_core.diffusion.schedule import NoiseSchedule
from distill_core.diffusion.schedulers import SchedulerSpec
from distill_core.errors import ArtifactError, ConfigError
from distill_core.networks.diffusers_schedule import is_continuous
from distill_core.networks.foreign.keys import defaults_of, names
from distill_core.networks.foreign.schedulers import SOLVERS

_SAME = names(
    """
    num_train_timesteps beta_start beta_end beta_schedule rescale_betas_zero_snr timestep_spacing steps_offset
    sigma_min sigma_max final_sigmas_type set_alpha_to_one solver_type lower_order_final euler_at_final
    original_inference_steps timestep_scaling use_flow_sigmas shift use_dynamic_shifting time_shift_type base_shift
    max_shift base_image_seq_len max_image_seq_len shift_terminal
    """
)  # the config's own names
_SPREADS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential"}
ETA = {"tcd": 0.3}  # of `TCDScheduler.step` that is not told another
START = 80.0  # level that students begin at, where the schedule has a higher one
NUM_STEPS = 30  # of a model that is no few-step student
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FewSteps:
    """Number of steps of a few-step student, and what it was recognised as."""

    num_steps: int
    known_as: str


def few_steps_of(scheduler: Any, network: Mapping[str, Any]) -> FewSteps | None:
    """What a folder with this scheduler and network config is taken for; None if it is no few-step student."""
    config, name = scheduler.config, type(scheduler).__name__
    if name in ("LCMScheduler", "TCDScheduler"):
        return FewSteps(4, f"a student of {name.removesuffix('Scheduler')}, by its scheduler")
    if name == "SCMScheduler":
        return FewSteps(2, "a student of SCM (SANA-Sprint), by its scheduler")
    trailing = config.get("timestep_spacing") == "trailing" and not config.get("rescale_betas_zero_snr")
    if name.startswith("Euler") and trailing and config.get("prediction_type") == "epsilon":
        return FewSteps(
            4, "a few-step student (SD-Turbo, SDXL-Turbo, Lightning), by its scheduler's trailing spacing"
        )
    flux = str(network.get("_class_name", "")).startswith("Flux") and network.get("guidance_embeds") is False
    if name == "FlowMatchEulerDiscreteScheduler" and flux and config.get("shift") == 1:
        shifted = config.get("use_dynamic_shifting")
        return (
            None
            if shifted
            else FewSteps(4, "FLUX.1-schnell, by its scheduler's shift of 1 and a network without guidance")
        )
    return None


def folder_sampler(
    scheduler: Any,
    schedule: NoiseSchedule,
    *,
    size: Size,
    guidance: float = 1.0,
    clip: float | None = None,
    network: Mapping[str, Any] | None = None,
    spec: SchedulerSpec | None = None,
) -> SamplerSpec:
    """The sampler of a foreign folder for an x of `size`: its scheduler's own steps.

    A class that there is no sampler of gets Euler's method on Karras' levels. What was taken for granted is in
    `assumed`, and logged. `spec` is what the scheduler was read as, where a pipeline does more with it.
    """
    name, few = type(scheduler).__name__, few_steps_of(scheduler, network or {})
    spec = spec or scheduler_spec(scheduler)
    ends = {"sigma_min": max(schedule.sigma_min, 0.002), "sigma_max": min(schedule.sigma_max, START)}
    num_steps = _usable(spec, few.num_steps if few else NUM_STEPS)
    said = {"guidance": 1.0 if few else guidance, "clip": clip, "num_steps": num_steps}
    if spec is None:
        assumed = (
            f"{name} has no sampler here; taken instead: Euler's method on {num_steps} of Karras' levels"
        )
        scale = schedule.start_scale(ends["sigma_max"])
        sampler = SamplerSpec(
            kind="euler", noise_scale=scale, max_steps=schedulers.MOST_STEPS, assumed=assumed, **ends, **said
        )
    else:
        assumed = f"taken for {few.known_as}: {num_steps} steps without guidance" if few else ""
        scale, most = schedulers.path(spec, num_steps, size).start, schedulers.most_steps(spec)
        sampler = SamplerSpec(
            kind="scheduler",
            scheduler=spec,
            noise_scale=scale,
            max_steps=most,
            assumed=assumed,
            **ends,
            **said,
        )
    if sampler.assumed:
        log.info("sampling is %s", sampler.assumed)
    return sampler


def _usable(spec: SchedulerSpec | None, num_steps: int) -> int:
    """The largest number of steps up to `num_steps` that there are levels for."""
    if spec is None:
        return num_steps
    for count in range(min(num_steps, schedulers.most_steps(spec)), 0, -1):
        with contextlib.suppress(ConfigError):
            schedulers.levels(spec, count, (1, 1))
            return count
    raise ArtifactError(
        f"the scheduler has no levels for 1 to {num_steps} steps: steps_offset = {spec.steps_offset} leads past them"
    )


def scheduler_spec(scheduler: Any, *, even_levels: bool = False, patch: int = 1) -> SchedulerSpec | None:
    """The sampler of a diffusers scheduler; None for a class that there is no sampler of.

    `even_levels` and `patch` are what a pipeline does with a scheduler of flow matching.

    Raises:
        ArtifactError: values that no levels can be made of.
    """
    name = type(scheduler).__name__
    config, solver = scheduler.config, SOLVERS.get(name)
    if solver is None or is_continuous(scheduler):
        return None
    values: dict[str, Any] = {"name": solver, "even_levels": even_levels, "patch": patch}
    values |= {key: config[key] for key in _own(type(scheduler), solver) if config.get(key) is not None}
    values["spread"] = next((word for key, word in _SPREADS.items() if config.get(key)), "")
    values["stochastic"] = bool(config.get("stochastic_sampling")) or "sde" in str(
        config.get("algorithm_type")
    )
    values["eta"] = ETA.get(solver, 0.0)
    if config.get("trained_betas") is not None:
        values["trained_betas"] = [float(beta) for beta in config["trained_betas"]]
    if "flow_shift" in config:
        values["shift"] = config["flow_shift"]
    try:
        return SchedulerSpec.parse(values)
    except ConfigError as error:
        raise ArtifactError(f"scheduler/scheduler_config.json of {name} makes no sampler: {error}") from None


def _own(cls: Any, solver: str) -> list[str]:
    """Keys that the class reads: a config may hold others', written for another class."""
    taken = defaults_of(cls)
    return [key for key in sorted(_SAME) if key in taken and (key != "solver_type" or solver == "dpmpp_2m")]
