"""Physically based shading of what each pixel sees: Lambert and Cook-Torrance under light from afar.

    I_phy  = sRGB(ACES((1 - m) I_diff + I_spec)),     I = alpha I_phy + (1 - alpha) I_raw
    I_diff = c / pi E(n),                             I_spec = P(reflected v, r) (F0 S(n.v, r) + B(n.v, r))
    F0     = (1 - m) 0.04 + m c,                      S, B = integral of D G F / (4 n.v) split by F0   (split sum)

c albedo, r roughness, m metallic, n normal; E and P are the environment's (radiance/light/environment.py).
G is Smith's for GGX with alpha = r^2, F is Schlick's. Karis 2013, "Real Shading in Unreal Engine 4".
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_core.networks.fake_tensors import real_tensors
from distill_core.radiance.light.environment import EnvironmentLight

DIELECTRIC = 0.04  # what a non-metal reflects head-on
MIN_ROUGHNESS = 0.03
GRAZING = 0.02  # least n.v that the BRDF table has
TABLE, TABLE_SAMPLES = 32, 512  # entries per axis of the BRDF table, directions per entry


class GBuffer(NamedTuple):
    """Surface seen by each of R rays, composited along it and divided by its opacity."""

    raw: Tensor  # (R, 3), I_raw in [0, 1], sRGB
    albedo: Tensor  # (R, 3), in [0, 1], linear
    roughness: Tensor  # (R,), in [0, 1]
    metallic: Tensor  # (R,), in [0, 1]
    alpha: Tensor  # (R,), the progress map, in [0, 1]
    normal: Tensor  # (R, 3), of unit length
    opacity: Tensor  # (R,), in [0, 1]
    distance: Tensor  # (R,), of the surface's front, scene units; without gradient


def smith(cosine: Tensor, roughness: Tensor) -> Tensor:
    """Smith's masking G1 of GGX for directions at `cosine` from the normal."""
    squared = roughness**4
    return 2 * cosine / (cosine + (squared + (1 - squared) * cosine.square()).sqrt())


def schlick(f0: Tensor | float, cosine: Tensor) -> Tensor:
    """Fresnel reflectance by Schlick's approximation."""
    return f0 + (1 - f0) * (1 - cosine.clamp(0, 1)) ** 5


@functools.cache
@real_tensors()
def brdf_table() -> Tensor:
    """S and B (2, TABLE, TABLE) by roughness from 0 to 1 (rows) and n.v from GRAZING to 1 (columns)."""
    rows, columns = (torch.linspace(low, 1, TABLE, dtype=torch.float64) for low in (0.0, GRAZING))
    roughness, cosine = (axis[..., None] for axis in torch.meshgrid(rows, columns, indexing="ij"))
    index = torch.arange(TABLE_SAMPLES, dtype=torch.float64)
    u, turn = (index + 0.5) / TABLE_SAMPLES, 2 * math.pi * ((index * 0.6180339887498949) % 1)
    # Halfway vectors drawn in proportion to D(n.h) (n.h)
    up = ((1 - u) / (1 + (roughness**4 - 1) * u)).sqrt()
    aside = (1 - up.square()).clamp_min(0).sqrt()
    facing = (1 - cosine.square()).sqrt() * aside * turn.cos() + cosine * up  # v.h
    lit = 2 * facing * up - cosine  # n.l
    weight = smith(lit.clamp_min(1e-9), roughness) * smith(cosine, roughness) * facing / (up * cosine)
    weight = torch.where((lit > 0) & (facing > 0), weight, 0.0)
    grazing = (1 - facing.clamp(0, 1)) ** 5
    return torch.stack([(weight * (1 - grazing)).mean(-1), (weight * grazing).mean(-1)]).float()


def split_sum(roughness: Tensor, cosine: Tensor) -> Tensor:
    """S and B (N, 2) at roughness (N,) and n.v (N,), looked up in `brdf_table`."""
    column = (cosine - GRAZING) / (1 - GRAZING)
    grid = torch.stack([column, roughness], -1).reshape(1, -1, 1, 2) * 2 - 1
    table = brdf_table().to(cosine.device)[None]
    return F.grid_sample(table, grid, align_corners=True, padding_mode="border").reshape(2, -1).T


def shade(buffer: GBuffer, directions: Tensor, light: EnvironmentLight) -> tuple[Tensor, Tensor]:
    """I_diff and I_spec (R, 3), linear, of rays along unit `directions` (R, 3)."""
    normal = buffer.normal
    cosine = -(normal * directions).sum(-1, keepdim=True)
    mirrored = F.normalize(directions + 2 * cosine * normal, dim=-1)
    metallic = buffer.metallic[:, None]
    f0 = (1 - metallic) * DIELECTRIC + metallic * buffer.albedo
    roughness = buffer.roughness.clamp_min(MIN_ROUGHNESS)
    scale, bias = split_sum(roughness, cosine.squeeze(-1).clamp(0, 1)).split(1, -1)
    diffuse = buffer.albedo / math.pi * light.irradiance(normal)
    return diffuse, light.reflected(mirrored, roughness) * (f0 * scale + bias)


def physical(buffer: GBuffer, directions: Tensor, light: EnvironmentLight) -> Tensor:
    """I_phy (R, 3) in [0, 1], sRGB."""
    diffuse, specular = shade(buffer, directions, light)
    return tone_map((1 - buffer.metallic[:, None]) * diffuse + specular)


def blend_progress(alpha: Tensor, phy: Tensor, raw: Tensor) -> Tensor:
    """I = alpha I_phy + (1 - alpha) I_raw (R, 3), exactly I_raw at alpha = 0 and I_phy at 1; `alpha` (R,)."""
    return torch.lerp(raw, phy, alpha[:, None])


def tone_map(radiance: Tensor) -> Tensor:
    """Linear radiance >= 0 as sRGB in [0, 1], through the ACES filmic curve (Narkowicz's fit)."""
    x = radiance
    curve = x * (2.51 * x + 0.03) / (x * (2.43 * x + 0.59) + 0.14)
    return srgb(curve.clamp(0, 1))


def srgb(linear: Tensor) -> Tensor:
    """Linear values in [0, 1] in sRGB's encoding (IEC 61966-2-1)."""
    curved = 1.055 * linear.clamp_min(0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(linear <= 0.0031308, 12.92 * linear, curved)
