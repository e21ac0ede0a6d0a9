"""Gaussians against closed forms, finite differences and a projection by other means."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from distill_core.artifacts import SceneSpec
from distill_core.errors import ArtifactError, ConfigError
from distill_core.radiance.cameras.camera import Camera, look_at, orbit_camera
from distill_core.radiance.light.spherical_harmonics import C0, C1
from distill_core.radiance.scenes import gaussians as module
from distill_core.radiance.scenes.gaussians import (
    DILATION,
    GaussianModel,
    GaussianScene,
    load_gaussians,
    project,
    rasterize,
    render_gaussians,
    save_gaussians,
)

SPEC = SceneSpec(field="gaussians", bound=1.0, radius=3.0)


def camera(**changes):
    values = {"fx": 40.0, "fy": 44.0, "cx": 11.0, "cy": 9.0, "width": 20, "height": 22} | changes
    return Camera(look_at((0.3, -2.0, 0.8)), **values)


def random_model(count=40, *, sh_degree=1, num_extra=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    means = torch.zeros(count, 3, dtype=torch.float64)
    model = GaussianModel.at(means, sh_degree=sh_degree, num_extra=num_extra)
    for name, value in model.tensors().items():
        value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64) * 0.4)
        if name == "log_scales":
            value.sub_(2.2)
    return model


def blank(count, **sizes):
    return GaussianModel.at(torch.zeros(count, 3, dtype=torch.float64), **sizes)


def pixel_centres(camera):
    y, x = np.mgrid[: camera.height, : camera.width]
    return x + 0.5, y + 0.5


def test_one_round_gaussian_is_the_closed_form():
    model = blank(1)
    model.log_scales.fill_(math.log(0.1))
    model.logit_opacity.fill_(0.4)
    model.sh[:, 0] = torch.tensor([0.3, -0.2, 0.1]) / C0
    seen = camera()
    distance = float(seen.c2w[:3, 3].norm())  # it lies at the target: on the optical axis
    splats = rasterize(model, seen)
    x, y = pixel_centres(seen)
    sx, sy = ((f * 0.1 / distance) ** 2 + DILATION for f in (40, 44))
    alpha = np.exp(-0.5 * ((x - 11) ** 2 / sx + (y - 9) ** 2 / sy)) / (1 + math.exp(-0.4))
    alpha[alpha < 1 / 255] = 0
    assert (alpha == 0).any()
    np.testing.assert_allclose(splats.opacity.numpy(), alpha, atol=1e-6)
    colour = np.array([0.8, 0.3, 0.6])
    np.testing.assert_allclose(splats.rgb.numpy(), alpha[..., None] * colour, atol=1e-6)
    np.testing.assert_allclose(splats.depth.numpy(), alpha * distance, atol=1e-5)


def test_a_turned_flat_gaussian_off_the_axis_is_projected_as_by_finite_differences():
    quat, scales, mean = (
        np.array([0.8, 0.2, -0.5, 0.6]),
        np.array([0.25, 0.04, 0.12]),
        np.array([0.2, 0.3, -0.1]),
    )
    model = blank(1)
    model.quats.copy_(torch.from_numpy(1.7 * quat)[None])  # of any length
    model.log_scales.copy_(torch.from_numpy(np.log(scales))[None])
    model.means.copy_(torch.from_numpy(mean)[None])
    model.logit_opacity.fill_(1.0)
    seen = camera()
    pose = seen.c2w.double().numpy()

    def pixel(point):
        right, up, back = pose[:3, :3].T @ (point - pose[:3, 3])
        return np.array([seen.cx + seen.fx * right / -back, seen.cy - seen.fy * up / -back])

    jacobian = np.stack([(pixel(mean + h) - pixel(mean - h)) / 2e-5 for h in 1e-5 * np.eye(3)], 1)
    turned = Rotation.from_quat(quat[[1, 2, 3, 0]]).as_matrix()
    spread = jacobian @ turned @ np.diag(scales**2) @ turned.T @ jacobian.T + DILATION * np.eye(2)
    away = np.stack(pixel_centres(seen), -1) - pixel(mean)
    power = np.einsum("hwi,ij,hwj->hw", away, np.linalg.inv(spread), away)
    alpha = np.exp(-0.5 * power) / (1 + math.exp(-1))
    alpha[alpha < 1 / 255] = 0
    assert abs(spread[0, 1]) > 0.3  # the ellipse is oblique
    np.testing.assert_allclose(rasterize(model, seen).opacity.numpy(), alpha, atol=1e-6)


def test_far_outside_of_the_picture_the_slopes_are_those_of_a_margin_around_it():
    """0.3 of half a picture beyond each side, which differ: 20 x 22 pixels around the centre (11, 9)."""
    seen = torch.tensor([[9.0, 9.0, 2.0], [-9.0, -9.0, 2.0]], dtype=torch.float64)
    slopes = module._jacobian(seen, camera())[:, :, 2] * -2.0  # -focal tangent / z at z = 2
    expected = [[(20 - 11) + 3.0, (22 - 9) + 3.3], [-11 - 3.0, -9 - 3.3]]
    torch.testing.assert_close(slopes, torch.tensor(expected, dtype=torch.float64))


def test_two_gaussians_blend_front_to_back():
    model = blank(2)
    model.means[1] = torch.tensor([0.3, -2.0, 0.8]) * 0.4  # nearer, on the same axis
    model.log_scales.fill_(math.log(0.5))
    model.logit_opacity.copy_(torch.tensor([2.0, -0.3]))
    model.sh[0, 0], model.sh[1, 0] = (
        torch.tensor([0.5, -0.5, -0.5]) / C0,
        torch.tensor([-0.5, 0.5, -0.5]) / C0,
    )
    out = rasterize(model, camera(cx=10.5, cy=10.5))  # the axis meets a pixel's centre
    near, far = (1 / (1 + math.exp(-value)) for value in (-0.3, 2.0))
    expected = torch.tensor([(1 - near) * far, near, 0.0], dtype=torch.float64)
    torch.testing.assert_close(out.rgb[10, 10], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(float(out.opacity[10, 10]), 1 - (1 - near) * (1 - far), atol=1e-6, rtol=0)


def test_the_picture_does_not_depend_on_the_order_of_the_gaussians():
    model = random_model()
    order = torch.randperm(len(model), generator=torch.Generator().manual_seed(1))
    shuffled = GaussianModel(**{name: value[order] for name, value in model.tensors().items()})
    for one, other in zip(rasterize(model, camera()), rasterize(shuffled, camera()), strict=True):
        torch.testing.assert_close(one, other)


def test_tiles_do_not_change_the_picture(monkeypatch):
    model, seen = random_model(), camera()
    tiled = rasterize(model, seen)
    monkeypatch.setattr(module, "TILE", 64)
    for one, other in zip(tiled, rasterize(model, seen), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["means", "log_scales", "quats", "logit_opacity", "sh", "extra"])
def test_gradients_are_those_of_finite_differences(name):
    model = random_model(12)
    mixed = torch.randn(22, 20, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    parameter = getattr(model, name).requires_grad_(True)

    def loss():
        out = rasterize(model, camera())
        flat = [out.rgb, out.depth[..., None], out.opacity[..., None], out.extra]
        return (torch.cat(flat, -1) * mixed).sum()

    (gradient,) = torch.autograd.grad(loss(), parameter)
    step = 1e-7  # so small that next to no pixel crosses the smallest alpha
    entries = torch.randperm(parameter.numel(), generator=torch.Generator().manual_seed(4))[:8]
    for entry in entries.tolist():
        flat = parameter.data.view(-1)
        flat[entry] += step
        above = float(loss().detach())
        flat[entry] -= 2 * step
        below = float(loss().detach())
        flat[entry] += step
        assert float(gradient.reshape(-1)[entry]) == pytest.approx(
            (above - below) / (2 * step), rel=1e-4, abs=1e-4
        )


def test_colour_follows_the_direction_as_its_harmonics_say():
    model = blank(1, sh_degree=1)
    model.log_scales.fill_(-1.0)
    model.logit_opacity.fill_(9.0)
    model.sh[0, 1:] = torch.tensor([[0.2, 0, 0], [0, 0.3, 0], [0, 0, -0.4]])
    eye = torch.tensor([0.3, -2.0, 0.8])
    x, y, z = (-eye / eye.norm()).tolist()
    out = rasterize(model, camera(cx=10.5, cy=10.5))
    wanted = torch.tensor([0.5 - C1 * y * 0.2, 0.5 + C1 * z * 0.3, 0.5 + C1 * x * 0.4])
    torch.testing.assert_close(out.rgb[10, 10] / out.opacity[10, 10], wanted.double(), atol=1e-5, rtol=0)


def test_what_lies_behind_the_camera_is_not_drawn():
    model = blank(1)
    model.means.copy_(torch.tensor([[0.6, -4.0, 1.6]]))
    out = rasterize(model, camera())
    assert float(out.opacity.abs().max()) == 0
    assert torch.isfinite(out.depth).all()


def test_the_most_opaque_gaussian_lets_a_hundredth_of_the_light_pass():
    model = blank(1)
    model.log_scales.fill_(3.0)
    model.logit_opacity.fill_(30.0)
    torch.testing.assert_close(rasterize(model, camera()).opacity, torch.full((22, 20), 0.99).double())


def test_far_outside_of_the_picture_the_jacobian_is_that_of_its_margin():
    """There the linear projection would blow splats up beyond all bounds."""
    seen = camera()
    model = blank(1)
    right, _, back = (axis.double() for axis in seen.c2w[:3, :3].T)
    model.means[0] = seen.c2w[:3, 3] + 9.0 * right - 1.5 * back
    model.log_scales.fill_(math.log(0.2))
    found = project(model, seen)
    assert float(found.centre[0, 0]) == pytest.approx(11 + 40 * 6, rel=1e-4)
    limit = (20 - 11) / 40 + 0.3 * 0.5 * 20 / 40  # half-widths, as tangents
    spread = (0.2 * 40 / 1.5) ** 2 * (1 + limit**2) + DILATION
    a, b, c = found.conic[0].tolist()
    assert c / (a * c - b * b) == pytest.approx(spread, rel=1e-4)


def test_a_lens_is_refused():
    with pytest.raises(ConfigError, match="undistort"):
        rasterize(blank(1), camera(distortion=(0.1, 0, 0, 0, 0, 0)))


def test_a_scene_is_saved_and_loads_with_the_same_picture(tmp_path):
    scene = GaussianScene(random_model().to(torch.float32), SPEC)
    save_gaussians(scene, tmp_path)
    loaded = load_gaussians(tmp_path)
    assert loaded.spec == SPEC
    for one, other in zip(render_gaussians(scene, camera()), render_gaussians(loaded, camera()), strict=True):
        assert torch.equal(one, other)
    empty = render_gaussians(loaded, camera(), background=(0.0, 0.0, 0.0)).rgb
    white = render_gaussians(loaded, camera())
    torch.testing.assert_close(
        white.rgb, (empty + 1 - white.opacity[..., None]).clamp(0, 1), atol=1e-5, rtol=0
    )


def test_a_damaged_folder_names_itself(tmp_path):
    save_gaussians(GaussianScene(random_model().to(torch.float32), SPEC), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ArtifactError, match=str(tmp_path)):
        load_gaussians(tmp_path)


@pytest.mark.gpu
def test_gsplat_draws_what_the_reference_draws():
    pytest.importorskip("gsplat")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = random_model(200).to(torch.float32)
    seen = orbit_camera(30, 20, 2.5, fov_degrees=40, width=64, height=64)
    here = rasterize(model, seen)
    there = rasterize(model.to("cuda"), seen)
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(one, other.cpu(), atol=2e-2, rtol=0)
