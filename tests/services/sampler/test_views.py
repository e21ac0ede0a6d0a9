"""Views over gRPC from real processes: normals, tiles, several scenes at once, slow readers, and what is not a view."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc
import numpy as np
import pytest
import torch
from tritonclient.grpc import InferenceServerClient

from distill_core.artifacts import ArtifactStore, Manifest, SceneSpec
from distill_core.errors import ArtifactError, ConfigError
from distill_core.networks.fields import build_field
from distill_core.radiance.scenes.scene import Scene, refined, render, save_scene
from distill_core.recipe.tables import NetworkConfig
from distillery.v1 import common_pb2, sampler_pb2
from distillery_cli.scenes.sources import ServedScene, _spec
from tests.services.jobs.jobs_stack import wait_for
from tests.services.sampler.helpers import PATIENT_S, SamplerProcess, executed, settled
from tests.services.sampler.test_render import camera

GRID = 8
SPEC = SceneSpec(field="hash", bound=1.0, radius=3.0, fov_degrees=40.0, background=(1.0, 0.5, 0.0))
FULL = torch.ones(GRID, GRID, GRID, dtype=torch.bool)
OUTPUTS = ("rgb", "depth", "opacity", "normal")


def hash_scene(seed: int, occupied: torch.Tensor = FULL) -> Scene:
    torch.manual_seed(seed)
    args = {"levels": 1, "hidden": 16, "log2_table_size": 10}
    field = build_field(NetworkConfig(name="hash", args=args), SPEC.bound)
    with torch.no_grad():
        field.table.normal_(0, 3)
    return Scene(field.eval(), occupied, SPEC, num_steps=12)


SCENES = {"red": hash_scene(1), "blue": hash_scene(2), "nothing": hash_scene(3, torch.zeros_like(FULL))}


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("views")
    store = ArtifactStore(root / "store")
    for name, scene in SCENES.items():
        save_scene(scene, root / name)
        store.publish(
            root / name,
            Manifest(name=name, kind="field", method="nerf", card={"scene": scene.spec.model_dump()}),
        )
    other = SPEC.model_copy(update={"bound": 2.0})
    store.publish(
        root / "red", Manifest(name="moved", kind="field", method="nerf", card={"scene": other.model_dump()})
    )
    settings = {"DISTILLERY_SAMPLER_PRELOAD": '["red", "blue"]', "DISTILLERY_SAMPLER_INSTANCES": "1"}
    with SamplerProcess(str(root / "store"), settings) as process:
        yield process


@pytest.fixture(scope="module")
def client(sampler):
    with sampler.client(timeout_s=PATIENT_S) as client:
        yield client


def rendered_tiles(sampler, name: str) -> int:
    return executed(sampler.address, name)


def same(one, other) -> None:
    for name in one._fields:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        assert a is None or np.array_equal(a, b), name


def test_normals_are_the_librarys(client):
    seen = client.render("red", azimuth=30, elevation=20, width=12, height=10, outputs=OUTPUTS)
    expected = render(refined(SCENES["red"]), camera(30.0), normals=True)
    assert seen.normal.shape == (10, 12, 3)
    np.testing.assert_allclose(seen.normal, expected.normal.numpy(), atol=1e-4)
    assert client.render("red", width=4, height=4).normal is None
    only = client.render("red", width=4, height=4, outputs=("normal",))
    assert only.normal.shape == (4, 4, 3)
    assert only.rgb.size == 0


def test_a_view_grows_from_a_preview_into_what_a_single_call_shows(sampler, client):
    size = {"width": 150, "height": 99, "outputs": OUTPUTS}
    stages = list(client.render_progressive("red", azimuth=25, elevation=10, **size))
    assert len(stages) == 1 + 4  # 27 rows of 150 pixels are a tile
    same(stages[-1], client.render("red", azimuth=25, elevation=10, **size))
    final = stages[-1].rgb.astype(float)
    errors = [np.abs(stage.rgb.astype(float) - final).mean() for stage in stages]
    assert 0 < errors[0] < 30
    assert errors == sorted(errors, reverse=True)
    assert np.array_equal(stages[1].rgb[:27], stages[-1].rgb[:27])
    assert np.array_equal(stages[1].rgb[27:], stages[0].rgb[27:])


def test_regions_cover_each_view_of_a_path_once(sampler):
    options = sampler_pb2.ViewOptions(width=70, height=120, progressive=True)
    orbit = sampler_pb2.OrbitPath(count=2)
    request = sampler_pb2.RenderPathRequest(model="red", orbit=orbit, options=options)
    replies = list(sampler.stub().RenderPath(request))
    views = [reply.view for reply in replies if reply.HasField("view")]
    assert replies[-1].summary.count == 2
    for index in range(2):
        first, *tiles = [view for view in views if view.index == index]
        assert (first.region.factor, first.region.top, first.region.last) == (4, 0, False)
        assert (first.rgb.width, first.rgb.height) == (18, 30)
        rows = [row for tile in tiles for row in range(tile.region.top, tile.region.top + tile.region.rows)]
        assert rows == list(range(120))
        assert [tile.region.last for tile in tiles] == [False] * (len(tiles) - 1) + [True]


def test_progressive_is_for_streams(sampler):
    options = sampler_pb2.ViewOptions(width=8, height=8, progressive=True)
    request = sampler_pb2.RenderRequest(model="red", orbit=sampler_pb2.Orbit(), options=options)
    with pytest.raises(grpc.RpcError, match="RenderPath"):
        sampler.stub().Render(request)


def test_views_of_any_size_and_scene_are_the_same_bytes_together_and_alone(client):
    asked = [
        (name, {"azimuth": 20.0 * index, "width": 5 + 7 * index, "height": 4 + index, "outputs": OUTPUTS})
        for index in range(8)
        for name in ("red", "blue")
    ]
    alone = [client.render(name, **options) for name, options in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        for _ in range(2):
            together = list(pool.map(lambda ask: client.render(ask[0], **ask[1]), asked))
            for one, other in zip(alone, together, strict=True):
                same(one, other)


def test_small_views_are_rendered_in_batches(sampler, client):
    triton = InferenceServerClient(sampler.address)

    def counts():
        stats = triton.get_inference_statistics("blue").model_stats[0]
        return np.array([executed(sampler.address, "blue"), stats.execution_count])

    before = counts()
    with ThreadPoolExecutor(17) as pool:
        slow = pool.submit(client.render, "blue", width=800, height=400)
        wait_for(lambda: counts()[0] > before[0], "the large view to begin")
        list(pool.map(lambda azimuth: client.render("blue", azimuth=azimuth, width=8, height=8), range(16)))
        slow.result()
    views, batches = counts() - before
    assert views == 16 + 80
    assert batches < views - 6


def test_a_large_view_keeps_no_small_one_waiting(sampler, client):
    done: list[str] = []

    def ask(name: str, side: int) -> None:
        client.render("red", width=side, height=side)
        done.append(name)

    before = rendered_tiles(sampler, "red")
    large = threading.Thread(target=ask, args=("large", 1024))  # 256 tiles
    large.start()
    wait_for(lambda: rendered_tiles(sampler, "red") > before, "the large view to begin")
    for _ in range(3):
        ask("small", 16)
    large.join()
    assert done == ["small"] * 3 + ["large"]


def test_a_view_that_nobody_wants_ends_at_its_next_tile(sampler, client):
    before = rendered_tiles(sampler, "red")
    stages = client.render_progressive("red", width=1024, height=1024, outputs=OUTPUTS)
    next(stages)
    stages.close()
    assert settled(sampler, "red") - before < 200  # of 257


def test_a_path_is_rendered_no_further_than_its_reader_has_got(sampler):
    options = sampler_pb2.ViewOptions(
        width=64, height=64, outputs=[2, 3], image_format=common_pb2.IMAGE_FORMAT_RAW_U8
    )  # 32 KiB a view
    request = sampler_pb2.RenderPathRequest(
        model="blue", orbit=sampler_pb2.OrbitPath(count=1000), options=options
    )
    before = rendered_tiles(sampler, "blue")
    stream = sampler.stub().RenderPath(request)
    next(stream)
    seen = settled(sampler, "blue") - before
    assert seen < 300  # what the connection's own buffers hold
    for _ in range(seen):  # and goes on as soon as somebody reads
        next(stream)
    assert rendered_tiles(sampler, "blue") - before > seen
    stream.cancel()


def test_a_scene_with_nothing_in_it_is_its_background(client):
    seen = client.render("nothing", width=9, height=7, outputs=OUTPUTS)
    assert np.array_equal(seen.rgb, np.broadcast_to(np.array([255, 128, 0], np.uint8), (7, 9, 3)))
    assert not seen.depth.any()
    assert not seen.opacity.any()
    assert not seen.normal.any()


def test_a_camera_inside_the_scene_sees_it(client):
    pose = np.eye(4, dtype=np.float32)
    seen = client.render("red", pose=pose, width=16, height=16, outputs=OUTPUTS)
    expected = render(
        refined(SCENES["red"]),
        replace(camera(0.0), c2w=torch.eye(4), width=16, height=16, fx=21.98, fy=21.98, cx=8, cy=8),
    )
    assert np.isfinite(seen.normal).all()
    assert seen.opacity.mean() > 0.1
    np.testing.assert_allclose(seen.opacity, expected.opacity.numpy(), atol=1e-2)


def test_a_scene_whose_manifest_tells_of_another_box_is_refused(client):
    with pytest.raises(ArtifactError, match=r"box .*2.*1"):
        client.render("moved", width=4, height=4)
    assert client.render("red", width=4, height=4).rgb.shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pose": np.full((4, 4), np.nan)}, "NaN or infinity"),
        ({"pose": np.zeros((4, 4))}, "singular"),
        ({"azimuth": float("nan")}, "azimuth nan is not a finite angle"),
        ({"radius": float("inf")}, "positive distance"),
        ({"width": 0}, "width = 0 is not allowed"),
        ({"height": 100_000}, "height = 100000 is not allowed"),
        ({"background": (float("nan"), 0, 0)}, "background"),
        ({"fov_degrees": float("nan")}, "fov_degrees = nan is not allowed"),
        ({"pose": np.eye(4), "intrinsics": (float("nan"), 5, 4, 4)}, "not a positive focal length"),
        ({"pose": np.eye(4), "intrinsics": (0, 5, 4, 4)}, "not a positive focal length"),
    ],
)
@pytest.mark.parametrize("how", ["render", "render_progressive", "render_path"])
def test_what_is_no_view_is_refused_in_words_and_the_server_goes_on(client, how, options, said):
    if how == "render_path":
        options = dict(options)
        if "azimuth" in options:
            options["elevation"] = options.pop("azimuth")
            said = said.replace("azimuth", "elevation")
        if "pose" in options:
            options["poses"] = [options.pop("pose")]
    ask = getattr(client, how)
    with pytest.raises(ConfigError, match=said):
        list(ask("red", **{"width": 8, "height": 8, **options}))
    assert client.render("red", width=2, height=2).rgb.shape == (2, 2, 3)


def test_an_output_that_does_not_exist_is_named(client):
    with pytest.raises(ConfigError, match="known: rgb, depth, opacity, normal"):
        client.render("red", outputs=("albedo",))


def test_what_the_viewer_sees_through_a_sampler_is_the_librarys_also_through_a_lens(client):
    served = ServedScene(client, "red", _spec(client.model("red").scene))
    assert served.spec == SPEC
    bent = replace(camera(30.0, 40, 30), distortion=(0.2, 0.0, 0.0, 0.0, 0.02, -0.01))
    seen = served.render(bent, ("rgb", "depth"), (0.0, 1.0, 0.0))
    expected = render(refined(SCENES["red"]), bent, background=(0.0, 1.0, 0.0))
    np.testing.assert_allclose(seen.rgb.astype(int), np.rint(expected.rgb.numpy() * 255), atol=1)
    np.testing.assert_allclose(seen.depth, expected.depth.numpy(), atol=1e-4)
    straight = render(refined(SCENES["red"]), camera(30.0, 40, 30))
    assert float((straight.depth - expected.depth).abs().max()) > 0.01
    stages = list(served.stages(bent, ("rgb", "depth"), (0.0, 1.0, 0.0)))
    assert np.array_equal(stages[-1].rgb, seen.rgb)
    assert len(list(served.stages(bent, ("rgb",), None, lambda: True))) == 1
    with pytest.raises(ConfigError, match="a lens of 2 coefficients"):
        client.render("red", pose=np.eye(4), distortion=(0.1, 0.2))
