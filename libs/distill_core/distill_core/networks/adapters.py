"""Low-rank adapters (LoRA, Hu et al. 2021): a trainable denoiser that shares the weights of a frozen one."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, Literal, Self

from pydantic import Field
from torch import Tensor, nn

from distill_core.config import Config
from distill_core.method import Cond
from distill_core.networks.denoiser import Denoiser

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class LoraConfig(Config):
    """Size and place of the low-rank factors; their product is scaled by alpha / rank."""

    rank: int = Field(64, ge=1, le=4096)
    alpha: float = Field(64.0, gt=0)
    targets: Literal["all-linear"] | tuple[str, ...] = ATTENTION  # ends of layer names, as in peft

    @property
    def layers(self) -> tuple[str, ...] | None:
        """The layers' names; None is every linear layer."""
        return None if self.targets == "all-linear" else self.targets  # type: ignore[return-value]


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
