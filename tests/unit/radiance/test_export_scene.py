"""`distillery export-scene`: which file a scene becomes, from the command line."""

import json

import numpy as np
import pytest
import torch
import trimesh

from distill_core.artifacts import SceneSpec
from distill_core.data.captures import CapturedScene
from distill_core.errors import ArtifactError, ConfigError
from distill_core.networks.fields import build_field
from distill_core.radiance.analytic.procedural import signed_distances
from distill_core.radiance.export.scene import export_scene, import_splats
from distill_core.radiance.scenes.gaussians import (
    GaussianModel,
    GaussianScene,
    load_gaussians,
    render_gaussians,
    save_gaussians,
)
from distill_core.radiance.scenes.scene import Scene, save_scene
from distill_core.recipe.tables import NetworkConfig
from distillery_cli.app import main

SPEC = SceneSpec(field="analytic", bound=1.0, radius=2.8)


@pytest.fixture
def home(tmp_path, monkeypatch):
    from distill_service.settings import settings

    monkeypatch.setenv("DISTILLERY_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("DISTILLERY_CACHE_DIR", str(tmp_path / "cache"))
    settings.cache_clear()
    yield tmp_path
    settings.cache_clear()


@pytest.fixture
def field_folder(home):
    field = build_field(NetworkConfig(name="analytic"), 1.0)
    save_scene(Scene(field, torch.ones(8, 8, 8, dtype=torch.bool), SPEC, 48), home / "field")
    return home / "field"


@pytest.fixture
def splats_folder(home):
    generator = torch.Generator().manual_seed(0)
    model = GaussianModel.at(3 + torch.randn(60, 3, generator=generator), sh_degree=1)
    model.log_scales.fill_(-1.5)
    save_gaussians(GaussianScene(model, SPEC), home / "splats")
    return home / "splats"


def test_a_field_becomes_a_mesh_of_its_surface(field_folder, home, capsys):
    path = home / "out" / "mesh.glb"
    arguments = ["export-scene", str(field_folder), "--to", str(path), "--resolution", "64", "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == {"files": [str(path)]}
    mesh = trimesh.load(path, force="mesh")
    distance = signed_distances(torch.from_numpy(np.array(mesh.vertices, np.float32))).amin(-1)
    assert float(distance.abs().max()) < 2 / 64  # less than a cell
    assert mesh.is_watertight


def test_gaussians_become_splats_and_come_back(splats_folder, home):
    path = home / "splats.ply"
    assert main(["export-scene", str(splats_folder), "--to", str(path)]) == 0
    scene = import_splats(path)
    assert 0.8 < float(scene.gaussians.means.abs().quantile(0.9)) < 1.5  # most of it fills the box
    save_gaussians(scene, home / "imported")
    assert main(["export-scene", str(path), "--to", str(home / "views"), "--views", "4", "--size", "16"]) == 0
    views = CapturedScene(CapturedScene.Config(path=str(home / "views"))).train
    assert views.images.shape == (3, 16, 16, 4)
    assert 0.05 < float(views.images[..., 3].mean()) < 0.95
    assert float(render_gaussians(load_gaussians(home / "imported"), views.camera(0)).opacity.max()) > 0


@pytest.mark.parametrize(
    ("kind", "name", "sentence"),
    [
        ("field", "scene.stl", "becomes .glb"),
        ("splats", "scene.glb", "become .ply"),
        ("field", "", "at least 1"),
    ],
)
def test_a_file_that_a_scene_does_not_become_is_answered_with_those_it_does(
    kind, name, sentence, field_folder, splats_folder, home, capsys
):
    folder = {"field": field_folder, "splats": splats_folder}[kind]
    views = [] if name else ["--views", "0"]
    assert main(["export-scene", str(folder), "--to", str(home / "out" / name), *views]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_what_is_no_scene_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="only scenes"):
        export_scene(torch.nn.Linear(1, 1), tmp_path / "mesh.glb")
    with pytest.raises(ConfigError, match="at least 1"):
        export_scene(GaussianScene(GaussianModel.at(torch.zeros(1, 3)), SPEC), tmp_path / "views", size=0)
