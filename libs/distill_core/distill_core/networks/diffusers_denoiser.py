"""A diffusers UNet or DiT as a `Denoiser`, and back to a folder that plain diffusers opens."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from pydantic import model_validator
from torch import Tensor, nn

from distill_core.artifacts import CondSpec, ImageSpec, SamplerSpec
from distill_core.artifacts.model_card import CARD
from distill_core.config import Config
from distill_core.diffusion.levels import expand
from distill_core.diffusion.schedule import Parameterisation, to_x0
from distill_core.diffusion.super_resolution import LOW_RESOLUTION, small_shape
from distill_core.errors import ConfigError
from distill_core.kinds.denoiser.card import Card
from distill_core.method import Cond
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.diffusers_codec import decode_latent, to_latent, unscaled
from distill_core.networks.diffusers_plain import opens, pipeline_class, plain_use
from distill_core.networks.diffusers_schedule import schedule_of
from distill_core.networks.enlarging import enlarge
from distill_core.networks.fake_tensors import real_tensors
from distill_core.networks.families import family_of
from distill_core.networks.guidance_adapters import GuidanceAdapterConfig
from distill_core.networks.prompts import PromptEncoder
from distill_core.networks.scalar_conditions import add_scalars, packed, save_scalars, without_scalars
from distill_core.networks.tileable import decode_wrapped, wrap_around
from distill_core.networks.usage import Place, usage

SIDECAR = "distillery.json"


class Sidecar(Config):
    """Facts that a diffusers folder cannot hold; missing in foreign folders, then derived."""

    image: ImageSpec
    cond: CondSpec
    sampler: SamplerSpec
    parameterisation: Parameterisation
    scalars: tuple[Literal["guidance", "gamma"], ...] = ()  # it is told beside level and condition
    adapters: GuidanceAdapterConfig | None = None  # beside its attention layers: `networks.diffusers_adapted`

    @model_validator(mode="after")
    def _divides(self) -> Sidecar:
        if self.cond.factor is not None:
            small_shape(self.image.picture, self.cond.factor, field="cond.factor")
        return self

    @property
    def beside(self) -> int:
        """Channels that the network is shown beside the noised sample: the enlarged small picture's, or 0."""
        return 0 if self.cond.factor is None else self.image.channels


class DiffusersDenoiser(Denoiser):
    """A diffusers network with its schedule, and for text-to-image its text encoder and image decoder."""

    def __init__(
        self,
        network: ModelMixin,
        scheduler: Any,
        sidecar: Sidecar,
        *,
        codec: ModelMixin | None = None,
        text: PromptEncoder | None = None,
    ) -> None:
        super().__init__()
        self.network: ModelMixin = (
            network.eval()
        )  # never train(): dropout must be off in teacher, student and fake score alike
        self.scheduler = scheduler
        self.schedule = schedule_of(scheduler)
        self.image, self.cond, self.sampler = sidecar.image, sidecar.cond, sidecar.sampler
        self.parameterisation: Parameterisation = sidecar.parameterisation
        self.scalars = sidecar.scalars
        # Frozen companions live outside the module tree: they are not trained, copied per role, or averaged.
        self._companions: dict[str, Any] = {"codec": codec, "text": text}
        self.family = family_of(network)
        self.family.prepare(network)
        if self.image.tileable:  # diffusers' own config has no word for it
            wrap_around(network)

    def train(self, mode: bool = True) -> DiffusersDenoiser:
        return super().train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> DiffusersDenoiser:
        network = copy.deepcopy(self.network, memo)
        return self.with_network(network)

    def with_network(self, network: ModelMixin) -> DiffusersDenoiser:
        """`network` in the place of this one's, with its schedule, encoder and decoder."""
        return self._like(network, **self._companions)

    def with_text(self, text: PromptEncoder) -> DiffusersDenoiser:
        """The same network with `text` in the place of its text encoder."""
        return self._like(self.network, codec=self.codec, text=text)

    def _like(self, network: ModelMixin, **companions: Any) -> DiffusersDenoiser:
        return DiffusersDenoiser(network, self.scheduler, self._sidecar(), **companions)

    @property
    def codec(self) -> ModelMixin | None:
        codec: ModelMixin | None = self._companions["codec"]
        return codec

    def own_codec(self) -> Any:
        """A copy of the codec, which takes the place of the one that is shared with other models."""
        self._companions["codec"] = copy.deepcopy(self.codec)
        return self.codec

    @property
    def text(self) -> PromptEncoder | None:
        text: PromptEncoder | None = self._companions["text"]
        return text

    @property
    def called_apart(self) -> list[nn.Module]:
        """Modules called from outside the block that holds them."""
        return self.family.called_apart(self.network)

    def enable_gradient_checkpointing(self) -> None:
        try:
            self.network.enable_gradient_checkpointing()
        except ValueError:  # of a class that has no blocks to recompute
            super().enable_gradient_checkpointing()

    def to_device(self, device: torch.device | str) -> DiffusersDenoiser:
        """Move the network and its companions."""
        for companion in self._companions.values():
            if companion is not None:
                companion.to(device)
        return self.to(device)

    def forward(
        self, x_sigma: Tensor, sigma: Tensor, cond: Cond | None = None, time: Tensor | None = None
    ) -> Tensor:
        scaled = x_sigma * expand(self.schedule.scale(sigma), x_sigma)
        cond = self._with_null(cond, x_sigma.shape[0])  # len() would bake the batch into an exported graph
        if self.scalars:
            cond = {**cond, "class_label": packed(self.scalars, cond.get("class_label"), cond, scaled)}
        told = self.schedule.network_time(sigma) if time is None else time
        shown = self._beside(scaled, cond)
        output = self.family.call(self.network, shown, told, cond, self.image)
        x0 = to_x0(
            output.float(), x_sigma, expand(sigma, x_sigma), self.parameterisation, self.schedule.sigma_data
        )
        return x0.to(x_sigma.dtype)

    def with_features(
        self, x_sigma: Tensor, sigma: Tensor, cond: Cond | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        with _captured(self.family.trunk(self.network)) as features:
            x0 = self(x_sigma, sigma, cond)
        return x0, [self.family.as_map(self.network, feature, x_sigma) for feature in features]

    def null_cond(self, batch: int) -> Cond:
        device = next(self.network.parameters()).device
        if self.cond.kind == "none":
            return {}
        if self.cond.factor is not None:  # grey: no small picture means "none", and guidance is refused
            return {
                LOW_RESOLUTION: torch.zeros(
                    batch, *small_shape(self.image.picture, self.cond.factor), device=device
                )
            }
        if self.cond.kind == "prompt":
            null = self.encode_prompts([""]) if self.text is None else self.text.null()  # kept by the encoder
            return {name: value.to(device).expand(batch, *value.shape[1:]) for name, value in null.items()}
        if self.cond.null_label is None:
            raise ConfigError(
                "guidance needs a null class, and this model has none; use guidance = 1", field="guidance"
            )
        return {"class_label": torch.full((batch,), self.cond.null_label, dtype=torch.long, device=device)}

    def encode_prompts(self, prompts: list[str]) -> Cond:
        if self.text is None:
            return super().encode_prompts(prompts)
        return self.text.encode(prompts)

    def encode_negative(self, prompts: list[str]) -> Cond:
        if self.text is None:
            return super().encode_negative(prompts)
        return self.text.encode(prompts, negative=True)

    def encode(self, picture: Tensor) -> Tensor:
        if self.codec is None:
            return picture
        return to_latent(self.codec, picture)

    def decode(self, x0: Tensor) -> Tensor:
        codec = self.codec
        if codec is None:
            return x0
        if self.image.tileable:
            return decode_wrapped(lambda wrapped: codec.decode(wrapped).sample, unscaled(codec, x0))
        return decode_latent(codec, x0)

    def save(self, folder: Path) -> None:
        """Write a folder that plain diffusers opens, with our `distillery.json` and words on its use beside."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.scalars:
            with without_scalars(self.network) as projections:
                self.network.save_pretrained(folder / self._slot())
            save_scalars(projections, folder)
        else:
            self.network.save_pretrained(folder / self._slot())
        self.save_description(folder, self.save_companions(folder))

    def save_description(
        self, folder: Path, companions: dict[str, Any] | None = None, *, inside: str = ""
    ) -> None:
        """Write all but weights: scheduler, pipeline's index, our sidecar and the card's words.

        Without `companions` the folder is an adapter's; `inside` is where the network lies in it.
        """
        parts = {
            self._slot(): self.network,
            **(self._companion_parts() if companions is None else companions),
        }
        named = self.family.pipeline_for(self.network.config, self.text)
        tileable = self.image.tileable
        pipeline = pipeline_class(parts, self.cond, self.schedule, tileable=tileable, named=named)
        with real_tensors():
            use = plain_use(self.scheduler, self.schedule, self.sampler, self.parameterisation, pipeline)
        use.scheduler.save_pretrained(folder / "scheduler")
        parts["scheduler"] = use.scheduler
        told = self.sampler.guidance_range is not None
        if pipeline is not None and (told or not opens(use, self.sampler, pipeline)):
            pipeline = None
        if pipeline is not None and companions is not None:  # else the folder opens part by part
            options = {} if self.text is None else self.text.options
            index = {**_model_index(pipeline, parts, self.family.index_of(pipeline)), **options}
            (folder / "model_index.json").write_text(json.dumps(index, indent=1))
        self.save_sidecar(folder)
        place = Place(inside, adapter=companions is None)
        classes = {name: type(part).__name__ for name, part in parts.items()}
        words = usage(self, classes, use, pipeline, place)
        (folder / CARD).write_text(words + "\n", encoding="utf-8")

    def _companion_parts(self) -> dict[str, Any]:
        codec = {} if self.codec is None else {self._codec_slot(): self.codec}
        parts = {} if self.text is None else self.text.parts
        return codec | {name: part for name, part in parts.items() if isinstance(part, nn.Module)}

    def bare(self) -> DiffusersDenoiser:
        """The same network without its companions."""
        return self._like(self.network)

    def save_companions(self, folder: Path) -> dict[str, Any]:
        """Write decoder and text encoder, if there are any; the entries of the pipeline's index."""
        parts: dict[str, Any] = {}
        if self.codec is not None:
            self.codec.save_pretrained(folder / self._codec_slot())
            parts[self._codec_slot()] = self.codec
        return parts if self.text is None else parts | self.text.save(folder)

    def save_sidecar(self, folder: Path) -> None:
        """Write only `distillery.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SIDECAR).write_text(self._sidecar().model_dump_json(indent=1), encoding="utf-8")

    def _sidecar(self) -> Sidecar:
        return Sidecar(
            image=self.image,
            cond=self.cond,
            sampler=self.sampler,
            parameterisation=self.parameterisation,
            scalars=self.scalars,
        )

    def tell(self, *names: Literal["guidance", "gamma"]) -> None:
        """Give the network further inputs, which change nothing until they are trained."""
        new = tuple(name for name in names if name not in self.scalars)
        if new and self.scalars:
            raise ConfigError(f"this model is told {self.scalars[0]} already, and takes no further input")
        if new:
            add_scalars(self.network, new)
            self.scalars = new

    def card(self) -> Card:
        """Facts that the manifest keeps."""
        return Card(
            parameterisation=self.parameterisation, sampler=self.sampler, image=self.image, cond=self.cond
        )

    def _codec_slot(self) -> str:
        """The decoder's sub-folder; LDMPipeline has a name of its own for it."""
        unconditional = self.cond.kind == "none" and self._slot() == "unet"
        return "vqvae" if unconditional or type(self.codec).__name__ == "VQModel" else "vae"

    def _slot(self) -> str:
        return self.family.slot

    def _beside(self, x: Tensor, cond: Cond) -> Tensor:
        """What the network is shown: x (B, C, H, W), and below it the small picture, enlarged and encoded."""
        if self.cond.factor is None:
            return x
        large = self.encode(enlarge(cond[LOW_RESOLUTION], self.image.picture))
        return torch.cat([x, large.to(x)], 1)

    def _with_null(self, cond: Cond | None, batch: int) -> Cond:
        cond, usual = cond or self.null_cond(batch), self.cond.embedded_guidance
        if usual is not None and "embedded_guidance" not in cond:
            like = next(iter(cond.values()))
            told = torch.full((batch,), usual, device=like.device)
            return {**cond, "embedded_guidance": told}
        return cond


@contextlib.contextmanager
def _captured(module: nn.Module) -> Iterator[list[Any]]:
    outputs: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def _model_index(pipeline: str, parts: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__, **others}
    for name, part in parts.items():
        index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
    return index
