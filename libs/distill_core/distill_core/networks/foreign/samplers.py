"""The sampler of a foreign folder: what its scheduler's config says, as data."""

from __future__ import annotations

from typing import Any

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
ETA = {"tcd": 0.3}  # of pipelines that are not told another


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
