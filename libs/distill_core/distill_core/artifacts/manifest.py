"""What is known of one version of a model: its manifest, part by part. Imports no torch."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill_core.config import Config, Name
from distill_core.diffusion.routing import PartitionSpec
from distill_core.diffusion.sampling import SamplerSpec
from distill_core.parity import ParitySample

MANIFEST = "manifest.json"
MAX_VALUES = 2**28  # of one picture or its latents, 1 GiB: above it a size is a mistake, or damage
Side = Annotated[int, Field(ge=1, le=2**16)]


class FileEntry(Config):
    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class ImageSpec(Config):
    """What a generator makes: the denoiser's own tensor, and the picture after decoding."""

    channels: Side  # of the denoiser's tensor: pixels, or latents
    height: Side
    width: Side
    picture: tuple[Side, Side, Side]  # (C, H, W) in [-1, 1] after the decoder; the same for a pixel model
    tileable: bool = False  # pictures repeat without a seam: the network's convolutions wrap around

    @model_validator(mode="after")
    def _fits(self) -> ImageSpec:
        if max(self.channels * self.height * self.width, math.prod(self.picture)) > MAX_VALUES:
            raise ValueError(f"a picture of more than {MAX_VALUES} values is not allowed")
        return self


class CondSpec(Config):
    """What a generator is conditioned on."""

    kind: Literal["none", "class_label", "prompt"]
    num_classes: int | None = None
    null_label: int | None = None  # the class index that means "no condition"
    class_names: tuple[str, ...] = ()
    max_tokens: int | None = None  # prompt: tokens, longer prompts are cut by the tokenizer
    embed_dim: int | None = None  # prompt: width of prompt_embeds
    pooled_dim: int | None = None  # prompt: width of pooled_embeds, for models that take them (SDXL)
    nasa_scale: float | None = (
        None  # prompt: usual strength of a negative prompt in attention; unset: in guidance
    )
    examples: tuple[str, ...] = ()  # prompt: some that the model was trained on, for previews


class SceneSpec(Config):
    """What a radiance field shows: its box and cameras' usual place, in the scene's own units."""

    field: str
    bound: float = Field(gt=0)
    radius: float = Field(gt=0)  # usual camera distance from the centre
    fov_degrees: float = Field(40.0, gt=0, lt=180)
    background: tuple[float, float, float] = (1.0, 1.0, 1.0)
    transform: tuple[float, ...] | None = Field(
        None, min_length=16, max_length=16
    )  # from the capture's world into the scene's, 4x4 row by row; None: they are the same


class GraphReport(Config):
    """One graph of a converted form, at its worst over all compared batches."""

    precision: Literal["fp32", "fp16", "bf16", "int8"]  # of its weights
    size: int = Field(ge=0)  # bytes, with its side file
    max_abs_difference: float
    rel_l2: float
    snr_db: float | None = None  # the same as a signal-to-noise ratio; None: no difference at all
    changed_pixels: float | None = None  # share of 8-bit values that differ; None: its output is no picture
    left_in_float: str = ""  # what of it is in float32, and why, where the target says otherwise


class FrechetReport(Config):
    """Samples of the model before and after conversion, each against the same reference."""

    before: float = Field(ge=0)
    after: float = Field(ge=0)
    ratio: float = Field(ge=0)
    samples: int = Field(ge=1)  # of each set
    num_steps: int = Field(ge=1)
    features: str  # what the distance compares
    reference: str  # with what: the pictures that the model was trained for, or other samples of it


class ExportReport(Config):
    """One converted form of the model, and how it compares with PyTorch on fixed inputs."""

    target: str
    files: tuple[str, ...]
    opset: int | None = None
    max_abs_difference: float
    rel_l2: float
    tolerance: float
    batches: tuple[int, ...]
    seconds: float
    tool_versions: dict[str, str] = {}
    graphs: dict[str, GraphReport] = {}  # by file stem
    frechet: FrechetReport | None = None  # None: no pictures, too dear, or a target that needs none

    @property
    def snr_db(self) -> float | None:
        """Signal-to-noise ratio of the worst graph; None where no graph differs."""
        return min((graph.snr_db for graph in self.graphs.values() if graph.snr_db is not None), default=None)

    @property
    def figures(self) -> dict[str, float]:
        """What was measured, by name."""
        changed = [graph.changed_pixels for graph in self.graphs.values() if graph.changed_pixels is not None]
        found = {
            "max_abs_difference": self.max_abs_difference,
            "rel_l2": self.rel_l2,
            "snr_db": self.snr_db,
            "changed_pixels": max(changed, default=None),
            "frechet_before": self.frechet.before if self.frechet else None,
            "frechet_after": self.frechet.after if self.frechet else None,
            "frechet_ratio": self.frechet.ratio if self.frechet else None,
            "megabytes": sum(graph.size for graph in self.graphs.values()) / 1e6 if self.graphs else None,
        }
        return {name: value for name, value in found.items() if value is not None}


class Manifest(Config):
    """Everything known of one version. `version`, `created` and `files` are filled in by `publish`."""

    schema_version: Literal[1] = 1
    name: Name
    version: int = Field(0, ge=0)
    created: str = ""
    kind: Literal["denoiser", "field", "gaussians", "classifier", "model"]
    method: str = ""
    paper: str = ""
    title: str = ""
    licence: str = ""  # unset: nobody has chosen one
    parents: tuple[str, ...] = ()  # artifacts it was made from, as name@version
    base: str = ""  # of a LoRA student: the model it adapts, as name@version, where that is in the store
    job: str = ""  # that made it, or what stands for a run without a queue
    recipe_sha256: str = ""
    step: int = 0
    parameterisation: str = ""
    sampler: SamplerSpec | None = None
    image: ImageSpec | None = None
    cond: CondSpec | None = None
    partition: PartitionSpec | None = None  # of a model of several experts
    scene: SceneSpec | None = None
    parity: ParitySample | None = None  # what it answered when it was published
    metrics: dict[str, float | int | str] = {}
    exports: dict[str, ExportReport] = {}
    files: dict[str, FileEntry] = {}

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def form(self) -> Literal["full", "merged", "adapter"]:
        """Without low-rank factors; with them, beside the weights they are merged into; or these factors alone."""
        if "adapter/adapter_config.json" not in self.files:
            return "full"
        whole = any(f"{slot}/config.json" in self.files for slot in ("unet", "transformer"))
        return "merged" if whole else "adapter"


class AliasMove(Config):
    alias: str
    version: int
    previous: int | None = None
    who: str = ""
    when: str = ""
