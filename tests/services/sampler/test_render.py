"""Scenes: a real field with untrained weights, looked at through a real process."""

from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from tritonclient.grpc import InferenceServerClient, InferInput

from distill_core.artifacts import ArtifactStore, Manifest, SceneSpec
from distill_core.errors import ConfigError
from distill_core.networks.fields import build_field
from distill_core.radiance.cameras.camera import orbit_camera
from distill_core.radiance.scenes.scene import Scene, refined, render, save_scene
from distill_core.recipe.tables import NetworkConfig
from distillery.v1 import sampler_pb2
from tests.services.sampler.helpers import SamplerProcess, settled

GRID = 8


def cloud(num_steps: int = 32) -> Scene:
    """A field that was never trained: a mist whose colours depend on place and direction."""
    torch.manual_seed(0)
    spec = SceneSpec(field="hash", bound=1.0, radius=3.0, fov_degrees=40.0, background=(1.0, 0.5, 0.0))
    field = build_field(NetworkConfig(name="mlp"), spec.bound)
    return Scene(field.eval(), torch.ones(GRID, GRID, GRID, dtype=torch.bool), spec, num_steps=num_steps)


def publish_cloud(store: ArtifactStore, folder: Path, scene: Scene) -> None:
    """Publish a scene as `cloud`; `folder` must be new."""
    save_scene(scene, folder)
    store.publish(
        folder, Manifest(name="cloud", kind="field", method="nerf", card={"scene": scene.spec.model_dump()})
    )


@pytest.fixture(scope="module")
def scene() -> Scene:
    torch.set_num_threads(1)
    return cloud()


@pytest.fixture(scope="module")
def sampler(scene, tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    publish_cloud(ArtifactStore(root / "store"), root / "cloud", scene)
    with SamplerProcess(str(root / "store"), {"DISTILLERY_SAMPLER_PRELOAD": '["cloud"]'}) as process:
        yield process


@pytest.fixture(scope="module")
def client(sampler):
    with sampler.client() as client:
        yield client


def camera(azimuth: float, width: int = 12, height: int = 10):
    return orbit_camera(azimuth, 20.0, 3.0, fov_degrees=40.0, width=width, height=height)


def as_uint8(rgb: torch.Tensor) -> np.ndarray:
    return np.rint(rgb.numpy() * 255).astype(int)


def test_a_view_equals_the_librarys_rendering(client, scene):
    seen = client.render(
        "cloud", azimuth=30, elevation=20, width=12, height=10, outputs=("rgb", "depth", "opacity")
    )
    rendered = render(refined(scene), camera(30.0))
    np.testing.assert_allclose(seen.rgb.astype(int), as_uint8(rendered.rgb), atol=1)
    np.testing.assert_allclose(seen.depth, rendered.depth.numpy(), atol=1e-4)
    np.testing.assert_allclose(seen.opacity, rendered.opacity.numpy(), atol=1e-4)
    assert seen.rgb.shape == (10, 12, 3)


def test_a_pose_with_intrinsics_sees_what_the_orbit_sees(client):
    orbit = client.render("cloud", azimuth=70, elevation=20, width=12, height=10)
    posed = camera(70.0)
    intrinsics = (posed.fx, posed.fy, posed.cx, posed.cy)
    pose = client.render("cloud", pose=posed.c2w.numpy(), intrinsics=intrinsics, width=12, height=10)
    np.testing.assert_allclose(pose.rgb.astype(int), orbit.rgb.astype(int), atol=1)
    assert pose.depth is None


def test_the_background_can_be_chosen(client):
    views = [
        client.render("cloud", radius=30.0, width=8, height=8, background=colour)
        for colour in ((0, 0, 1), (0, 1, 0))
    ]
    assert views[0].rgb[0, 0].tolist() == [0, 0, 255]
    assert views[1].rgb[0, 0].tolist() == [0, 255, 0]


def test_a_path_is_an_orbit_in_order_with_a_summary(sampler, client):
    path = list(client.render_path("cloud", count=6, elevation=20, width=8, height=8))
    assert len(path) == 6
    for index, view in enumerate(path):
        single = client.render("cloud", azimuth=60.0 * index, elevation=20, width=8, height=8)
        assert np.array_equal(view.rgb, single.rgb)
    options = sampler_pb2.ViewOptions(width=4, height=4)
    orbit = sampler_pb2.OrbitPath(count=3)
    request = sampler_pb2.RenderPathRequest(model="cloud", orbit=orbit, options=options)
    replies = list(sampler.stub().RenderPath(request))
    assert [reply.view.index for reply in replies[:3]] == [0, 1, 2]
    assert replies[3].summary.count == 3
    assert replies[3].summary.backend == "torch"


def test_a_path_of_poses_is_rendered_as_given(client):
    poses = [camera(azimuth).c2w.numpy() for azimuth in (0.0, 90.0)]
    views = list(client.render_path("cloud", poses=poses, width=12, height=10))
    assert np.array_equal(views[1].rgb, client.render("cloud", pose=poses[1], width=12, height=10).rgb)


def test_a_path_that_nobody_reads_stops_being_rendered(sampler, client):
    views = client.render_path("cloud", count=1000, width=16, height=16)
    next(views)
    views.close()
    assert settled(sampler, "cloud") < 900


@pytest.mark.parametrize(
    ("options", "said", "field"),
    [
        ({"width": 100_000, "height": 1}, "width = 100000 is not allowed", "width"),
        ({"width": 0}, "width = 0 is not allowed", "width"),
        ({"height": -5}, "height = -5 is not allowed", "height"),
        ({"width": 4096, "height": 4096}, "4096 x 4096 is too large|would be 64 MiB", None),
        ({"fov_degrees": 180.0}, "fov_degrees = 180 is not allowed", "fov_degrees"),
        ({"background": (0.0, 0.5, 2.0)}, "give 3 numbers in", "background"),
        ({"background": (0.0,)}, "has 1 numbers", "options.background"),
        ({"radius": -1.0}, "radius = -1 is not allowed", "orbit.radius"),
        ({"intrinsics": (1, 1, 1, 1)}, "intrinsics and a lens go with a pose", "intrinsics"),
        ({"pose": np.eye(3)}, "a pose of 9 numbers", "pose.matrix"),
        ({"pose": np.full((4, 4), np.nan)}, "NaN or infinity", "c2w"),
    ],
)
def test_a_bad_view_names_its_field(client, options, said, field):
    with pytest.raises(ConfigError, match=said) as error:
        client.render("cloud", **{"width": 8, "height": 8, **options})
    if field:
        assert error.value.field == field


def test_a_scene_does_not_generate_and_needs_a_camera(sampler, client):
    with pytest.raises(ConfigError, match="use Render"):
        client.generate("cloud", count=1)
    with pytest.raises(ConfigError, match="a path of 0 views is not allowed"):
        list(client.render_path("cloud", count=0))
    with pytest.raises(grpc.RpcError, match="give pose or orbit"):
        sampler.stub().Render(sampler_pb2.RenderRequest(model="cloud"))


def test_an_unmodified_triton_client_renders_the_same_view(sampler, client):
    posed = camera(45.0)
    triton = InferenceServerClient(sampler.address)
    names = {tensor.name for tensor in triton.get_model_metadata("cloud").outputs}
    assert names == {"rgb", "depth"}
    pose = InferInput("pose", [1, 4, 4], "FP32")
    pose.set_data_from_numpy(posed.c2w.numpy()[None])
    intrinsics = InferInput("intrinsics", [1, 4], "FP32")
    values = np.array([[posed.fx, posed.fy, posed.cx, posed.cy]], np.float32)
    intrinsics.set_data_from_numpy(values)
    answer = triton.infer("cloud", [pose, intrinsics])
    seen = client.render(
        "cloud",
        pose=posed.c2w.numpy(),
        intrinsics=values[0].tolist(),
        width=12,
        height=10,
        outputs=("rgb", "depth"),
    )
    assert np.array_equal(answer.as_numpy("rgb")[0], seen.rgb)
    assert np.array_equal(answer.as_numpy("depth")[0], seen.depth)
