"""Keys of the schedulers that are read.

A scheduler is read for the noise schedule that a network was trained under and for what the network answers. How
diffusers would walk through that schedule is idle: pictures are drawn by our samplers.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def _betas(extra: str = "", idle: str = "") -> Keys:
    return Keys(_BETAS | names(extra), _IDLE | names(idle), _BOUND, _WHY)


_BOUND = {"timestep_scaling": _far_from_data, "variance_type": _fixed}


_FLOWING = _betas("use_flow_sigmas variance_type", "sigma_min sigma_max")
_FLOW = Keys(frozenset({"num_train_timesteps"}), _IDLE | {"upscale_mode"}, why=_WHY)
_EDM = Keys(
    names("sigma_min sigma_max sigma_data prediction_type"), _IDLE | {"num_train_timesteps"}, why=_WHY
)
SCHEDULERS: Mapping[str, Keys] = {
    **dict.fromkeys(("DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler"), _betas()),
    **dict.fromkeys(("DDPMScheduler", "DDPMParallelScheduler"), _betas("variance_type")),
    **dict.fromkeys(("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"), _FLOWING),
    **dict.fromkeys(("DEISMultistepScheduler", "SASolverScheduler", "UniPCMultistepScheduler"), _FLOWING),
    "EulerDiscreteScheduler": _betas("timestep_type sigma_min sigma_max"),
    **dict.fromkeys(("EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"), _betas()),
    **dict.fromkeys(("LMSDiscreteScheduler", "KDPM2DiscreteScheduler"), _betas()),
    "KDPM2AncestralDiscreteScheduler": _betas(),
    "LCMScheduler": _betas(),
    "TCDScheduler": _betas(idle="timestep_scaling"),  # written, and not used by the class
    **dict.fromkeys(("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"), _EDM),
    **dict.fromkeys(("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"), _FLOW),
    "FlowMatchLCMScheduler": _FLOW,
}
