"""The shader against brute-force integration of the rendering equation, and the light's own parts."""

import math

import pytest
import torch
import torch.nn.functional as F

from distill_core.errors import ConfigError
from distill_core.radiance.analytic.inverse import environment
from distill_core.radiance.light.environment import EnvironmentLight, ggx, look_up, project, texels
from distill_core.radiance.light.shading import (
    GBuffer,
    blend_progress,
    physical,
    schlick,
    shade,
    smith,
    split_sum,
    srgb,
    tone_map,
)
from distill_core.radiance.light.spherical_harmonics import spherical_harmonics

FINE = 96  # rows of the map that the integrals are taken over


def surface(normal, *, albedo=(0.6, 0.3, 0.2), roughness=0.5, metallic=0.0, count=1):
    def column(value):
        return torch.full((count,), float(value))

    normals = F.normalize(torch.tensor(normal, dtype=torch.float32), dim=-1).expand(count, 3)
    colour = torch.tensor(albedo).expand(count, 3)
    fixed = (colour, column(roughness), column(metallic), column(1), normals, column(1), column(1))
    return GBuffer(torch.zeros(count, 3), *fixed)


def sky(directions):
    """A smooth light: brighter above, tinted to one side."""
    x, _, z = directions.unbind(-1)
    return torch.stack([0.8 + 0.4 * z, 0.7 + 0.3 * x + 0.2 * z, 0.6 - 0.25 * x], -1)


def integrate(buffer, direction, radiance):
    """I_diff and I_spec by quadrature of the rendering equation, light by light."""
    towards, solid = texels(FINE)
    light, view, normal = radiance(towards), -direction, buffer.normal[0]
    lit, seen = (towards @ normal).clamp_min(0), float(view @ normal)
    halfway = F.normalize(towards + view, dim=-1)
    rough, metallic = buffer.roughness[0], buffer.metallic[0]
    f0 = (1 - metallic) * 0.04 + metallic * buffer.albedo[0]
    fresnel = schlick(f0, (halfway @ view)[:, None])
    masking = smith(lit.clamp_min(1e-9), rough) * smith(torch.tensor(seen), rough)
    lobe = ggx(halfway @ normal, rough) * masking / (4 * seen)
    weight = solid * (lit > 0)
    diffuse = buffer.albedo[0] / math.pi * (light * (lit * weight)[:, None]).sum(0)
    return diffuse, (light * fresnel * (lobe * weight)[:, None]).sum(0)


@pytest.mark.parametrize("roughness", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("metallic", [0.0, 1.0])
def test_under_even_light_the_split_sum_is_the_rendering_equation(roughness, metallic):
    buffer = surface((0.2, -0.3, 1.0), roughness=roughness, metallic=metallic)
    direction = F.normalize(torch.tensor([0.5, 0.2, -0.8]), dim=0)
    light = EnvironmentLight(radiance=torch.full((16, 32, 3), 0.7))
    found = shade(buffer, direction[None], light)
    wanted = integrate(buffer, direction, lambda towards: torch.full_like(towards, 0.7))
    torch.testing.assert_close(found[0][0], wanted[0], rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(found[1][0], wanted[1], rtol=3e-2, atol=1e-3)


@pytest.mark.parametrize("direction", [(0.0, 0.0, -1.0), (0.45, 0.1, -0.9), (-0.6, 0.3, -0.75)])
@pytest.mark.parametrize(
    ("roughness", "error"), [(0.3, 0.04), (0.7, 0.12)]
)  # the split sum's own, of wide lobes
def test_under_smooth_light_the_shader_is_near_the_rendering_equation(direction, roughness, error):
    direction = F.normalize(torch.tensor(direction), dim=0)
    buffer = surface((0.1, 0.2, 1.0), roughness=roughness, metallic=1.0, albedo=(0.9, 0.6, 0.3))
    light = EnvironmentLight(radiance=sky(texels(16)[0]).reshape(16, 32, 3))
    found, wanted = shade(buffer, direction[None], light), integrate(buffer, direction, sky)
    torch.testing.assert_close(found[0][0], wanted[0], rtol=5e-3, atol=1e-3)
    torch.testing.assert_close(found[1][0], wanted[1], rtol=error, atol=2e-3)


def test_a_mirror_shows_the_light_itself():
    directions, _ = texels(16)
    light = EnvironmentLight(radiance=environment(0))
    found = light.reflected(directions, torch.zeros(len(directions)))
    torch.testing.assert_close(found, environment(0).reshape(-1, 3), rtol=1e-4, atol=1e-4)


def test_rougher_surfaces_see_a_wider_part_of_the_light():
    spot = torch.full((16, 32, 3), 1e-3)
    spot[4, 8] = 100.0
    light = EnvironmentLight(radiance=spot)
    towards = texels(16)[0].reshape(16, 32, 3)[4, 8][None]
    light.requires_grad_(False)
    seen = [
        float(light.reflected(towards, torch.tensor([rough]))[0, 0]) for rough in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert seen == sorted(seen, reverse=True)
    assert seen[0] > 20 * seen[-1] > 0


def test_prefiltering_keeps_even_light_and_weighs_by_the_lobe():
    light = EnvironmentLight(radiance=torch.full((8, 16, 3), 0.4))
    torch.testing.assert_close(light.prefiltered(), torch.full((5, 8, 16, 3), 0.4))
    towards, solid = texels(FINE)
    axis = texels(16)[0][100]
    weight = ggx((F.normalize(towards + axis, dim=-1) @ axis), 0.75) * (towards @ axis).clamp_min(0) * solid
    wanted = (sky(towards) * weight[:, None]).sum(0) / weight.sum()
    smooth = EnvironmentLight(radiance=sky(texels(16)[0]).reshape(16, 32, 3))
    torch.testing.assert_close(smooth.prefiltered()[3].reshape(-1, 3)[100], wanted, rtol=1e-2, atol=1e-3)


def test_solid_angles_cover_the_sphere_and_distributions_are_normalised():
    directions, solid = texels(FINE)
    assert float(solid.sum()) == pytest.approx(4 * math.pi, rel=1e-5)
    upward = directions[:, 2].clamp_min(0)
    for roughness in (0.4, 0.7, 1.0):  # the microfacets' projected area is that of the surface
        assert float((ggx(directions[:, 2], roughness) * upward * solid).sum()) == pytest.approx(1, rel=1e-2)


def test_projection_gives_back_the_coefficients_a_light_was_made_of():
    coefficients = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    directions, _ = texels(32)
    values = (spherical_harmonics(directions, 3) @ coefficients).reshape(32, 64, 3)
    torch.testing.assert_close(project(values), coefficients, rtol=2e-2, atol=1e-2)


def test_irradiance_is_the_cosine_weighted_integral_of_the_light():
    light = EnvironmentLight(radiance=sky(texels(32)[0]).reshape(32, 64, 3))
    directions, solid = texels(FINE)
    normals = F.normalize(torch.randn(20, 3, generator=torch.Generator().manual_seed(1)), dim=-1)
    wanted = ((normals @ directions.T).clamp_min(0) * solid) @ sky(directions)
    torch.testing.assert_close(light.irradiance(normals), wanted, rtol=5e-3, atol=5e-3)


def test_looking_up_goes_around_the_map_without_a_seam():
    maps = texels(16)[0].reshape(1, 16, 32, 3).expand(5, -1, -1, -1)
    angles = torch.tensor([math.pi - 1e-3, -math.pi + 1e-3])
    directions = torch.stack([angles.cos(), angles.sin(), torch.zeros(2)], -1)
    found = look_up(maps, directions, torch.tensor([0.3, 0.3]))
    torch.testing.assert_close(found[0], found[1], atol=2e-2, rtol=0)
    torch.testing.assert_close(found, directions, atol=2e-2, rtol=0)


def test_gradients_reach_light_materials_and_normals_and_are_finite_everywhere():
    buffer = surface((0.0, 0.0, 1.0), count=3)
    leaves = {
        name: getattr(buffer, name).clone().requires_grad_(True)
        for name in ("albedo", "roughness", "metallic", "normal")
    }
    directions = F.normalize(torch.tensor([[0.0, 0.0, -1.0], [0.3, 0.1, -1.0], [1.0, 0.0, 0.0]]), dim=-1)
    light = EnvironmentLight(8)
    physical(buffer._replace(**leaves), directions, light).square().sum().backward()
    for name, leaf in [*leaves.items(), ("light", light.log_radiance)]:
        assert torch.isfinite(leaf.grad).all(), name
        assert leaf.grad.abs().sum() > 0, name


def test_blending_is_exact_at_both_ends():
    phy, raw = torch.rand(50, 3), torch.rand(50, 3)
    assert torch.equal(blend_progress(torch.zeros(50), phy, raw), raw)
    assert torch.equal(blend_progress(torch.ones(50), phy, raw), phy)
    torch.testing.assert_close(blend_progress(torch.full((50,), 0.25), phy, raw), 0.25 * phy + 0.75 * raw)


def test_the_tone_curve_keeps_black_rises_and_ends_at_white():
    values = tone_map(torch.linspace(0, 20, 400))
    assert values[0] == 0
    assert (values.diff() >= 0).all()
    assert values[-1] <= 1
    assert float(srgb(torch.tensor(0.214041))) == pytest.approx(0.5, abs=1e-4)
    assert float(srgb(torch.tensor(0.002))) == pytest.approx(0.02584, abs=1e-5)


def test_whiteness_is_zero_for_grey_light_and_grows_with_colour():
    assert EnvironmentLight(radiance=torch.full((4, 8, 3), 0.5)).whiteness().item() == 0
    tinted = torch.tensor([0.9, 0.5, 0.4]).expand(4, 8, 3)
    assert EnvironmentLight(radiance=tinted).whiteness().item() == pytest.approx(0.6, rel=1e-5)


def test_the_table_at_grazing_and_head_on_views_splits_by_the_reflectance():
    found = split_sum(torch.tensor([0.05, 0.05]), torch.tensor([0.98, 0.05]))
    assert float(found[0].sum()) == pytest.approx(1, abs=2e-2)  # smooth and head-on: all of F0
    assert found[0, 1] < 1e-3
    assert found[1, 1] > 0.5  # grazing: everything reflects


@pytest.mark.parametrize(
    "radiance",
    [torch.ones(4, 4, 3), torch.ones(64, 128, 3), -torch.ones(4, 8, 3), torch.full((4, 8, 3), torch.nan)],
)
def test_an_unusable_environment_is_refused(radiance):
    with pytest.raises(ConfigError, match="environment"):
        EnvironmentLight(radiance=radiance)
