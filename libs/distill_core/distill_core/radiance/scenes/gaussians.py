"""A scene as 3-D Gaussians (Kerbl et al. 2023, "3D Gaussian Splatting", arXiv 2308.04079), splatted front to back.

    Sigma2 = J W R S S^T R^T W^T J^T + 0.3 I,   mu2 = (fx x / z + cx, fy y / z + cy)          (x, y, z) in the camera
    alpha  = o exp(-1/2 (p - mu2)^T Sigma2^-1 (p - mu2)),   C(p) = sum_i c_i alpha_i prod_{j<i} (1 - alpha_j)

R, S: rotation and scales of a Gaussian; W: world to camera; J: the projection's Jacobian at its centre. Sorted by z.
What is composited is what fields composite: colour times opacity, distance from the camera, opacity.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from distill_core.artifacts import SceneSpec
from distill_core.config import Config
from distill_core.errors import ArtifactError, ConfigError
from distill_core.kinds.field.card import Card
from distill_core.radiance.cameras.camera import Camera
from distill_core.radiance.light.spherical_harmonics import spherical_harmonics
from distill_core.radiance.rendering.quadrature import over
from distill_core.radiance.scenes.storage import CONFIG, WEIGHTS, read_description, read_tensors, write_scene

DILATION = 0.3  # pixels^2 on the diagonal of Sigma2: no splat is thinner than about a pixel
MAX_ALPHA, MIN_ALPHA = 0.99, 1 / 255  # a splat below the second is not there
NEAR = 0.01  # scene units: a centre no further than this in front of the camera is not drawn
TILE = 16  # pixels per side
MARGIN = 0.3  # J is taken at most so far outside of the picture, in its half-widths
MAX_COUNT = 10_000_000


@dataclass(frozen=True, eq=False)
class GaussianModel:
    """N Gaussians, as tensors."""

    means: Tensor  # (N, 3), scene units
    log_scales: Tensor  # (N, 3)
    quats: Tensor  # (N, 4), rotations as w, x, y, z of any length above 0
    logit_opacity: Tensor  # (N,)
    sh: Tensor  # (N, bands^2, 3); colour = SH + 0.5
    extra: Tensor  # (N, K), composited as they are

    @classmethod
    def at(cls, means: Tensor, *, sh_degree: int = 0, num_extra: int = 0) -> GaussianModel:
        """Grey, half opaque Gaussians of scale 1 at `means` (N, 3)."""
        count = len(means)
        return cls(
            means,
            torch.zeros_like(means),
            means.new_tensor([1.0, 0.0, 0.0, 0.0]).repeat(count, 1),
            means.new_zeros(count),
            means.new_zeros(count, (sh_degree + 1) ** 2, 3),
            means.new_zeros(count, num_extra),
        )

    def __len__(self) -> int:
        return len(self.means)

    @property
    def sh_degree(self) -> int:
        """0 to 3."""
        return math.isqrt(self.sh.shape[1]) - 1

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, target: torch.device | torch.dtype | str) -> GaussianModel:
        """A copy on another device or of another type."""
        return GaussianModel(**{name: value.to(target) for name, value in self.tensors().items()})

    def half_axes(self) -> Tensor:
        """R S: the principal axes times their scales, as columns (N, 3, 3); Sigma is this times its transpose."""
        return rotation_matrices(self.quats) * self.log_scales.exp()[:, None, :]

    def colours(self, eye: Tensor) -> Tensor:
        """Colour (N, 3), not negative, seen from `eye` (3,)."""
        directions = normalize(self.means - eye, dim=-1)
        basis = spherical_harmonics(directions, self.sh_degree + 1)
        return ((basis[:, :, None] * self.sh).sum(1) + 0.5).clamp_min(0)


class Splats(NamedTuple):
    """A picture of Gaussians; nothing is behind them."""

    rgb: Tensor  # (H, W, 3), colour times opacity
    depth: Tensor  # (H, W), expected distance of the centres from the camera, times opacity
    opacity: Tensor  # (H, W), in [0, 1]
    extra: Tensor  # (H, W, K), extras times opacity


class Projected(NamedTuple):
    """The Gaussians of a picture that can be seen, nearest first; M in all."""

    kept: Tensor  # (M,) which of the model's
    centre: Tensor  # (M, 2) column, row in pixels
    conic: Tensor  # (M, 3) a, b, c of a dx^2 + 2 b dx dy + c dy^2
    reach: Tensor  # (M, 2) half-width and half-height of where alpha is at least MIN_ALPHA, pixels
    opacity: Tensor  # (M,)


def rotation_matrices(quats: Tensor) -> Tensor:
    """Rotations (N, 3, 3) of quaternions (N, 4) = w, x, y, z of any length above 0."""
    w, x, y, z = normalize(quats, dim=-1).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def world_to_camera(camera: Camera, like: Tensor) -> Tensor:
    """(4, 4) into OpenCV's axes (y down, z forward), of the type and on the device of `like`."""
    flip = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))
    inverse: Tensor = torch.linalg.inv(camera.c2w.double() @ flip)
    return inverse.to(like)


def rasterize(gaussians: GaussianModel, camera: Camera) -> Splats:
    """`gaussians` through a pinhole `camera`, with gradients; by gsplat on CUDA devices where it is installed.

    Raises:
        ConfigError: a camera with lens distortion, which splats do not have.
    """
    if any(camera.distortion) or camera.fisheye:
        raise ConfigError(
            "Gaussians are drawn through pinhole cameras only, and this one has a lens; undistort it",
            field="distortion",
        )
    eye = camera.c2w[:3, 3].to(gaussians.means)
    distance = (gaussians.means - eye).norm(dim=-1, keepdim=True)
    channels = torch.cat([gaussians.colours(eye), gaussians.extra, distance], -1)
    if gaussians.means.is_cuda and importlib.util.find_spec("gsplat") is not None:
        blended = _gsplat(gaussians, camera, channels)
    else:
        blended = _tiles(project(gaussians, camera), channels, camera)
    return Splats(blended[..., :3], blended[..., -2], blended[..., -1], blended[..., 3:-2])


def project(gaussians: GaussianModel, camera: Camera) -> Projected:
    """The ellipses that the Gaussians are in the picture, sorted by z."""
    view = world_to_camera(camera, gaussians.means)
    seen = gaussians.means @ view[:3, :3].T + view[:3, 3]
    opacity = gaussians.logit_opacity.sigmoid()
    kept = ((seen[:, 2] > NEAR) & (opacity > MIN_ALPHA)).nonzero().squeeze(-1)
    kept = kept[seen[kept, 2].argsort(stable=True)]
    seen, opacity = seen[kept], opacity[kept]
    flattened = _jacobian(seen, camera) @ view[:3, :3] @ gaussians.half_axes()[kept]  # (M, 2, 3)
    spread = flattened @ flattened.mT + DILATION * torch.eye(2).to(seen)
    xx, xy, yy = spread[:, 0, 0], spread[:, 0, 1], spread[:, 1, 1]
    conic = torch.stack([yy, -xy, xx], -1) / (xx * yy - xy * xy)[:, None]
    focal, middle = seen.new_tensor([camera.fx, camera.fy]), seen.new_tensor([camera.cx, camera.cy])
    centre = seen[:, :2] / seen[:, 2:] * focal + middle
    reach = ((2 * (opacity / MIN_ALPHA).log())[:, None] * torch.stack([xx, yy], -1)).sqrt().detach()
    return Projected(kept, centre, conic, reach, opacity)


def _jacobian(seen: Tensor, camera: Camera) -> Tensor:
    """Slopes of (column, row) along (x, y, z), (M, 2, 3), at centres drawn towards the picture (MARGIN)."""
    z = seen[:, 2]
    sides = []
    for axis, focal, middle, size in (
        (0, camera.fx, camera.cx, camera.width),
        (1, camera.fy, camera.cy, camera.height),
    ):
        margin = MARGIN * 0.5 * size / focal
        tangent = (seen[:, axis] / z).clamp(-middle / focal - margin, (size - middle) / focal + margin)
        row = [torch.zeros_like(z), torch.zeros_like(z), -focal * tangent / z]
        row[axis] = focal / z
        sides.append(torch.stack(row, -1))
    return torch.stack(sides, -2)


def _tiles(projected: Projected, channels: Tensor, camera: Camera) -> Tensor:
    """Channels and opacity (H, W, C + 1), tile by tile: each looks at the splats that reach it, and no others."""
    shown = torch.cat([channels[projected.kept], torch.ones_like(projected.opacity)[:, None]], -1)
    low, high = projected.centre.detach() - projected.reach, projected.centre.detach() + projected.reach
    bands = []
    for top in range(0, camera.height, TILE):
        bottom = min(top + TILE, camera.height)
        in_band = ((low[:, 1] < bottom) & (high[:, 1] > top)).nonzero().squeeze(-1)
        row = []
        for left in range(0, camera.width, TILE):
            right = min(left + TILE, camera.width)
            near = in_band[(low[in_band, 0] < right) & (high[in_band, 0] > left)]
            y, x = torch.meshgrid(torch.arange(top, bottom), torch.arange(left, right), indexing="ij")
            pixels = torch.stack([x, y], -1).reshape(-1, 2).to(channels) + 0.5
            blended = splat_weights(projected, near, pixels) @ shown[near]
            row.append(blended.reshape(bottom - top, right - left, -1))
        bands.append(torch.cat(row, 1))
    return torch.cat(bands)


def splat_weights(projected: Projected, which: Tensor, pixels: Tensor) -> Tensor:
    """Weight (P, K) of each of the splats `which` (K,), nearest first, at `pixels` (P, 2)."""
    dx, dy = (pixels[:, None] - projected.centre[which]).unbind(-1)
    a, b, c = projected.conic[which].unbind(-1)
    alpha = projected.opacity[which] * torch.exp(-0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy)
    alpha = torch.where(alpha >= MIN_ALPHA, alpha.clamp_max(MAX_ALPHA), 0)
    passed = torch.log1p(-alpha)
    return alpha * torch.exp(passed.cumsum(-1) - passed)  # light left *before* each


def _gsplat(gaussians: GaussianModel, camera: Camera, channels: Tensor) -> Tensor:
    """The same by gsplat's CUDA kernels."""
    from gsplat import rasterization

    pinhole = torch.eye(3).to(channels)
    pinhole[[0, 1, 0, 1], [0, 1, 2, 2]] = camera.intrinsics().to(channels)
    blended, opacity, _ = rasterization(
        gaussians.means,
        normalize(gaussians.quats, dim=-1),
        gaussians.log_scales.exp(),
        gaussians.logit_opacity.sigmoid(),
        channels,
        world_to_camera(camera, channels)[None],
        pinhole[None],
        camera.width,
        camera.height,
        near_plane=NEAR,
        eps2d=DILATION,
    )
    return torch.cat([blended[0], opacity[0]], -1)


# -- on disk, and as a scene --------------------------------------------------------------------------------------


class GaussiansFile(Config):
    """Content of the config.json of Gaussians."""

    kind: Literal["gaussians"] = "gaussians"
    version: Literal[1] = 1
    scene: SceneSpec
    count: int = Field(ge=1, le=MAX_COUNT)
    sh_degree: int = Field(ge=0, le=3)
    num_extra: int = Field(0, ge=0, le=64)


@dataclass(frozen=True, eq=False)
class GaussianScene:
    """Gaussians, and from where they are usually seen."""

    kind: ClassVar[str] = "gaussians"
    gaussians: GaussianModel
    spec: SceneSpec

    def card(self) -> Card:
        """Facts that the manifest keeps."""
        return Card(scene=self.spec)

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        save_gaussians(self, folder)


@torch.no_grad()
def render_gaussians(
    scene: GaussianScene, camera: Camera, *, background: tuple[float, float, float] | None = None
) -> Splats:
    """The scene through `camera`; `rgb` in [0, 1] lies over `background` (unset: the scene's own)."""
    splats = rasterize(scene.gaussians, camera)
    colour = splats.rgb.new_tensor(scene.spec.background if background is None else background)
    return splats._replace(rgb=over(splats.rgb, splats.opacity[..., None], colour).clamp(0, 1))


def save_gaussians(scene: GaussianScene, folder: Path) -> None:
    """Write config.json and model.safetensors."""
    gaussians = scene.gaussians
    described = GaussiansFile(
        scene=scene.spec,
        count=len(gaussians),
        sh_degree=gaussians.sh_degree,
        num_extra=gaussians.extra.shape[1],
    )
    write_scene(folder, described, gaussians.tensors())


def load_gaussians(folder: Path, *, device: str | torch.device = "cpu") -> GaussianScene:
    """The Gaussians that `save_gaussians` wrote.

    Raises:
        ArtifactError: a file is missing or damaged, or does not hold what config.json says.
    """

    def empty(
        file: GaussiansFile,
    ) -> GaussianModel:  # shapes alone: a count is only believed once tensors have it
        return GaussianModel.at(
            torch.zeros(file.count, 3, device="meta"), sh_degree=file.sh_degree, num_extra=file.num_extra
        )

    described, like = read_description(folder, GaussiansFile, empty, what="Gaussians")
    tensors = read_tensors(folder)
    shapes = {name: value.shape for name, value in like.tensors().items()}
    if {name: value.shape for name, value in tensors.items()} != shapes:
        raise ArtifactError(f"{folder / WEIGHTS} does not hold the Gaussians that {CONFIG} describes")
    return GaussianScene(GaussianModel(**tensors).to(device), described.scene)
