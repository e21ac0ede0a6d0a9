"""The programs of `examples/`, as they stand, against a live sampler."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.radiance.scenes.scene import save_scene
from tests.helpers import REPOSITORY
from tests.services.sampler.helpers import SamplerProcess, publish_denoiser
from tests.services.sampler.predictor_helpers import classifier, publish_classifier
from tests.services.sampler.test_render import cloud

EXAMPLES = REPOSITORY / "examples"


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    root = tmp_path_factory.mktemp("examples")
    store = ArtifactStore(root / "store")
    publish_denoiser(store, root / "model", name="dmd2-digits")
    publish_classifier(store, root / "classifier", classifier(5), name="kd-digits")
    scene = cloud(num_steps=4)
    save_scene(scene, root / "scene")
    store.publish(
        root / "scene",
        Manifest(
            name="procedural-scene", kind="field", method="nerf", card={"scene": scene.spec.model_dump()}
        ),
    )
    with SamplerProcess(store.url) as process:
        yield process


@pytest.fixture
def run(sampler, tmp_path):
    def program(name: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / name), sampler.address, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "error::DeprecationWarning:__main__"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return program


def test_generate_saves_ten_digits(run, tmp_path):
    run("generate.py")
    digits = [Image.open(tmp_path / f"digit-{label}.png") for label in range(10)]
    assert {digit.size for digit in digits} == {(8, 8)}
    assert len({digit.tobytes() for digit in digits}) == 10


def test_generate_asyncio_gets_four_digits(run):
    assert run("generate_asyncio.py").splitlines() == ["(8, 8, 1) uint8"] * 4


def test_stream_prints_each_picture(run):
    lines = run("stream.py").splitlines()
    assert sorted(int(line.split()[1]) for line in lines) == list(range(10))


def test_render_saves_an_animation(run, tmp_path):
    run("render.py")
    with Image.open(tmp_path / "orbit.gif") as orbit:
        assert (orbit.size, orbit.n_frames) == ((96, 96), 12)


def test_tritonclient_lists_describes_and_runs(run):
    listed, described, shape = run("tritonclient_infer.py").splitlines()
    assert listed == "['dmd2-digits', 'kd-digits', 'kd-digits:features', 'procedural-scene']"
    assert "UINT64" in described
    assert shape == "(10, 8, 8, 1)"


def test_reflection_calls_by_name_and_json(run):
    answer = json.loads(
        run(
            "reflection.py",
            "distillery.v1.SamplerService/Generate",
            '{"model": "dmd2-digits", "classLabels": [7]}',
        )
    )
    assert answer["images"][0]["width"] == 8
    assert answer["summary"]["model"] == "dmd2-digits@1"
    live = run("reflection.py", "inference.GRPCInferenceService/ServerLive")
    assert json.loads(live) == {"live": True}
    assert "distillery" not in [
        line.split()[1].partition(".")[0]
        for line in (EXAMPLES / "reflection.py").read_text().splitlines()
        if line.startswith(("import", "from"))
    ]


def test_each_example_is_short_and_has_a_test():
    tested = {"generate", "generate_asyncio", "stream", "render", "tritonclient_infer", "reflection"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40
