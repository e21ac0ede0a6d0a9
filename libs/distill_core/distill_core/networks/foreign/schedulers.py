"""Keys of the schedulers that are read, and the solver of each class that becomes a sampler.

A scheduler is read for the noise schedule that a network was trained under and for what the network answers. Of a class
in `SOLVERS` also how diffusers walks through that schedule: the folder's sampler takes the same steps. Of other classes
that is idle: their folders are sampled by Euler's method on Karras' levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from distill_core.networks.foreign.keys import Keys, names

_BETAS = names(
    "num_train_timesteps beta_start beta_end beta_schedule trained_betas rescale_betas_zero_snr prediction_type"
)
_STEPS = names(
    """
    timestep_spacing steps_offset set_alpha_to_one skip_prk_steps final_sigmas_type use_karras_sigmas
    use_exponential_sigmas use_beta_sigmas use_lu_lambdas sigma_schedule rho interpolation_type lambda_min_clipped
    original_inference_steps shift flow_shift use_dynamic_shifting time_shift_type base_shift max_shift
    base_image_seq_len max_image_seq_len shift_terminal
    """
)  # which levels diffusers visits
_SOLVER = names(
    """
    solver_order solver_type algorithm_type lower_order_final euler_at_final predict_x0 disable_corrector solver_p
    predictor_order corrector_order tau_func stochastic_sampling
    """
)  # how diffusers goes from one level to the next
_CLAMPED = names(
    "clip_sample clip_sample_range"
)  # what diffusers' sampler makes of x0: part of the sampler that a folder gives (`diffusers_schedule.clip_of`)
_UNUSED = names("dynamic_thresholding_ratio sample_max_value")  # without `thresholding`, which is refused
_IDLE = _STEPS | _SOLVER | _CLAMPED | _UNUSED
_WHY = {
    "thresholding": "x0 is scaled by its own largest values at each step",
    "invert_sigmas": "noise is at 0 and data at 1",
    "timestep_type": "the network is told another time",
    "scale_factors": "pictures grow between steps",
    "timestep_scaling": "x0 is mixed with its own input at more than the lowest levels",
}


def _far_from_data(scaling: Any) -> bool:
    """Whether the boundary condition of a consistency model is felt at its first timesteps only."""
    return isinstance(scaling, int | float) and scaling >= 10


def _fixed(variance: Any) -> bool:
    """Whether a variance is the sampler's own, and no part of what a network answers."""
    return isinstance(variance, str) and variance.startswith("fixed_")


def _plus(algorithm: Any) -> bool:
    """Whether DPM-Solver predicts x0; `deis` is taken for it by the class itself."""
    return algorithm in ("dpmsolver++", "sde-dpmsolver++", "deis")


def _not_bh1(solver: Any) -> bool:
    """Whether UniPC takes its second form, as it does for the names of other classes' solvers."""
    return isinstance(solver, str) and solver != "bh1"


def _betas(extra: str = "", idle: str = "") -> Keys:
    return Keys(_BETAS | names(extra), _IDLE | names(idle), _BOUND, _WHY)


def _stepped(read: str, refused: str = "", **bound: Callable[[Any], bool]) -> Keys:
    """A class that becomes a sampler: `read` is honoured, and of `refused` its own default alone is."""
    honoured, unread = names(read), names(refused) | frozenset(bound)
    return Keys(honoured, _IDLE - honoured - unread, {**_BOUND, **bound}, _WHY)


_BOUND = {"timestep_scaling": _far_from_data, "variance_type": _fixed}
_BASE = " ".join(sorted(_BETAS)) + " timestep_spacing steps_offset"
_SPREAD = " use_karras_sigmas use_exponential_sigmas sigma_min sigma_max"
_CONSISTENCY = _BASE + " original_inference_steps set_alpha_to_one clip_sample clip_sample_range"
_SHIFTS = (
    "shift use_dynamic_shifting time_shift_type base_shift max_shift base_image_seq_len max_image_seq_len "
    "shift_terminal"
)


_FLOWING = _betas("use_flow_sigmas variance_type", "sigma_min sigma_max")
_FLOW = Keys(frozenset({"num_train_timesteps"}), _IDLE | {"upscale_mode"}, why=_WHY)
_DDIM = _stepped(_BASE + " set_alpha_to_one clip_sample clip_sample_range")
_MULTISTEP = _BASE + _SPREAD + " use_flow_sigmas flow_shift final_sigmas_type variance_type"
_NOT_MULTISTEP = "solver_order use_beta_sigmas use_dynamic_shifting"
_EDM = Keys(
    names("sigma_min sigma_max sigma_data prediction_type"), _IDLE | {"num_train_timesteps"}, why=_WHY
)
SCHEDULERS: Mapping[str, Keys] = {
    **dict.fromkeys(("DDIMScheduler", "DDIMParallelScheduler"), _DDIM),
    "PNDMScheduler": _betas(),
    **dict.fromkeys(("DDPMScheduler", "DDPMParallelScheduler"), _betas("variance_type")),
    "DPMSolverMultistepScheduler": _stepped(
        _MULTISTEP + " solver_type lower_order_final euler_at_final",
        f"{_NOT_MULTISTEP} use_lu_lambdas lambda_min_clipped",
        algorithm_type=_plus,
    ),
    "UniPCMultistepScheduler": _stepped(
        _MULTISTEP,
        f"{_NOT_MULTISTEP} predict_x0 disable_corrector solver_p lower_order_final shift_terminal",
        solver_type=_not_bh1,
    ),
    **dict.fromkeys(
        ("DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "SASolverScheduler"), _FLOWING
    ),
    "EulerDiscreteScheduler": _stepped(
        _BASE + _SPREAD + " timestep_type final_sigmas_type", "interpolation_type use_beta_sigmas"
    ),
    "EulerAncestralDiscreteScheduler": _stepped(_BASE),
    "HeunDiscreteScheduler": _stepped(_BASE + _SPREAD + " clip_sample clip_sample_range", "use_beta_sigmas"),
    **dict.fromkeys(("LMSDiscreteScheduler", "KDPM2DiscreteScheduler"), _betas()),
    "KDPM2AncestralDiscreteScheduler": _betas(),
    "LCMScheduler": _stepped(_CONSISTENCY, timestep_scaling=_far_from_data),
    "TCDScheduler": _stepped(
        _CONSISTENCY + " timestep_scaling"
    ),  # the last is written, and not used by the class
    **dict.fromkeys(("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"), _EDM),
    "FlowMatchEulerDiscreteScheduler": _stepped(
        f"num_train_timesteps stochastic_sampling use_karras_sigmas use_exponential_sigmas {_SHIFTS}",
        "use_beta_sigmas invert_sigmas",
    ),
    **dict.fromkeys(("FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"), _FLOW),
    "SCMScheduler": _stepped("num_train_timesteps sigma_data"),
}
SOLVERS = {
    "DDIMScheduler": "ddim",
    "DDIMParallelScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
    "FlowMatchEulerDiscreteScheduler": "flow_euler",
    "SCMScheduler": "scm",
}
