"""Light from afar: radiance by direction on a latitude-longitude map, and what surfaces gather of it.

    E(n)   = sum_lm A_l L_lm Y_lm(n),   A = (pi, 2 pi / 3, pi / 4),  L_lm = integral L Y_lm     (irradiance, no shadow)
    P(r, a) = integral L(w) D_a(n.h) (n.w) dw / integral D_a(n.h) (n.w) dw,   n = v = r           (prefiltered, GGX)

Irradiance: Ramamoorthi and Hanrahan 2001; prefiltering: Karis 2013, the split sum. +z is up.
"""

from __future__ import annotations

import functools
import math
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_core.errors import ConfigError
from distill_core.networks.fake_tensors import is_faked, real_tensors
from distill_core.radiance.light.spherical_harmonics import spherical_harmonics

BANDS = 3  # of spherical harmonics: 9 functions hold 99 % of what a diffuse surface sees
COSINE_LOBE = (math.pi, *(2 * math.pi / 3,) * 3, *(math.pi / 4,) * 5)
LEVELS = 5  # of prefiltered maps, at roughness 0, 1/4, 1/2, 3/4, 1
MAX_HEIGHT = 32  # rows; the filters hold LEVELS * (2 * rows^2)^2 numbers


def ggx(cosine: Tensor, roughness: Tensor | float) -> Tensor:
    """Trowbridge-Reitz distribution D of the microfacets' normals, alpha = roughness^2 (1/steradian)."""
    squared = torch.as_tensor(roughness, dtype=cosine.dtype, device=cosine.device) ** 4
    return squared / (math.pi * (cosine.square() * (squared - 1) + 1).square())


@functools.cache
@real_tensors()
def texels(height: int) -> tuple[Tensor, Tensor]:
    """Unit directions (height * 2 height, 3) of a map's texels, row by row from +z down, and their solid angles."""
    width = 2 * height
    edges = torch.linspace(0, math.pi, height + 1, dtype=torch.float64)
    polar = (edges[1:] + edges[:-1]) / 2
    azimuth = (torch.arange(width, dtype=torch.float64) + 0.5) * (2 * math.pi / width) - math.pi
    sine, cosine = polar.sin()[:, None], polar.cos()[:, None]
    columns = [sine * azimuth.cos(), sine * azimuth.sin(), cosine.expand(-1, width)]
    solid = (edges[:-1].cos() - edges[1:].cos()) * (2 * math.pi / width)
    return torch.stack(columns, -1).reshape(-1, 3).float(), solid.repeat_interleave(width).float()


@functools.cache
@real_tensors()
def prefilters(height: int) -> Tensor:
    """Linear maps (LEVELS, T, T) from radiance by texel to what a surface of each roughness reflects. Rows sum to 1."""
    directions, solid = texels(height)
    halfway = F.normalize(directions[:, None] + directions[None], dim=-1)
    facing = (halfway * directions[:, None]).sum(-1).clamp(0, 1)  # n.h; opposite directions have no halfway
    lit = (directions @ directions.T).clamp_min(0) * solid
    levels = [torch.eye(len(directions))]
    for level in range(1, LEVELS):
        weight = ggx(facing, level / (LEVELS - 1)) * lit
        levels.append(weight / weight.sum(-1, keepdim=True))
    return torch.stack(levels)


def project(values: Tensor) -> Tensor:
    """Coefficients (9, C) of a map (H, 2H, C)."""
    directions, solid = (part.to(values.device) for part in texels(len(values)))
    basis = spherical_harmonics(directions, BANDS)
    return (basis * solid[:, None]).T @ values.reshape(len(basis), -1)


class EnvironmentLight(nn.Module):
    """A trainable map of radiance (height, 2 height, 3), kept as its logarithm; begins at `radiance` or 1."""

    def __init__(self, height: int = 16, radiance: Tensor | None = None) -> None:
        super().__init__()
        if radiance is None:
            radiance = torch.ones(height, 2 * height, 3)
        _check(radiance)
        self.log_radiance = nn.Parameter(radiance.float().clamp_min(1e-4).log())

    def radiance(self) -> Tensor:
        """(H, 2H, 3), linear, > 0."""
        return self.log_radiance.exp()

    def whiteness(self) -> Tensor:
        """Mean over the map of sum_rgb |L - mean_rgb L|: 0 for colourless light (scalar)."""
        radiance = self.radiance()
        return (radiance - radiance.mean(-1, keepdim=True)).abs().sum(-1).mean()

    def irradiance(self, normals: Tensor) -> Tensor:
        """E (N, 3) at unit `normals` (N, 3)."""
        lobe = spherical_harmonics(normals, BANDS) * normals.new_tensor(COSINE_LOBE)
        return (lobe @ project(self.radiance())).clamp_min(0)

    def reflected(self, directions: Tensor, roughness: Tensor) -> Tensor:
        """Prefiltered radiance (N, 3) along mirror `directions` (N, 3), for surfaces of `roughness` (N,) in [0, 1]."""
        return look_up(self.prefiltered(), directions, roughness)

    def prefiltered(self) -> Tensor:
        """The map at every level of roughness: (LEVELS, H, 2H, 3)."""
        radiance = self.radiance()
        filtered = prefilters(len(radiance)).to(radiance.device) @ radiance.reshape(-1, 3)
        return filtered.reshape(LEVELS, *radiance.shape)

    @classmethod
    def of(cls, light: EnvironmentLight | Tensor) -> Self:
        """`light` itself, or the light of a map (H, 2H, 3)."""
        return light if isinstance(light, cls) else cls(radiance=light)  # type: ignore[arg-type]


def look_up(maps: Tensor, directions: Tensor, roughness: Tensor) -> Tensor:
    """Values (N, C) of maps (LEVELS, H, 2H, C) by direction (N, 3) and roughness (N,), linear in between."""
    levels, height, width, _ = maps.shape
    around = torch.cat([maps[:, :, -1:], maps, maps[:, :, :1]], 2)  # the map is a ring
    x, y, z = directions.unbind(-1)
    on_axis = (x.abs() + y.abs()) < 1e-9  # atan2 has no gradient there
    column = (torch.atan2(y, torch.where(on_axis, 1.0, x)) / (2 * math.pi) + 0.5) * width + 0.5
    row = torch.acos(z.clamp(-1 + 1e-6, 1 - 1e-6)) / math.pi * height - 0.5
    place = [column * 2 / (width + 1) - 1, row * 2 / (height - 1) - 1, roughness * 2 - 1]
    grid = torch.stack(place, -1).reshape(1, -1, 1, 1, 3)
    volume = around.permute(3, 0, 1, 2)[None]
    values = F.grid_sample(volume, grid, align_corners=True, padding_mode="border")
    return values.reshape(maps.shape[-1], -1).T


def _check(radiance: Tensor) -> None:
    fits = radiance.ndim == 3 and radiance.shape[2] == 3 and radiance.shape[1] == 2 * radiance.shape[0]
    if not fits or not 2 <= len(radiance) <= MAX_HEIGHT:
        raise ConfigError(
            f"an environment of shape {tuple(radiance.shape)} is not allowed; give (H, 2 H, 3) with H from 2 to "
            f"{MAX_HEIGHT}, averaged down if it is larger",
            field="environment",
        )
    if is_faked():
        return
    if not bool(torch.isfinite(radiance).all()) or bool((radiance < 0).any()):
        raise ConfigError(
            "an environment holds linear radiance: finite, not negative; repair the map", field="environment"
        )
