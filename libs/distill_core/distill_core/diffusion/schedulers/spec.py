"""A diffusers scheduler as data: the keys of its config that decide which steps are taken, by diffusers' own names."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from distill_core.config import Config

Solver = Literal[
    "ddim",
    "euler",
    "euler_ancestral",
    "heun",
    "dpmpp_2m",
    "unipc",
    "lcm",
    "tcd",
    "flow_euler",
    "scm",
]
DISCRETE = ("ddim", "lcm", "tcd")  # they visit training timesteps alone
MULTISTEP = ("dpmpp_2m", "unipc")


class SchedulerSpec(Config):
    """Scheduler of a foreign folder; part of the manifest, so that a server needs neither diffusers nor torch."""

    name: Solver
    num_train_timesteps: int = Field(1000, ge=2, le=10**6)
    beta_start: float = 0.0001  # vp: the variance that a training timestep adds, first and last
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: tuple[float, ...] = ()  # in the place of these three
    rescale_betas_zero_snr: bool = False  # betas that end without any signal (Lin et al. 2024, Algorithm 1)
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace"
    steps_offset: int = Field(0, ge=0)  # leading: added to every timestep
    spread: Literal["", "karras", "exponential"] = ""  # levels between the grid's ends; "": those of the grid
    sigma_min: float | None = None  # of `spread`; None: the grid's own ends
    sigma_max: float | None = None
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"  # level at which the last step ends
    set_alpha_to_one: bool = True  # ddim: the last step ends at no noise; else at the first timestep's
    eta: float = Field(0.0, ge=0, le=1)  # ddim, tcd: share of the noise that is made anew in each step
    stochastic: bool = False  # dpmpp_2m: the SDE's steps; flow_euler: x0, noise again to the next level, x0 …
    solver_type: Literal["midpoint", "heun"] = "midpoint"  # dpmpp_2m
    lower_order_final: bool = True  # dpmpp_2m: below 15 steps the last one is of first order
    euler_at_final: bool = False  # dpmpp_2m: it always is
    original_inference_steps: int = Field(
        50, ge=1
    )  # lcm, tcd: size of the grid that the steps are chosen from
    timesteps: tuple[int, ...] = ()  # lcm: the timesteps themselves, descending, whatever the grid
    timestep_scaling: float = Field(10.0, gt=0)  # lcm: how fast x0 takes its own input's place
    use_flow_sigmas: bool = False  # dpmpp_2m, unipc: levels of flow matching
    shift: float = Field(1.0, gt=0)  # flow: t -> s t / (1 + (s - 1) t)
    use_dynamic_shifting: bool = False  # flow: the shift depends on the size of what is drawn
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    base_shift: float = 0.5  # dynamic: mu of `base_image_seq_len` tokens, and on a line with it …
    max_shift: float = 1.15  # … of `max_image_seq_len`
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    mu: Literal["line", "flux2"] = "line"  # dynamic: the line of the above, or FLUX.2's formula
    shift_terminal: float | None = Field(
        None, gt=0, lt=1
    )  # flow: the last time, which the others are stretched to
    even_levels: bool = (
        False  # flow: the pipeline asks for times 1 to 1/N; else from the schedule's first to last
    )
    patch: int = Field(1, ge=1)  # dynamic: a token is so many values of x a side

    @model_validator(mode="after")
    def _fits(self) -> SchedulerSpec:
        if list(self.timesteps) != sorted(set(self.timesteps), reverse=True):
            raise ValueError("timesteps must be descending")
        if self.trained_betas and len(self.trained_betas) != self.num_train_timesteps:
            raise ValueError(f"there must be {self.num_train_timesteps} trained_betas")
        if self.name in ("lcm", "tcd") and self.original_inference_steps > self.num_train_timesteps:
            raise ValueError(f"original_inference_steps must be at most {self.num_train_timesteps}")
        if self.final_sigmas_type == "sigma_min" and (self.flows or self.name == "unipc"):
            raise ValueError("final_sigmas_type must be zero here")
        cosine = (
            self.name in MULTISTEP and self.beta_schedule == "squaredcos_cap_v2" and not self.trained_betas
        )
        if self.spread and (self.use_flow_sigmas or cosine):  # the library itself finds no steps there
            raise ValueError(
                f"{self.spread} levels do not go with use_flow_sigmas, nor with beta_schedule = squaredcos_cap_v2"
            )
        return self

    @property
    def flows(self) -> bool:
        """Whether its levels are times of flow matching, x = (1 - t) x0 + t eps."""
        return self.name in ("flow_euler", "scm") or self.use_flow_sigmas

    @property
    def timed(self) -> bool:
        """Whether the network is told a time that its level does not tell: whole numbers beside other levels."""
        rounded = self.name in MULTISTEP and (self.use_flow_sigmas or bool(self.spread))
        return rounded or (bool(self.spread) and self.rescale_betas_zero_snr)
