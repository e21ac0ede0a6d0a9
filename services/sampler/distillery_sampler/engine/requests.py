"""Requests to the engine and its answers. Plain data: knows no gRPC and no tensor library but NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from distill_core.artifacts import Manifest

Float = np.ndarray  # float32


@dataclass(frozen=True)
class Call:
    """Caller of a request, and until when an answer is of use."""

    client: str = ""
    deadline: float | None = None  # event loop time
    bulk: bool = False


@dataclass(frozen=True)
class ImageInput:
    """Init image, as encoded bytes; white in `mask` is made anew, black stays."""

    image: bytes
    mask: bytes = b""
    strength: float | None = None  # share of the steps
    upscale: bool = False  # the picture is a whole fraction of the model's size


@dataclass(frozen=True)
class GenerateRequest:
    """Pictures from a generator; None and () mean "not given"."""

    model: str
    class_labels: tuple[int, ...] = ()
    prompts: tuple[str, ...] = ()
    count: int | None = None
    seed: int = 0
    seeds: tuple[int, ...] = ()
    num_steps: int | None = None
    guidance: float | None = None
    image: ImageInput | None = None
    negative_prompts: tuple[str, ...] = ()  # one for all, or one an image; "" is none
    negative_scale: float | None = None
    latents: Float | None = field(default=None, compare=False)  # (B, C, H, W): the first draw, given
    low_resolution: Float | None = field(default=None, compare=False)  # (B, C, h, w) in [-1, 1]: to enlarge
    call: Call = Call()


@dataclass(frozen=True)
class PredictRequest:
    """A call of one of a model's functions, "" its first one, with arrays (B, …) by the names of its inputs."""

    model: str
    function: str = ""
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False)
    call: Call = Call()


@dataclass(frozen=True)
class CallKey:
    """Batch key of items: the function, and the shape of each input."""

    function: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    alone: int = 0  # other than 0: a request that is one call, and shares it with no other


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """Decoded init image of one picture."""

    picture: Float  # (C, H, W) in [-1, 1]
    known: Float | None  # (1, H, W): 1 where a pixel stays


@dataclass(frozen=True)
class ImageItem:
    """One picture to make; its noise is `unit_normal(seed, index, draw, shape)`, but for those in `draws`."""

    seed: int
    index: int = 0
    class_label: int | None = None
    prompt: str | None = None
    init_image: DecodedImage | None = None
    negative: str = ""
    negative_scale: float = 0.0  # of the attention
    draws: dict[int, Float] = field(
        default_factory=dict, compare=False, repr=False
    )  # draws that are made already, or given


@dataclass(frozen=True)
class InitImageKey:
    """Batch key of init images: see `distill_core.diffusion.image_to_image`."""

    strength: float
    masked: bool
    block: int


@dataclass(frozen=True)
class ImageKey:
    """Batch key of images."""

    num_steps: int
    guidance: float
    init_image: InitImageKey | None = None
    negative: Literal["", "guidance", "attention"] = ""  # what leads away from the items' negative prompts


@dataclass(frozen=True)
class Picture:
    """One made picture: float32 (C, H, W) in [-1, 1]."""

    index: int
    seed: int
    pixels: Float


@dataclass(frozen=True)
class Summary:
    """Summary of an answer: the version, and how it went."""

    model: str
    backend: str
    count: int
    seconds: float = 0.0
    num_steps: int = 0
    guidance: float = 1.0
    cut_prompts: tuple[int, ...] = ()  # images whose prompt's or negative prompt's end was left out
    prompt_tokens: int = 0  # that the model reads


@dataclass(frozen=True)
class Orbit:
    """A camera on a sphere around `target`; degrees, world +z up, `radius` None = the scene's."""

    azimuth: float
    elevation: float
    radius: float | None = None
    target: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True, eq=False)
class View:
    """One view to render: exactly one of `pose` (4, 4) and `orbit`; `intrinsics` are (fx, fy, cx, cy)."""

    width: int
    height: int
    pose: np.ndarray | None = None
    orbit: Orbit | None = None
    intrinsics: tuple[float, float, float, float] | None = None
    fov_degrees: float | None = None
    background: tuple[float, float, float] | None = None
    distortion: tuple[float, ...] = ()  # k1 k2 k3 k4 p1 p2, with a pose only; () = a pinhole
    fisheye: bool = False


@dataclass(frozen=True)
class RenderRequest:
    """Views of a scene, answered in order; `progressive` ones each as a small preview, then tile by tile."""

    model: str
    views: tuple[View, ...]
    normals: bool = False
    progressive: bool = False
    call: Call = Call()


@dataclass(frozen=True)
class Region:
    """Rows of a view; with a `factor` above 1, of the view with pixels so many times as large."""

    rows: range
    factor: int = 1
    last: bool = False  # of its view


@dataclass(frozen=True, eq=False)
class Tile:
    """A part of a view that is rendered at once."""

    view: View
    region: Region

    @property
    def rays(self) -> int:
        """Number of its pixels."""
        return len(self.region.rows) * -(-self.view.width // self.region.factor)


@dataclass(frozen=True, eq=False)
class Rendered:
    """A rendered view, or a region of it; float32."""

    index: int
    rgb: Float  # (H, W, 3), in [0, 1]
    depth: Float  # (H, W), scene units
    opacity: Float  # (H, W), in [0, 1]
    normal: Float | None = None  # (H, W, 3), world axes
    region: Region | None = None  # None: the whole view


@dataclass(frozen=True)
class ModelInfo:
    """A version in the store and what this process does with it."""

    manifest: Manifest
    state: str  # available, loading, ready, failed
    aliases: tuple[str, ...] = ()
    backend: str = ""
    max_batch: int = 0
    instances: int = 0
    threads: int = 0  # of each instance
    memory: int = 0  # bytes; what it shares with other models is counted for each
    message: str = ""  # why it failed, or why an available one is not loaded by the first request
    stats: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def is_servable(self) -> bool:
        """Whether a request is answered: the version is loaded, or the first request loads it."""
        return self.state == "ready" or (self.state == "available" and not self.message)
