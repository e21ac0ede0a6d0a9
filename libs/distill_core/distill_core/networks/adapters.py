"""Low-rank adapters (LoRA, Hu et al. 2021): a trainable denoiser that shares the weights of a frozen one.

    W = W0 + s D,    D = B A of rank r,    and over one base    W = W0 + a D1 + b D2

`strength` is s. `combined` makes the adapter of a sum; `merged` adds an adapter into a copy of the base.
A saved adapter is a folder `adapter/` that peft opens, with `base.json` in it: what it adapts. Pipelines of diffusers
want a file beside that folder with other names for the same factors, and text-to-image adapters have both.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core.config import Config
from distill_core.errors import ArtifactError, ConfigError
from distill_core.files.json_tables import read_table
from distill_core.kinds.denoiser.card import Card
from distill_core.method import Cond
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.fake_tensors import is_faked
from distill_core.recipe.tables import LoraConfig

Factors = dict[str, tuple[Tensor, Tensor]]  # as `peft_io` has them

if TYPE_CHECKING:
    from distill_core.networks.lora_formats.writing import Style

ADAPTER, BASE = "adapter", "base.json"  # in a model's folder; beside peft's files


class AdapterBase(Config):
    """Base of an adapter, exactly."""

    ref: str = ""  # name@version in the store, if it came from there
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")  # of the network's weights


@dataclass(frozen=True)
class Beneath:
    """Origin of a base that is itself a sum: of another base, and of factors."""

    base: AdapterBase
    factors: Factors


class LoraDenoiser(Denoiser):
    """`base` with low-rank factors: the same weights in memory, and only the factors as parameters and state.

    Under `off()` the output is the base's, bit for bit; `base` itself never sees the factors.
    """

    form: Literal["merged", "adapter"] = "merged"  # what `save` writes; "adapter": without the base
    base_ref: str = ""  # the base's name@version in the store, if it came from there
    beneath: Beneath | None = (
        None  # what the base itself was made of; files then hold both, over that one's base
    )

    def __init__(self, base: Denoiser, config: LoraConfig) -> None:
        from distill_core.networks.peft_io import with_lora  # peft takes seconds to import

        super().__init__()
        self.beneath = getattr(base, "beneath", None)
        self.base_ref = self.beneath.base.ref if self.beneath else base.ref
        self._take(*with_lora(base, rank=config.rank, alpha=config.alpha, targets=config.layers))

    @classmethod
    def load(cls, base: Denoiser, folder: Path) -> LoraDenoiser:
        """The adapter of a model folder, or of a folder in peft's format, over `base`; its other weights are not read.

        Raises:
            ArtifactError: no adapter, damaged, or one for other weights than those of `base`.
        """
        from distill_core.networks.diffusers_io import read_sidecar
        from distill_core.networks.peft_io import load_peft

        inside = folder / ADAPTER if has_adapter(folder) else folder
        meant = read_base(inside)
        if meant is not None and not is_faked() and meant.sha256 != weights_sha256(base):
            raise ArtifactError(
                f"{folder} is an adapter over {meant.ref or 'a model'} with other weights than "
                f"{base.ref or 'this one'}; load it over the model it was made for"
            )
        new = cls._of(base.ref, *load_peft(base, inside))
        if sidecar := read_sidecar(folder):
            new.image, new.cond, new.sampler = sidecar.image, sidecar.cond, sidecar.sampler
        return new

    @classmethod
    def of_factors(cls, base: Denoiser, factors: Factors) -> LoraDenoiser:
        """The adapter over `base` with these factors, at strength 1."""
        from distill_core.networks.peft_io import with_factors

        return cls._of(base.ref, *with_factors(base, factors))

    @classmethod
    def _of(cls, base_ref: str, twin: Denoiser, factors: dict[str, nn.Parameter]) -> LoraDenoiser:
        new = cls.__new__(cls)
        Denoiser.__init__(new)
        new.base_ref = base_ref
        new._take(twin, factors)
        return new

    def _take(self, twin: Denoiser, factors: dict[str, nn.Parameter]) -> None:
        # Outside the module tree: the base's weights are no parameters of this role, and not part of its state.
        self._outside = (twin,)
        self._strength = 1.0
        self.lora = nn.ParameterDict({name.replace(".", "/"): value for name, value in factors.items()})
        self.image, self.cond, self.sampler = twin.image, twin.cond, twin.sampler
        self.schedule = twin.schedule

    @property
    def adapted(self) -> Denoiser:
        """The module tree that holds base weights and factors."""
        return self._outside[0]

    def base(self) -> Denoiser:
        """A module tree over the base's very weights, without the factors."""
        from distill_core.networks.peft_io import without_lora

        plain = without_lora(self.adapted)
        plain.ref = self.base_ref
        return plain

    @property
    def strength(self) -> float:
        """Factor of the adapter's part; 0 is the base, bit for bit."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        from distill_core.networks.peft_io import set_strength

        set_strength(self.adapted, value)
        self._strength = value

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Only the base's weights for the duration, whatever happens inside."""
        from distill_core.networks.peft_io import lora_off

        with lora_off(self.adapted):
            yield

    def forward(
        self, x_sigma: Tensor, sigma: Tensor, cond: Cond | None = None, time: Tensor | None = None
    ) -> Tensor:
        return self.adapted(x_sigma, sigma, cond, *(() if time is None else (time,)))

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

    def encode_negative(self, prompts: list[str]) -> Cond:
        return self.adapted.encode_negative(prompts)

    def decode(self, x0: Tensor) -> Tensor:
        return self.adapted.decode(x0)

    def enable_gradient_checkpointing(self) -> None:
        self.adapted.enable_gradient_checkpointing()

    def merged(self) -> Denoiser:
        """A plain denoiser of its own weights, with the factors added in at their strength."""
        from distill_core.networks.peft_io import merge_lora

        plain = copy.deepcopy(self._described())
        return merge_lora(plain).requires_grad_(False)

    def over(self, base: Denoiser) -> Denoiser:
        """As `merged`, sampled as `base` is, and with the memory of what it was made of."""
        from distill_core.networks.peft_io import factors_of

        whole = self.merged()
        whole.image, whole.cond, whole.sampler = base.image, base.cond, base.sampler
        known = AdapterBase(ref=base.ref, sha256=weights_sha256(base))
        factors = {name: (down.cpu(), up.cpu()) for name, (down, up) in factors_of(self.adapted).items()}
        whole.beneath = Beneath(known, factors)  # type: ignore[assignment]
        return whole

    def factors(self) -> Factors:
        """What files hold: the factors at their strength, with those that the base itself was made with."""
        from distill_core.networks.peft_io import factors_of

        own = factors_of(self.adapted)
        if self.beneath is None:
            return own
        here = {name: (down.cpu(), up.cpu()) for name, (down, up) in own.items()}
        return added([(self.beneath.factors, 1.0), (here, 1.0)])

    def save(self, folder: Path) -> None:
        """Write `adapter/`, and as `form` says a whole diffusers folder with the factors merged in."""
        if self.form == "merged":
            self.merged().save(folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._described().save_description(folder)  # type: ignore[operator]
        self.save_adapter(folder / ADAPTER)
        if self.cond.kind == "prompt":  # what else there is no pipeline of diffusers loads adapters into
            from distill_core.networks.lora_formats.writing import DIFFUSERS_FILE

            self.export(folder / DIFFUSERS_FILE)

    def export(self, file: Path, *, style: Style = "diffusers") -> None:
        """Write the factors, at their strength, as one file with the keys of other programs.

        Raises:
            ConfigError: keys that have no names for this network's layers.
        """
        from distill_core.networks.lora_formats.writing import write_lora

        write_lora(self.factors(), self.base(), file, style=style)

    def save_adapter(self, folder: Path) -> None:
        """Write the factors in peft's format, and what they are over."""
        from distill_core.networks.peft_io import save_peft

        save_peft(self.factors(), folder, base=self.base_ref)
        own = AdapterBase(ref=self.base_ref, sha256=weights_sha256(self.adapted))
        base = own if self.beneath is None else self.beneath.base
        (folder / BASE).write_text(base.model_dump_json(indent=1), encoding="utf-8")

    def card(self) -> Card:
        """Facts that the manifest keeps."""
        return self._described().card().model_copy(update={"base": self.base_ref})

    def _described(self) -> Denoiser:
        """The tree, with what a method may have changed of the student: above all its sampler."""
        self.adapted.image, self.adapted.cond, self.adapted.sampler = self.image, self.cond, self.sampler
        return self.adapted

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # to a device: shared weights move once, whoever comes first
        self.adapted._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved

    def __deepcopy__(self, memo: dict[int, Any]) -> LoraDenoiser:
        """Factors of its own over the same base weights, or over their copy where that was made before."""
        own = {id(value) for value in self.lora.values()}
        for tensor in (*self.adapted.parameters(), *self.adapted.buffers()):
            if id(tensor) not in own:
                memo.setdefault(id(tensor), tensor)
        twin = copy.deepcopy(self._described(), memo)
        copied = {name.replace("/", "."): memo[id(value)] for name, value in self.lora.items()}
        new = LoraDenoiser._of(self.base_ref, twin, copied)
        new.form, new._strength, new.beneath = self.form, self._strength, self.beneath
        return new


def combined(terms: Sequence[tuple[LoraDenoiser, float]]) -> LoraDenoiser:
    """The adapter `a D1 + b D2 + …` of adapters over one base; its rank is the sum of theirs, its sampler the first's.

    Raises:
        ConfigError: no terms, or adapters over different weights.
    """
    from distill_core.networks.peft_io import factors_of

    if not terms:
        raise ConfigError("there is nothing to combine; give at least one adapter")
    first = terms[0][0]
    if any(
        _places(first) != _places(other) and weights_sha256(first.adapted) != weights_sha256(other.adapted)
        for other, _ in terms
    ):
        raise ConfigError("adapters of different bases cannot be combined; choose adapters of one model")
    factors = added([(factors_of(adapter.adapted), weight) for adapter, weight in terms])
    total = LoraDenoiser.of_factors(first.base(), factors)
    total.image, total.cond, total.sampler = first.image, first.cond, first.sampler
    return total


def added(terms: Sequence[tuple[Factors, float]]) -> Factors:
    """The factors of a weighted sum of products; the rank of each layer is the sum of its ranks."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for factors, weight in terms:
        for name, (down, up) in factors.items():
            parts.setdefault(name, []).append((down, weight * up))
    return {
        name: (torch.cat([down for down, _ in pairs]), torch.cat([up for _, up in pairs], dim=1))
        for name, pairs in parts.items()
    }


def has_adapter(folder: Path) -> bool:
    """Whether a model's folder holds an adapter: beside its merged weights, or alone."""
    return (folder / ADAPTER / "adapter_config.json").is_file()


def read_base(adapter: Path) -> AdapterBase | None:
    """Base of the adapter in peft's format at `adapter`; None if it does not name one."""
    try:
        return AdapterBase.parse(read_table(adapter / BASE))
    except FileNotFoundError:
        return None
    except (ValueError, ConfigError) as error:
        raise ArtifactError(f"{adapter / BASE} is damaged: {error}") from None


def plain(model: nn.Module) -> nn.Module:
    """`model`, and an adapter as the plain model it amounts to."""
    if not isinstance(model, LoraDenoiser):
        return model
    merged = model.merged()
    merged.ref = model.ref
    return merged


def weights_sha256(denoiser: Denoiser) -> str:
    """SHA-256 of the network's weights by name, without low-rank factors; computed again only if they changed."""
    weights = sorted(_weights(denoiser).items())
    marks = [(value.data_ptr(), value._version) for _, value in weights]
    known = getattr(denoiser, "_weights_sha256", None)
    if known is None or known[0] != marks:
        digest = hashlib.sha256()
        for name, value in weights:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        known = denoiser._weights_sha256 = marks, digest.hexdigest()  # type: ignore[assignment]
    return str(known[1])


def _places(adapter: LoraDenoiser) -> set[int]:
    return {value.data_ptr() for value in _weights(adapter.adapted).values()}


def _weights(denoiser: Denoiser) -> dict[str, Tensor]:
    tensors = getattr(denoiser, "network", denoiser).state_dict()
    return {
        name.replace(".base_layer.", "."): value for name, value in tensors.items() if ".lora_" not in name
    }
