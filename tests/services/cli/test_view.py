"""`distillery view` in a real browser, and `distillery render` of a file's cameras."""

import io
import json
import shutil
import socket
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from distill_core.artifacts import SceneSpec
from distill_core.errors import ConfigError, DataError, Unavailable
from distill_core.networks.fields import build_field
from distill_core.radiance.cameras.camera import orbit_camera
from distill_core.radiance.cameras.paths import read_camera_file
from distill_core.radiance.scenes.scene import Scene, render, save_scene
from distill_core.recipe.tables import NetworkConfig
from distillery_cli.app import main
from distillery_cli.scenes.sources import LocalScene, needed_outputs, open_scene, picture_of

SPEC = SceneSpec(field="analytic", bound=1.0, radius=2.8, background=(1.0, 1.0, 0.0))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SOFTWARE_GL = ["--no-sandbox", "--enable-unsafe-swiftshader", "--use-gl=angle", "--use-angle=swiftshader"]


@pytest.fixture(scope="module")
def scene() -> Scene:
    torch.set_num_threads(1)
    field = build_field(NetworkConfig(name="analytic"), SPEC.bound).eval()
    return Scene(field, torch.ones(8, 8, 8, dtype=torch.bool), SPEC, num_steps=64)


@pytest.fixture(scope="module")
def folder(scene, tmp_path_factory):
    path = tmp_path_factory.mktemp("viewed") / "model"
    save_scene(scene, path)
    return path


@pytest.fixture
def page():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=SOFTWARE_GL)
        yield browser.new_page(viewport={"width": 600, "height": 600})
        browser.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(ready, seconds: float = 100.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def shown_on(page) -> np.ndarray:
    """The lower half of the page, where nothing lies over the scene."""
    with Image.open(io.BytesIO(page.screenshot())) as picture:
        return np.asarray(picture.convert("RGB").resize((60, 60), Image.Resampling.BOX), dtype=float)[
            34:54, 6:
        ]


def test_the_browser_shows_the_scene_from_its_own_camera(page, scene):
    pytest.importorskip("viser", reason="viser is not installed")
    from distillery_cli.scenes.view import Viewer, _from_viser

    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    viewer = Viewer(LocalScene(scene), host="127.0.0.1", port=free_port(), size=128)
    try:
        page.set_default_timeout(100_000)
        page.goto(f"http://127.0.0.1:{viewer.port}")
        page.wait_for_selector("canvas")
        wait_until(lambda: [v._state.value for v in viewer._views.values()] == ["rgb, 128 x 128"])
        (visitor,) = viewer._views.values()
        usual = orbit_camera(45, 30, SPEC.radius, fov_degrees=SPEC.fov_degrees, width=60, height=60)

        def seen_from() -> torch.Tensor:
            return _from_viser(visitor._client.camera, 60).c2w

        wait_until(
            lambda: torch.allclose(seen_from(), usual.c2w, atol=1e-3)
        )  # the page begins at one of its own
        assert _from_viser(visitor._client.camera, 60).fx == pytest.approx(usual.fx, rel=1e-3)

        def differs(output: str) -> float:
            seen = LocalScene(scene).render(_from_viser(visitor._client.camera, 128), needed_outputs(output))
            picture = Image.fromarray(picture_of(seen, output, SPEC.background))
            expected = np.asarray(picture.resize((60, 60), Image.Resampling.BOX), dtype=float)[34:54, 6:]
            return float(np.abs(shown_on(page) - expected).mean())

        wait_until(lambda: differs("rgb") < 16)
        visitor._output.value = "normal"
        wait_until(lambda: visitor._state.value == "normal, 128 x 128")
        wait_until(lambda: differs("normal") < 16)
        assert differs("rgb") > 30
        page.mouse.move(300, 450)
        page.mouse.down()
        page.mouse.move(420, 450, steps=4)
        page.mouse.up()
        wait_until(lambda: not torch.allclose(seen_from(), usual.c2w, atol=0.05))
        wait_until(lambda: differs("normal") < 16)
    finally:
        viewer.close()
    assert all(url.startswith((f"http://127.0.0.1:{viewer.port}", "data:", "blob:")) for url in requests)
    assert not errors


def test_a_port_in_use_is_refused(scene):
    pytest.importorskip("viser", reason="viser is not installed")
    from distillery_cli.scenes.view import Viewer

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(Unavailable, match="give --port"):
            Viewer(LocalScene(scene), host="127.0.0.1", port=taken.getsockname()[1], size=128)


def test_stages_of_a_local_view_grow_and_end_when_asked(scene):
    view = orbit_camera(10, 20, 2.8, fov_degrees=40, width=32, height=16)
    stages = list(LocalScene(scene).stages(view, ("rgb",), None))
    assert [stage.rgb.shape for stage in stages] == [(2, 4, 3), (4, 8, 3), (8, 16, 3), (16, 32, 3)]
    assert np.array_equal(stages[-1].rgb, LocalScene(scene).render(view).rgb)
    seen = []
    for stage in LocalScene(scene).stages(view, ("rgb",), None, lambda: len(seen) == 2):
        seen.append(stage)
    assert len(seen) == 2


def test_depth_is_brightest_where_it_is_nearest(scene):
    view = orbit_camera(10, 20, 2.8, fov_degrees=50, width=24, height=24)
    sparse = replace(scene, occupied=scene.occupied & (torch.arange(8) < 5))
    seen = LocalScene(sparse).render(view, needed_outputs("depth"))
    picture = picture_of(seen, "depth", (0.0, 0.0, 0.0))[..., 0].astype(float)
    solid = seen.opacity > 0.99
    depth = seen.depth[solid]
    assert np.corrcoef(picture[solid], depth)[0, 1] < -0.99
    assert picture[solid].max() == 255
    assert picture[seen.opacity < 1e-6].max() == 0


def transforms(cameras, **more) -> str:
    frames = [
        {"file_path": f"images/{i}.png", "transform_matrix": camera.c2w.tolist()}
        for i, camera in enumerate(cameras)
    ]
    first = cameras[0]
    lens = {
        "fl_x": first.fx,
        "fl_y": first.fy,
        "cx": first.cx,
        "cy": first.cy,
        "w": first.width,
        "h": first.height,
    }
    return json.dumps({**lens, **more, "frames": frames})


CAMERAS = [orbit_camera(a, 25, 2.6, fov_degrees=45, width=20, height=14) for a in (0.0, 100.0)]


def test_views_of_a_files_cameras_are_written(folder, scene, tmp_path, capsys):
    path = tmp_path / "transforms.json"
    path.write_text(transforms(CAMERAS))
    assert (
        main(["render", str(folder), "--cameras", str(path), "--out", str(tmp_path / "views"), "--json"]) == 0
    )
    files = json.loads(capsys.readouterr().out)["files"]
    assert len(files) == 2
    for file, camera in zip(files, CAMERAS):
        with Image.open(file) as picture:
            expected = (render(scene, camera).rgb * 255).round().numpy()
            np.testing.assert_allclose(np.asarray(picture, dtype=float), expected, atol=1)


def test_a_camera_path_is_read_as_nerfstudio_means_it(tmp_path):
    path = tmp_path / "path.json"
    frames = [{"camera_to_world": c.c2w.flatten().tolist(), "fov": 30.0, "aspect": 1} for c in CAMERAS]
    path.write_text(json.dumps({"render_width": 40, "render_height": 20, "camera_path": frames}))
    moved = SPEC.model_copy(
        update={
            "transform": tuple((2 * torch.eye(4)).fill_diagonal_(2)[:3].flatten().tolist()) + (0, 0, 0, 1)
        }
    )
    for spec, scale in ((SPEC, 1.0), (moved, 2.0)):
        for read, camera in zip(read_camera_file(path, spec), CAMERAS):
            torch.testing.assert_close(read.c2w[:3, 3], scale * camera.c2w[:3, 3])
            torch.testing.assert_close(read.c2w[:3, :3], camera.c2w[:3, :3])
            assert (read.width, read.height) == (40, 20)
            assert read.fy == read.fx == pytest.approx(10 / np.tan(np.radians(15)))


POSE = torch.eye(4).flatten().tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"camera_path": []},
        {"camera_path": [{"camera_to_world": [1, 2]}]},
        {"camera_path": [{"camera_to_world": POSE, "fov": 200}]},
        {"camera_path": [{}]},
        {"camera_path": [{"camera_to_world": POSE}], "render_width": 0},
        {"camera_path": [{"camera_to_world": POSE}], "render_height": None},
        {"camera_path": [{"camera_to_world": POSE}], "camera_type": "equirectangular"},
    ],
)
def test_a_damaged_camera_path_names_its_file(tmp_path, change):
    path = tmp_path / "path.json"
    path.write_text(json.dumps({"render_width": 4, "render_height": 4, **change}))
    with pytest.raises(DataError, match=r"path\.json"):
        read_camera_file(path, SPEC)


def test_films_and_gifs_have_a_frame_a_view(folder, tmp_path):
    av = pytest.importorskip("av", reason="av is not installed")
    for name in ("orbit.mp4", "orbit.gif"):
        assert (
            main(["render", str(folder), "--orbit", "5", "--size", "33", "--out", str(tmp_path / name)]) == 0
        )
    with av.open(str(tmp_path / "orbit.mp4")) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert [frame.shape for frame in frames] == [(32, 32, 3)] * 5
    first = open_scene(str(folder)).render(orbit_camera(0, 30, 2.8, fov_degrees=40, width=33, height=33))
    assert np.abs(frames[0].astype(float) - first.rgb[:32, :32]).mean() < 20  # colours at half resolution
    with Image.open(tmp_path / "orbit.gif") as gif:
        assert gif.n_frames == 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output", "albedo"], "known: rgb, depth"),
        (["--orbit", "2", "--cameras", "x.json"], "not both"),
        (["--cameras", "nowhere.json"], "nowhere.json is no readable JSON"),
        (["--size", "0"], "at least 1 pixel"),
    ],
)
def test_what_cannot_be_rendered_is_said_in_words(folder, arguments, said, capsys, tmp_path):
    assert main(["render", str(folder), "--out", str(tmp_path / "a.png"), *arguments]) in (2, 65)
    assert said in " ".join(capsys.readouterr().err.split())


def test_several_views_are_no_single_picture(folder, tmp_path):
    path = tmp_path / "transforms.json"
    path.write_text(transforms(CAMERAS))
    from distillery_cli.scenes.render import _save

    with pytest.raises(ConfigError, match="name a folder"):
        _save([np.zeros((4, 4, 3), np.uint8)] * 2, tmp_path / "a.png", sheet=False)
