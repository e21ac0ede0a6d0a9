"""The only door to diffusers: any UNet or DiT folder as a `Denoiser`, and back to a folder plain diffusers opens."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from distill_core.artifacts import CondSpec, ImageSpec, SamplerSpec
from distill_core.config import Config, NetworkConfig
from distill_core.diffusion.schedule import NoiseSchedule, Parameterisation, to_x0
from distill_core.errors import ArtifactError, ConfigError, NotFound, nearest, out_of_memory
from distill_core.method import Cond
from distill_core.networks.denoiser import Denoiser, expand, loading
from distill_core.networks.generation import preview
from distill_core.networks.steering import make_steerable
from distill_core.networks.text import TextEncoder, check_text, load_text_encoder, text_for
from distill_core.networks.tileable import decode_wrapped, wrap_around
from distill_core.networks.weightless import is_weightless, real_tensors

NETWORKS = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")
SIDECAR = "distillery.json"


class Sidecar(Config):
    """What a diffusers folder cannot say of itself; missing in foreign folders, then derived."""

    image: ImageSpec
    cond: CondSpec
    sampler: SamplerSpec
    parameterisation: Parameterisation


class DiffusersDenoiser(Denoiser):
    """A diffusers network with its schedule, and for text-to-image its text encoder and image decoder."""

    def __init__(
        self,
        network: nn.Module,
        scheduler: Any,
        sidecar: Sidecar,
        *,
        codec: nn.Module | None = None,
        text: TextEncoder | None = None,
    ) -> None:
        super().__init__()
        self.network = (
            network.eval()
        )  # never train(): dropout must be off in teacher, student and fake score alike
        self.scheduler = scheduler
        self.schedule = schedule_of(scheduler)
        self.image, self.cond, self.sampler = sidecar.image, sidecar.cond, sidecar.sampler
        self.parameterisation: Parameterisation = sidecar.parameterisation
        # Frozen companions live outside the module tree: they are not trained, copied per role, or averaged.
        self._companions = {"codec": codec, "text": text}
        if isinstance(network, diffusers.UNet2DConditionModel):
            make_steerable(network)
        if self.image.tileable:  # diffusers' own config has no word for it
            wrap_around(network)

    def train(self, mode: bool = True) -> DiffusersDenoiser:
        return super().train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> DiffusersDenoiser:
        network = copy.deepcopy(self.network, memo)
        return DiffusersDenoiser(network, self.scheduler, self._sidecar(), **self._companions)

    @property
    def codec(self) -> nn.Module | None:
        return self._companions["codec"]

    @property
    def text(self) -> TextEncoder | None:
        return self._companions["text"]

    def enable_gradient_checkpointing(self) -> None:
        try:
            self.network.enable_gradient_checkpointing()
        except ValueError:  # of a class that has no blocks to recompute
            super().enable_gradient_checkpointing()

    def to_device(self, device: torch.device | str) -> DiffusersDenoiser:
        """Move the network and its companions."""
        for companion in (self.codec, self.text):
            if companion is not None:
                companion.to(device)
        return self.to(device)

    def forward(self, x_sigma: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        scaled = x_sigma * expand(self.schedule.scale(sigma), x_sigma)
        cond = self._with_null(cond, x_sigma.shape[0])  # len() would bake the batch into an exported graph
        output = self._call(scaled, self.schedule.network_time(sigma), cond)
        x0 = to_x0(
            output.float(), x_sigma, expand(sigma, x_sigma), self.parameterisation, self.schedule.sigma_data
        )
        return x0.to(x_sigma.dtype)

    def with_features(
        self, x_sigma: Tensor, sigma: Tensor, cond: Cond | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        with _captured(self._trunk()) as features:
            x0 = self(x_sigma, sigma, cond)
        return x0, [self._as_map(feature) for feature in features]

    def null_cond(self, batch: int) -> Cond:
        device = next(self.network.parameters()).device
        if self.cond.kind == "none":
            return {}
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

    def encode(self, picture: Tensor) -> Tensor:
        if self.codec is None:
            return picture
        with torch.autocast(
            picture.device.type, enabled=False
        ):  # latents in 8 bits of mantissa are other pictures
            latent = self.codec.encode(picture.to(self.codec.dtype)).latent_dist.mode().float()
        return (latent - (self.codec.config.get("shift_factor") or 0.0)) * self.codec.config["scaling_factor"]

    def decode(self, x0: Tensor) -> Tensor:
        if self.codec is None:
            return x0
        latent = x0 / self.codec.config["scaling_factor"] + (self.codec.config.get("shift_factor") or 0.0)
        if self.image.tileable:
            return decode_wrapped(lambda wrapped: self.codec.decode(wrapped).sample, latent)
        return self.codec.decode(latent).sample

    def preview(self, seed: int) -> Tensor:
        """A sheet of samples, classes in turn."""
        return preview(self, seed)

    def save(self, folder: Path) -> None:
        """Write a folder that plain diffusers opens, with our `distillery.json` beside."""
        folder.mkdir(parents=True, exist_ok=True)
        self.network.save_pretrained(folder / self._slot())
        self.scheduler.save_pretrained(folder / "scheduler")
        parts = {self._slot(): self.network, "scheduler": self.scheduler}
        parts |= self.save_companions(folder)
        self.save_sidecar(folder)
        pipeline = _pipeline_class(parts, self.cond)
        if (
            pipeline
        ):  # class-conditional pixel models have no pipeline class in diffusers: they open part by part
            options = {} if self.text is None else self.text.options
            index = {**_model_index(pipeline, parts), **options}
            (folder / "model_index.json").write_text(json.dumps(index, indent=1))

    def bare(self) -> DiffusersDenoiser:
        """The same network without its companions."""
        return DiffusersDenoiser(self.network, self.scheduler, self._sidecar())

    def save_companions(self, folder: Path) -> dict[str, Any]:
        """Write decoder and text encoder, if there are any; the entries of the pipeline's index."""
        parts: dict[str, Any] = {}
        if self.codec is not None:
            self.codec.save_pretrained(folder / "vae")
            parts["vae"] = self.codec
        return parts if self.text is None else parts | self.text.save(folder)

    def save_sidecar(self, folder: Path) -> None:
        """Write only `distillery.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SIDECAR).write_text(self._sidecar().model_dump_json(indent=1), encoding="utf-8")

    def _sidecar(self) -> Sidecar:
        return Sidecar(
            image=self.image, cond=self.cond, sampler=self.sampler, parameterisation=self.parameterisation
        )

    def manifest_fields(self) -> dict[str, Any]:
        """What a manifest says of this model."""
        return {
            "kind": "denoiser",
            "image": self.image,
            "cond": self.cond,
            "sampler": self.sampler,
            "parameterisation": self.parameterisation,
        }

    def _slot(self) -> str:
        return "transformer" if "Transformer" in type(self.network).__name__ else "unet"

    def _with_null(self, cond: Cond | None, batch: int) -> Cond:
        return cond or self.null_cond(batch)

    def _call(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        if isinstance(self.network, diffusers.UNet2DConditionModel):
            prompt = cond["prompt_embeds"].to(x.dtype)
            return self.network(x, time, encoder_hidden_states=prompt, **self._text_extras(x, cond)).sample
        if "nasa_scale" in cond:
            raise ConfigError(
                f"{type(self.network).__name__} has no cross-attention that a negative prompt could steer; "
                "leave the negative prompt out",
                field="negative_prompt",
            )
        labels = cond.get("class_label")
        if self._slot() == "transformer":
            if labels is None:  # a DiT always has a label table; unconditional ones use their only row
                labels = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
            return self.network(x, timestep=time, class_labels=labels).sample[
                :, : x.shape[1]
            ]  # drop learned sigma
        return self.network(x, time, class_labels=labels).sample

    def _text_extras(self, x: Tensor, cond: Cond) -> dict[str, Any]:
        """What a text-conditional network is told beside the prompt: SDXL's size and pooled prompt, and steering."""
        extras: dict[str, Any] = {}
        if self.cond.pooled_dim is not None:
            _, height, width = self.image.picture
            size = x.new_tensor(
                [height, width, 0, 0, height, width]
            )  # original size, corner of the crop, size
            pooled = cond["pooled_embeds"].to(x.dtype)
            extras["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": size.expand(x.shape[0], -1)}
        if "nasa_scale" in cond:
            steering = ("negative_prompt_embeds", "nasa_scale")
            extras["cross_attention_kwargs"] = {name: cond[name] for name in steering}
        return extras

    def _trunk(self) -> nn.Module:
        if self._slot() == "unet":
            return self.network.mid_block
        blocks = self.network.transformer_blocks
        return blocks[len(blocks) // 2]

    def _as_map(self, feature: Tensor) -> Tensor:
        if feature.ndim == 4:
            return feature
        patch = self.network.config.patch_size
        size = self.image.height // patch, self.image.width // patch
        return feature.transpose(1, 2).unflatten(2, size)  # (B, N, D) -> (B, D, h, w)


@contextlib.contextmanager
def _captured(module: nn.Module) -> Iterator[list[Tensor]]:
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(
        lambda _module, _inputs, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        yield outputs
    finally:
        handle.remove()


@real_tensors()
def schedule_of(scheduler: Any) -> NoiseSchedule:
    """The noise schedule that a diffusers scheduler's config describes."""
    config, name = scheduler.config, type(scheduler).__name__
    if name.startswith("EDM"):
        return NoiseSchedule(
            "edm", sigma_min=config.sigma_min, sigma_max=config.sigma_max, sigma_data=config.sigma_data
        )
    if name.startswith("FlowMatch"):
        return NoiseSchedule("flow", sigma_min=1e-3, sigma_max=999.0)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ArtifactError(
            f"scheduler {name} is not supported; known: EDM*, FlowMatch*, and those with betas"
        )
    return NoiseSchedule("vp", alphas_cumprod=scheduler.alphas_cumprod)


def _parameterisation_of(scheduler: Any) -> Parameterisation:
    name = type(scheduler).__name__
    if name.startswith("EDM"):
        return "edm"
    if name.startswith("FlowMatch"):
        return "flow"
    names: dict[str, Parameterisation] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
    return names[scheduler.config.prediction_type]


def _pipeline_class(parts: dict[str, Any], cond: CondSpec) -> str | None:
    if "text_encoder" in parts and "vae" in parts:
        return "StableDiffusionXLPipeline" if "text_encoder_2" in parts else "StableDiffusionPipeline"
    return "DDPMPipeline" if cond.kind == "none" and "unet" in parts else None


def _model_index(pipeline: str, parts: dict[str, Any]) -> dict[str, Any]:
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
    if pipeline == "StableDiffusionPipeline":
        index |= {
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        }
    if pipeline == "StableDiffusionXLPipeline":
        index |= {"image_encoder": [None, None], "feature_extractor": [None, None]}
    for name, part in parts.items():
        index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
    return index


def build_denoiser(
    network: NetworkConfig,
    *,
    parameterisation: Parameterisation,
    shape: tuple[int, int, int] | None,
    num_classes: int | None,
    class_names: tuple[str, ...] = (),
    prompts: list[str] | None = None,
    scheduler: dict[str, Any] | None = None,
    num_steps: int = 32,
) -> DiffusersDenoiser:
    """A new network for images of `shape` (C, H, W); `num_classes` None is unconditional.

    The null class has the index `num_classes`. A UNet2DConditionModel is conditioned on text instead, by an encoder
    made from the words of `prompts`. `scheduler` are arguments of the diffusers scheduler.

    Raises:
        ConfigError: an unknown network class, arguments that it refuses, or data without pictures or prompts.
    """
    if network.name not in NETWORKS:
        raise ConfigError(
            f"network.name = {network.name!r} is unknown{nearest(network.name, NETWORKS)}",
            field="network.name",
        )
    if shape is None:
        raise ConfigError(
            "this data has no pictures to learn from; set data.name to digits, images, huggingface or idx",
            field="data.name",
        )
    channels, height, width = shape
    text = text_for(network, prompts) if network.name == "UNet2DConditionModel" else None
    args = {"in_channels": channels, "out_channels": channels, "sample_size": height, **network.args}
    args |= (
        _class_args(network.name, num_classes) if text is None else {"cross_attention_dim": text.embed_dim}
    )
    module = _constructed(network.name, args)
    noise = _new_scheduler(parameterisation, scheduler or {})
    schedule = schedule_of(noise)
    sampler = SamplerSpec(
        kind="heun",
        sigma_min=max(schedule.sigma_min, 0.002),
        sigma_max=min(schedule.sigma_max, 80.0),
        noise_scale=schedule.start_scale(min(schedule.sigma_max, 80.0)),
        num_steps=num_steps,
        max_steps=1000,
    )
    image = ImageSpec(channels=channels, height=height, width=width, picture=shape)
    cond = CondSpec(kind="none")
    if text is not None:
        cond = CondSpec(kind="prompt", max_tokens=text.max_tokens, embed_dim=text.embed_dim)
    elif num_classes is not None:
        cond = CondSpec(
            kind="class_label", num_classes=num_classes, null_label=num_classes, class_names=class_names
        )
    sidecar = Sidecar(image=image, cond=cond, sampler=sampler, parameterisation=parameterisation)
    return _tried(DiffusersDenoiser(module, noise, sidecar, text=text))


def build_like(teacher: DiffusersDenoiser, network: NetworkConfig) -> DiffusersDenoiser:
    """A new network, random and of any size, that takes and gives what `teacher` does: its conditions and schedule.

    Raises:
        ConfigError: another kind of network than the teacher's, or arguments that it refuses.
    """
    theirs = teacher.network.config
    if network.name != type(teacher.network).__name__:
        raise ConfigError(
            f"student.network.name = {network.name!r} cannot stand in for the teacher's "
            f"{type(teacher.network).__name__}; give that name, with args of your choice",
            field="student.network.name",
        )
    fixed = ("in_channels", "out_channels", "sample_size", "num_embeds_ada_norm", "norm_type")
    fixed = (*fixed, "num_class_embeds", "cross_attention_dim", "encoder_hid_dim", "addition_embed_type")
    fixed = (*fixed, "addition_time_embed_dim", "projection_class_embeddings_input_dim")
    args = {name: theirs[name] for name in fixed if theirs.get(name) is not None}
    module = _constructed(network.name, {**network.args, **args})
    return _tried(DiffusersDenoiser(module, teacher.scheduler, teacher._sidecar(), **teacher._companions))


def _constructed(name: str, args: dict[str, Any]) -> nn.Module:
    try:
        return getattr(diffusers, name)(**args)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"network.args are refused by {name}: {error}", field="network.args") from None


def _tried(denoiser: DiffusersDenoiser) -> DiffusersDenoiser:
    """The denoiser after one picture: a class accepts sizes that its own forward pass cannot use."""
    image = denoiser.image
    try:
        with torch.no_grad():
            denoiser(torch.zeros(1, image.channels, image.height, image.width), torch.ones(1))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        if out_of_memory(error):
            raise
        raise ConfigError(
            f"network.args do not suit pictures of shape {image.picture}: {str(error).splitlines()[0]}",
            field="network.args",
        ) from None
    return denoiser


def _class_args(name: str, num_classes: int | None) -> dict[str, Any]:
    if name == "DiTTransformer2DModel":  # its label table has one row more, for the null class
        return {
            "num_embeds_ada_norm": 1 if num_classes is None else num_classes,
            "norm_type": "ada_norm_zero",
        }
    return {} if num_classes is None else {"num_class_embeds": num_classes + 1}


@real_tensors()
def _new_scheduler(parameterisation: Parameterisation, args: dict[str, Any]) -> Any:
    if parameterisation == "edm":
        return diffusers.EDMEulerScheduler(**args)
    if parameterisation == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler(**args)
    prediction = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[parameterisation]
    return diffusers.DDPMScheduler(prediction_type=prediction, **args)


def load_companions(folder: Path, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The frozen decoder and text encoder of a folder, None for each that it lacks."""
    companions: dict[str, Any] = {"codec": None, "text": None}
    if (folder / "vae" / "config.json").is_file():
        codec = _load(folder / "vae", diffusers.AutoencoderKL, use_safetensors=True)
        companions["codec"] = codec.eval().requires_grad_(False).to(device)
    if (folder / "text_encoder" / "config.json").is_file():
        companions["text"] = load_text_encoder(folder).to(device)
    return companions


@loading()
def load_denoiser(
    folder: Path, *, device: torch.device | str = "cpu", companions: dict[str, Any] | None = None
) -> DiffusersDenoiser:
    """A denoiser from a diffusers folder, ours or any other's; `companions` given take the place of its own.

    Raises:
        NotFound: no such folder. ArtifactError: not a supported diffusers folder, damaged, or pickled weights.
    """
    if not folder.is_dir():
        raise NotFound(f"model folder {folder} does not exist", field="path")
    slot = next((name for name in ("unet", "transformer") if (folder / name / "config.json").is_file()), None)
    if slot is None:
        raise ArtifactError(
            f"{folder} is no diffusers folder: it has neither unet/config.json nor transformer/config.json"
        )
    network = _load(folder / slot, _class_named(folder / slot), use_safetensors=True)
    scheduler = _load(folder / "scheduler", _class_named(folder / "scheduler", "scheduler_config.json"))
    shared = companions or load_companions(folder)
    sidecar = read_sidecar(folder) or _derived_sidecar(network, scheduler, **shared)
    return DiffusersDenoiser(network, scheduler, sidecar, **shared).to_device(device)


def _class_named(folder: Path, config: str = "config.json") -> Any:
    try:
        name = json.loads((folder / config).read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{folder / config} cannot be read as a diffusers config: {error}") from None
    known = config != "config.json" or name in NETWORKS
    if not known or not hasattr(diffusers, str(name)):
        raise ArtifactError(f"{folder} holds a {name}, which is not supported; known: {', '.join(NETWORKS)}")
    return getattr(diffusers, name)


def _load(folder: Path, cls: Any, **options: Any) -> Any:
    if is_weightless():
        return _shaped(folder, cls, **options)
    weights = [
        file for pattern in ("*.safetensors", "*.bin", "*.ckpt", "*.pt") for file in folder.glob(pattern)
    ]
    if options.get("use_safetensors") and not any(file.suffix == ".safetensors" for file in weights):
        held = weights[0].name if weights else "no weights"
        raise ArtifactError(
            f"{folder} holds {held}: only safetensors are loaded, since pickles can execute code"
        )
    try:
        return cls.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # safetensors, json and diffusers each raise their own kinds on damaged files
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ArtifactError(f"{folder} is damaged or incomplete: {reason}") from error


def _shaped(folder: Path, cls: Any, *, use_safetensors: bool = False) -> Any:
    """A network of the folder's config without its weights; a scheduler for real."""
    if not use_safetensors:
        with real_tensors():
            return _load(folder, cls)
    try:
        return cls.from_config(cls.load_config(folder, local_files_only=True))
    except Exception as error:
        raise ArtifactError(f"{folder} is damaged or incomplete: {error}") from error


def read_sidecar(folder: Path) -> Sidecar | None:
    """A folder's `distillery.json`; None if it has none."""
    path = folder / SIDECAR
    if not path.is_file():
        return None
    try:
        return Sidecar.parse(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, ConfigError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from None


def _derived_sidecar(network: Any, scheduler: Any, codec: Any, text: TextEncoder | None) -> Sidecar:
    config, schedule = network.config, schedule_of(scheduler)
    size = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
    factor = 2 ** (len(codec.config.block_out_channels) - 1) if codec is not None else 1
    colours = codec.config.out_channels if codec is not None else config.in_channels
    sigma_max = min(schedule.sigma_max, 80.0)
    return Sidecar(
        image=ImageSpec(
            channels=config.in_channels,
            height=size,
            width=size,
            picture=(colours, size * factor, size * factor),
        ),
        cond=_derived_cond(network, text),
        sampler=SamplerSpec(
            kind="euler",
            sigma_min=max(schedule.sigma_min, 0.002),
            sigma_max=sigma_max,
            noise_scale=schedule.start_scale(sigma_max),
            num_steps=30,
            max_steps=1000,
            guidance=7.5 if text is not None else 1.0,
        ),
        parameterisation=_parameterisation_of(scheduler),
    )


def _derived_cond(network: Any, text: TextEncoder | None) -> CondSpec:
    config = network.config
    if text is not None:
        check_text(config, text)
        return CondSpec(
            kind="prompt",
            max_tokens=text.max_tokens,
            embed_dim=config.cross_attention_dim,
            pooled_dim=text.pooled_dim,
        )
    if isinstance(network, diffusers.UNet2DConditionModel):
        raise ArtifactError("this network is conditioned on text, and its folder has no text_encoder/")
    classes = config.get("num_embeds_ada_norm") or config.get("num_class_embeds")
    if not classes:
        return CondSpec(kind="none")
    null = classes if config.get("num_embeds_ada_norm") else None
    return CondSpec(kind="class_label", num_classes=classes, null_label=null)
