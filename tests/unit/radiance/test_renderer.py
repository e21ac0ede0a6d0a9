"""The renderer against sphere tracing of the same scene, and a scene's way to disk and back."""

import json

import pytest
import torch

from distill_core.artifacts import SceneSpec
from distill_core.errors import ArtifactError, ConfigError
from distill_core.networks.fields import build_field
from distill_core.radiance.analytic.procedural import BOUND, render_procedural
from distill_core.radiance.cameras.camera import Camera, orbit_camera
from distill_core.radiance.rendering.quadrature import over
from distill_core.radiance.scenes.scene import (
    RenderStopped,
    Scene,
    SceneLimits,
    load_scene,
    render,
    save_scene,
)
from distill_core.recipe.tables import NetworkConfig

SPEC = SceneSpec(field="hash", bound=1.0, radius=2.8)
FULL = torch.ones(8, 8, 8, dtype=torch.bool)


def camera(size: int = 40) -> Camera:
    return orbit_camera(40, 30, 2.8, fov_degrees=40, width=size, height=size)


def exact_scene() -> Scene:
    return Scene(
        build_field(NetworkConfig(name="analytic"), BOUND),
        FULL,
        SPEC.model_copy(update={"bound": BOUND}),
        num_steps=400,
    )


def small_scene(seed: int = 0) -> Scene:
    torch.manual_seed(seed)
    field = build_field(NetworkConfig(name="hash", args={"levels": 2, "log2_table_size": 8}), SPEC.bound)
    with torch.no_grad():
        field.table.normal_(0, 2)  # a field with structure
    return Scene(field, torch.rand(8, 8, 8) > 0.3, SPEC, num_steps=32)


def test_marching_the_exact_field_shows_what_sphere_tracing_shows():
    rgba = render_procedural(camera(), supersample=1)
    shown = render(exact_scene(), camera())
    expected = over(rgba[..., :3], rgba[..., 3:], torch.ones(3))
    assert (shown.opacity - rgba[..., 3]).abs().mean() < 0.01
    assert float((shown.rgb - expected).square().mean()) < 10**-2.2  # 22 dB: only pixels on edges differ
    assert shown.rgb.shape == (40, 40, 3)


def test_depth_is_the_distance_to_the_surface():
    view = orbit_camera(218, 0, 3.0, fov_degrees=2, width=1, height=1, target=(-0.45, -0.35, 0.05))
    shown = render(exact_scene(), view)
    assert float(shown.opacity) == pytest.approx(1, abs=1e-3)
    assert float(shown.depth) == pytest.approx(3.0 - 0.38, abs=0.02)  # the sphere's near pole


def test_the_background_shows_where_nothing_is():
    empty = Scene(
        build_field(NetworkConfig(name="analytic"), BOUND), torch.zeros_like(FULL), SPEC, num_steps=32
    )
    assert torch.equal(render(empty, camera(8)).rgb, torch.ones(8, 8, 3))
    blue = render(empty, camera(8), background=(0.0, 0.0, 1.0))
    assert torch.equal(blue.rgb, torch.tensor([0.0, 0.0, 1.0]).expand(8, 8, 3))
    assert float(blue.opacity.max()) == float(blue.depth.max()) == 0


def test_early_stop_and_chunks_do_not_change_the_picture():
    whole = render(small_scene(), camera(20))
    pieces = render(small_scene(), camera(20), limits=SceneLimits(chunk_rays=37))
    for one, other in zip(whole, pieces):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_rendering_stops_when_asked():
    asked = []

    def should_stop() -> bool:
        asked.append(True)
        return len(asked) == 3

    with pytest.raises(RenderStopped):
        render(small_scene(), camera(20), should_stop=should_stop, limits=SceneLimits(chunk_rays=50))
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("width", "background", "field"),
    [
        (100_000, None, "width"),
        (8, (2.0, 0.0, 0.0), "background"),
        (8, (float("nan"), 0.0, 0.0), "background"),
    ],
)
def test_what_cannot_be_rendered_is_refused_and_its_field_named(width, background, field):
    wide = Camera(torch.eye(4), 8.0, 8.0, 4.0, 4.0, width, 100)
    with pytest.raises(ConfigError) as caught:
        render(small_scene(), wide, background=background)
    assert caught.value.field == field


def test_a_saved_scene_loads_as_the_same_scene(tmp_path):
    scene = small_scene()
    save_scene(scene, tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_scene(tmp_path / "model")
    assert loaded.spec == scene.spec
    assert torch.equal(loaded.occupied, scene.occupied)
    assert torch.equal(render(loaded, camera(16)).rgb, render(scene, camera(16)).rgb)


def damage_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_config(folder):
    (folder / "config.json").write_text("{")


def other_network(folder):
    values = json.loads((folder / "config.json").read_text())
    values["network"]["args"]["levels"] = 5
    (folder / "config.json").write_text(json.dumps(values))


def unknown_network(folder):
    values = json.loads((folder / "config.json").read_text())
    values["network"]["name"] = "splats"
    (folder / "config.json").write_text(json.dumps(values))


def other_grid(folder):
    values = json.loads((folder / "config.json").read_text())
    values["grid_resolution"] = 16
    (folder / "config.json").write_text(json.dumps(values))


def no_weights(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "damage", [damage_weights, damage_config, other_network, unknown_network, other_grid, no_weights]
)
def test_a_damaged_scene_is_an_artifact_error_that_names_the_file(tmp_path, damage):
    save_scene(small_scene(), tmp_path)
    damage(tmp_path)
    with pytest.raises(ArtifactError, match=r"config\.json|model\.safetensors"):
        load_scene(tmp_path)


def test_a_scene_with_nan_weights_is_refused(tmp_path):
    scene = small_scene()
    with torch.no_grad():
        scene.field.table[3] = float("nan")
    save_scene(scene, tmp_path)
    with pytest.raises(ArtifactError, match="NaN"):
        load_scene(tmp_path)
