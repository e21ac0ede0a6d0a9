"""Low-rank adapters (LoRA, Hu et al. 2021): a trainable denoiser that shares the weights of a frozen one."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from distill_core.config import LoraConfig
from distill_core.method import Cond
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.generation import preview


class LoraDenoiser(Denoiser):
    """`base` with low-rank factors: the same weights in memory, and only the factors as parameters and state.

    Under `off()` the output is the base's, bit for bit; `base` itself never sees the factors.
    """

    def __init__(self, base: Denoiser, config: LoraConfig) -> None:
        from distill_core.networks.peft_io import with_lora  # peft takes seconds to import

        super().__init__()
        twin, factors = with_lora(base, rank=config.rank, alpha=config.alpha, targets=config.layers)
        self._take(twin, factors)

    def _take(self, twin: Denoiser, factors: dict[str, nn.Parameter]) -> None:
        # Outside the module tree: the base's weights are no parameters of this role, and not part of its state.
        self._outside = (twin,)
        self.lora = nn.ParameterDict({name.replace(".", "/"): value for name, value in factors.items()})
        self.image, self.cond, self.sampler = twin.image, twin.cond, twin.sampler
        self.schedule = twin.schedule

    @property
    def adapted(self) -> Denoiser:
        """The module tree that holds base weights and factors."""
        return self._outside[0]

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Only the base's weights for the duration, whatever happens inside."""
        from distill_core.networks.peft_io import lora_off

        with lora_off(self.adapted):
            yield

    def forward(self, x_sigma: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        return self.adapted(x_sigma, sigma, cond)

    def with_features(
        self, x_sigma: Tensor, sigma: Tensor, cond: Cond | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        return self.adapted.with_features(x_sigma, sigma, cond)

    def null_cond(self, batch: int) -> Cond:
        return self.adapted.null_cond(batch)

    def encode(self, picture: Tensor) -> Tensor:
        return self.adapted.encode(picture)

    def encode_prompts(self, prompts: list[str]) -> Cond:
        return self.adapted.encode_prompts(prompts)

    def decode(self, x0: Tensor) -> Tensor:
        return self.adapted.decode(x0)

    def enable_gradient_checkpointing(self) -> None:
        self.adapted.enable_gradient_checkpointing()

    def merged(self) -> Denoiser:
        """A plain denoiser of its own weights, with the factors added in."""
        from distill_core.networks.peft_io import merge_lora

        plain = merge_lora(copy.deepcopy(self.adapted))
        plain.image, plain.cond, plain.sampler = self.image, self.cond, self.sampler
        return plain.requires_grad_(False)

    def preview(self, seed: int) -> Tensor:
        """A sheet of samples, classes in turn."""
        return preview(self, seed)

    def save(self, folder: Path) -> None:
        """The merged model's folder, which plain diffusers opens."""
        self.merged().save(folder)  # type: ignore[operator]

    def manifest_fields(self) -> dict[str, Any]:
        """What a manifest says of this model."""
        own = {"image": self.image, "cond": self.cond, "sampler": self.sampler}
        return {**self.adapted.manifest_fields(), **own}  # type: ignore[operator]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.adapted._apply(fn, recurse)  # to a device: shared weights move once, whoever comes first
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> LoraDenoiser:
        """Factors of its own over the same base weights, or over their copy where that was made before."""
        own = {id(value) for value in self.lora.values()}
        for tensor in (*self.adapted.parameters(), *self.adapted.buffers()):
            if id(tensor) not in own:
                memo.setdefault(id(tensor), tensor)
        twin = copy.deepcopy(self.adapted, memo)
        copied = {name.replace("/", "."): memo[id(value)] for name, value in self.lora.items()}
        new = LoraDenoiser.__new__(LoraDenoiser)
        Denoiser.__init__(new)
        new._take(twin, copied)
        return new
