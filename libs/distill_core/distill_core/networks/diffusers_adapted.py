"""A diffusers network with adapters that guide it, which are saved beside it and move to others of its shape."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill_core.errors import ArtifactError, ConfigError
from distill_core.method import Cond
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.diffusers_denoiser import DiffusersDenoiser, Sidecar
from distill_core.networks.fake_tensors import is_faked
from distill_core.networks.guidance_adapters import TOLD, GuidanceAdapterConfig, GuidanceAdapters

FILE = "guidance_adapters.safetensors"  # in a model's folder


class AdaptedDenoiser(DiffusersDenoiser):
    """`network` with `adapters` beside its attention layers; without the condition `guidance` (B,) it is the network.

    With `shared` the network lies outside the module tree: its weights are another model's, and the adapters alone are
    parameters and state.
    """

    shared = False

    def __init__(
        self,
        network: ModelMixin,
        scheduler: Any,
        sidecar: Sidecar,
        *,
        adapters: GuidanceAdapters,
        **companions: Any,
    ) -> None:
        super().__init__(network, scheduler, sidecar, **companions)
        self.adapters = adapters
        adapters.attach(network)

    @classmethod
    def over(cls, base: Denoiser, adapters: GuidanceAdapterConfig | GuidanceAdapters) -> AdaptedDenoiser:
        """The very weights of `base` with new adapters, or with a copy of those of another checkpoint.

        Raises:
            ConfigError: a base whose attention layers cannot have adapters, or not these.
        """
        if not isinstance(base, DiffusersDenoiser):
            raise ConfigError(
                f"adapters go beside the attention layers of a diffusers network, and this is a {type(base).__name__}",
                field="teacher",
            )
        weights = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
        network = copy.deepcopy(
            base.network, weights
        )  # another module tree: what is in the memo is not copied
        config = adapters.config if isinstance(adapters, GuidanceAdapters) else adapters
        new = GuidanceAdapters(config, network, base.cond).to(next(network.parameters()).device)
        if isinstance(adapters, GuidanceAdapters):
            _take(new, adapters.state_dict())
        made = cls(network, base.scheduler, base._sidecar(), adapters=new, **base._companions)
        made.shared = True
        made.__dict__["network"] = made._modules.pop("network")
        return made

    def forward(
        self, x_sigma: Tensor, sigma: Tensor, cond: Cond | None = None, time: Tensor | None = None
    ) -> Tensor:
        if cond and "guidance" in cond:
            cond = {**cond, TOLD: self.adapters.told(cond["guidance"], sigma, cond)}
        return super().forward(x_sigma, sigma, cond, time)

    def save(self, folder: Path) -> None:
        """Write the network's own folder, and the adapters beside it."""
        super().save(folder)
        tensors = {
            name: value.detach().cpu().contiguous() for name, value in self.adapters.state_dict().items()
        }
        save_file(tensors, folder / FILE)

    def _like(self, network: ModelMixin, **companions: Any) -> AdaptedDenoiser:
        return AdaptedDenoiser(
            network, self.scheduler, self._sidecar(), adapters=copy.deepcopy(self.adapters), **companions
        )

    def _sidecar(self) -> Sidecar:
        return super()._sidecar().model_copy(update={"adapters": self.adapters.config})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.shared:  # shared weights move once, whoever comes first
            self.network._apply(fn, recurse)
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved


def load_adapted(base: DiffusersDenoiser, config: GuidanceAdapterConfig, folder: Path) -> AdaptedDenoiser:
    """`base` with the adapters that `folder` keeps.

    Raises:
        ArtifactError: the file is missing, damaged, or one for another network.
    """
    try:
        adapters = GuidanceAdapters(config, base.network, base.cond)
        if not is_faked():
            _take(adapters, load_file(folder / FILE))
    except (OSError, SafetensorError, ConfigError) as error:
        raise ArtifactError(f"{folder / FILE} is missing, damaged or of another network: {error}") from None
    return AdaptedDenoiser(
        base.network, base.scheduler, base._sidecar(), adapters=adapters, **base._companions
    )


@torch.no_grad()
def _take(adapters: GuidanceAdapters, tensors: dict[str, Tensor]) -> None:
    """Copy weights; refuse those of a network of another shape."""
    try:
        adapters.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(
            f"these adapters belong to a network of another shape: {reason}", field="adapters"
        ) from None
