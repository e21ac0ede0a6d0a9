"""The converter on a real, tiny artifact: what is published, what is refused, what ONNX Runtime computes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.errors import ArtifactError, ConfigError, NotFound, Unavailable
from distill_core.kinds.cards import described, generator_card
from distill_core.networks.diffusers_denoiser import DiffusersDenoiser
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.recipe.tables import NetworkConfig
from distill_service.jobs import requests
from distill_service.jobs.database import Database
from distill_service.jobs.specs import draft_convert
from distill_service.jobs.table import ENDED
from distillery_converter.convert import convert
from distillery_converter.graph import tensors
from distillery_converter.graphs import denoiser_graph
from distillery_converter.prompts import fixed_prompts
from distillery_converter.targets import TARGETS

pytestmark = pytest.mark.timeout(900)

TINY = NetworkConfig(
    name="DiTTransformer2DModel",
    args={"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "patch_size": 4},
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def tiny_denoiser(**options: object) -> DiffusersDenoiser:
    torch.manual_seed(0)
    values = {"parameterisation": "edm", "shape": (1, 8, 8), "num_classes": 10, **options}
    return build_denoiser(TINY, **values)


def publish(root: Path, denoiser: DiffusersDenoiser, name: str = "digits") -> ArtifactStore:
    folder = root / f"{name}-source"
    denoiser.save(folder)
    store = ArtifactStore(root / "store")
    store.publish(folder, Manifest(name=name, title="tiny", **described(denoiser)))
    return store


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> tuple[ArtifactStore, Manifest]:
    store = publish(tmp_path_factory.mktemp("converted"), tiny_denoiser())
    return store, convert(store, "digits@1", "onnx-fp32", job="job-1")


def test_an_export_is_a_new_version_beside_the_model_it_was_made_from(converted):
    store, manifest = converted
    report = manifest.exports["onnx-fp32"]
    assert (manifest.ref, manifest.parents, manifest.job) == ("digits@2", ("digits@1",), "job-1")
    assert report.files == ("exports/onnx-fp32/denoiser.onnx",)
    assert 0 <= report.max_abs_difference <= report.tolerance == 1e-3
    assert report.rel_l2 <= 1e-4
    assert report.batches == (1, 3, 16)
    assert "torch" in report.tool_versions
    assert store.manifest("digits@1").exports == {}
    assert set(store.manifest("digits@1").files) < set(manifest.files)
    assert load_denoiser(store.fetch("digits@2")).image == generator_card(manifest).image


def test_a_second_target_joins_the_first_and_may_differ_by_more(converted, tmp_path):
    _, manifest = converted
    store = ArtifactStore(shutil.copytree(converted[0].url, tmp_path / "store"))
    both = convert(store, manifest.ref, "onnx-fp16")
    assert set(both.exports) == {"onnx-fp32", "onnx-fp16"}
    assert both.exports["onnx-fp32"] == manifest.exports["onnx-fp32"]
    half = both.exports["onnx-fp16"]
    assert manifest.exports["onnx-fp32"].rel_l2 < half.rel_l2 <= 1e-2
    weights = onnx.load(store.fetch(both.ref) / half.files[0]).graph.initializer
    assert onnx.TensorProto.FLOAT16 in {weight.data_type for weight in weights}


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_plain_onnxruntime_computes_what_torch_computes_at_any_batch(converted, batch):
    store, manifest = converted
    folder = store.fetch(manifest.ref)
    session = onnxruntime.InferenceSession(folder / "exports/onnx-fp32/denoiser.onnx")
    generator = np.random.default_rng(batch)
    sigma = generator.uniform(0.1, 40, batch).astype(np.float32)
    noise = generator.standard_normal((batch, 1, 8, 8)).astype(np.float32)
    inputs = {"x_sigma": noise * sigma.reshape(-1, 1, 1, 1), "sigma": sigma, "class_label": np.arange(batch)}
    x_sigma, sigma_, label = map(torch.from_numpy, inputs.values())
    with torch.no_grad():
        expected = load_denoiser(folder)(x_sigma, sigma_, {"class_label": label}).numpy()
    np.testing.assert_allclose(session.run(["x0"], inputs)[0], expected, atol=1e-3)


def test_the_file_names_its_batch_axis_and_holds_no_path_of_this_machine(converted):
    store, manifest = converted
    path = store.fetch(manifest.ref) / "exports/onnx-fp32/denoiser.onnx"
    graph = onnx.load(path).graph
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    assert shapes == {"x_sigma": ["batch", 1, 8, 8], "sigma": ["batch"], "class_label": ["batch"]}
    assert [value.name for value in graph.output] == ["x0"]
    assert str(Path(__file__).parents[3]).encode() not in path.read_bytes()
    assert not path.with_name("denoiser.onnx.data").exists()


@pytest.mark.parametrize("ref", ["digits@1", "digits@2", "digits@latest"])
def test_what_is_converted_already_is_returned_and_not_published_again(converted, ref):
    store, manifest = converted
    again = convert(store, ref, "onnx-fp32", job="job-2")
    assert again == manifest
    assert store.versions("digits") == [1, 2]


def test_a_job_that_was_cut_off_while_another_published_the_same_leaves_no_half_version(converted, tmp_path):
    _, manifest = converted
    store = ArtifactStore(shutil.copytree(converted[0].url, tmp_path / "store"))
    cut_off = Path(store.root, "digits", "versions", str(store._claim("digits", "job-2")))
    (cut_off / "config.json").write_text("{}")
    assert convert(store, "digits@1", "onnx-fp32", job="job-2") == manifest
    assert not cut_off.exists()
    assert store._claim("digits", "job-3") == int(cut_off.name)
    assert convert(store, "digits@1", "onnx-fp32", job="job-1") == manifest  # its own version stays
    assert store.versions("digits") == [1, 2]


def test_a_gate_that_fails_publishes_nothing(converted):
    store, _ = converted
    with pytest.raises(
        ArtifactError, match=r"digits@1 as onnx-fp32 differs from PyTorch by .*nothing was published"
    ):
        convert(store, "digits@1", "onnx-fp32", tolerance=0.0)
    assert store.versions("digits") == [1, 2]


def test_a_network_that_fixes_its_batch_is_refused(tmp_path, monkeypatch):
    denoiser = tiny_denoiser()
    family = type(denoiser.family)
    call = family.call
    monkeypatch.setattr(family, "call", lambda self, net, x, *rest: call(self, net, x, *rest) * len(x))
    store = publish(tmp_path, denoiser)
    with pytest.raises(ArtifactError, match="batch"):
        convert(store, "digits", "onnx-fp32")
    assert store.versions("digits") == [1]


def test_an_unknown_target_is_answered_with_the_known_ones(converted):
    with pytest.raises(ConfigError) as caught:
        convert(converted[0], "digits", "onnx-fp31")
    assert caught.value.field == "target"
    assert all(name in str(caught.value) for name in ("'onnx-fp31'", *TARGETS))


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), float("inf")])
def test_a_tolerance_that_is_no_distance_is_refused(converted, tolerance):
    with pytest.raises(ConfigError, match="tolerance"):
        convert(converted[0], "digits", "onnx-fp32", tolerance=tolerance)


@pytest.mark.parametrize(
    ("kind", "said"),
    [("gaussians", "such a scene is no function of tensors"), ("predictor", "it does not say what it takes")],
)
def test_what_no_graph_is_made_of_is_refused_with_the_reason(tmp_path, kind, said):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    store = ArtifactStore(tmp_path / "store")
    store.publish(tmp_path / "model", Manifest(name="other", kind=kind))
    with pytest.raises(ArtifactError, match=f"other@1 cannot be converted: {said}"):
        convert(store, "other", "onnx-fp32")


def test_a_missing_model_or_version_is_named(converted):
    with pytest.raises(NotFound, match="did you mean 'digits'"):
        convert(converted[0], "digit", "onnx-fp32")
    with pytest.raises(NotFound, match="no version 9"):
        convert(converted[0], "digits@9", "onnx-fp32")


def test_weights_damaged_in_the_store_are_refused_by_their_checksum(tmp_path):
    store = publish(tmp_path, tiny_denoiser())
    weights = next((tmp_path / "store").rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"checksum of transformer/.*safetensors differs"):
        convert(store, "digits", "onnx-fp32")
    assert store.versions("digits") == [1]


def test_weights_published_damaged_are_refused_in_one_sentence(tmp_path):
    tiny_denoiser().save(tmp_path / "model")
    weights = next((tmp_path / "model").rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    store = ArtifactStore(tmp_path / "store")
    store.publish(tmp_path / "model", Manifest(name="digits", **described(tiny_denoiser())))
    with pytest.raises(ArtifactError, match="damaged") as caught:
        convert(store, "digits", "onnx-fp32")
    assert "\n" not in str(caught.value)
    assert store.versions("digits") == [1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_tensorrt_without_a_gpu_says_what_is_missing_and_what_to_do(converted):
    with pytest.raises(Unavailable, match="need an NVIDIA GPU.*choose onnx-fp32"):
        convert(converted[0], "digits", "trt-fp16")


def test_a_full_disk_is_one_sentence_and_nothing_is_published(tmp_path):
    store = publish(tmp_path, tiny_denoiser())
    with pytest.raises(Unavailable, match="cannot convert digits@1: No such file or directory"):
        convert(store, "digits", "onnx-fp32", work=tmp_path / "gone")
    assert store.versions("digits") == [1]


def test_fixed_inputs_do_not_depend_on_the_batch():
    graph = denoiser_graph(tiny_denoiser(), tiny_denoiser().sampler)
    small, large = graph.inputs(3), graph.inputs(16)
    assert all((small[name] == large[name][:3]).all() for name in small)
    assert fixed_prompts(2) == fixed_prompts(5)[:2]
    assert len(set(fixed_prompts(16))) == 16
    assert tensors(small)[2].dtype == torch.int64


# -- the job process ----------------------------------------------------------------------------------------


def start_job(root: Path, store: ArtifactStore, **spec: object) -> subprocess.Popen[bytes]:
    run_dir = root / "run"
    run_dir.mkdir(exist_ok=True)
    values = {"artifact": "digits@1", "target": "onnx-fp32", "tolerance": None, **spec}
    job = {
        "job": "job-7",
        "attempt": 1,
        "kind": "convert",
        "spec": values,
        "run_dir": str(run_dir),
        "store": store.url,
    }
    (run_dir / "spec.json").write_text(json.dumps(job))
    return subprocess.Popen(
        [sys.executable, "-m", "distillery_converter.run", str(run_dir / "spec.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def events(output: bytes) -> list[dict[str, object]]:
    return [json.loads(line) for line in output.splitlines()]


def test_a_job_killed_between_export_and_publish_leaves_no_version_and_its_retry_publishes_one(tmp_path):
    store = publish(tmp_path, tiny_denoiser())
    process = start_job(tmp_path, store)
    while not list((tmp_path / "run" / "work").rglob("denoiser.onnx")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert store.versions("digits") == [1]

    retried = start_job(tmp_path, store)
    output, _ = retried.communicate()
    told = events(output)  # nothing but events is printed
    assert retried.returncode == 0
    assert told[-1]["event"] == "result"
    assert told[-1]["artifact"] == "digits@2"
    assert {"event": "progress", "step": 3, "steps": 3}.items() <= told[-2].items()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["artifact"] == "digits@2"
    assert store.versions("digits") == [1, 2]
    assert store.manifest("digits@2").job == "job-7"
    assert list((tmp_path / "run" / "work").iterdir()) == []


def test_a_job_that_cannot_be_done_says_so_as_an_event_and_by_its_exit_code(tmp_path):
    process = start_job(tmp_path, publish(tmp_path, tiny_denoiser()), target="tflite")
    output, log = process.communicate()
    told = events(output)
    assert process.returncode == 2
    assert (told[-1]["event"], told[-1]["type"], told[-1]["field"]) == ("error", "ConfigError", "target")
    assert b"Traceback" not in log


def test_a_stopped_job_ends_at_once_and_cleans_up(tmp_path):
    store = publish(tmp_path, tiny_denoiser())
    process = start_job(tmp_path, store)
    first = process.stdout.readline()  # it has begun to work
    process.terminate()
    process.communicate()
    assert json.loads(first)["event"] == "progress"
    assert process.returncode == 143
    assert store.versions("digits") == [1]
    assert list((tmp_path / "run" / "work").iterdir()) == []


def test_the_worker_runs_a_conversion_from_the_job_table_to_a_new_version(tmp_path):
    store = publish(tmp_path, tiny_denoiser())
    changes = {
        "STATE_DIR": str(tmp_path / "state"),
        "STORE_URL": store.url,
        "BROKER_URL": f"filesystem://{tmp_path / 'broker'}",
        "CONVERTER_METRICS_PORT": "0",
        "REAP_S": "0.5",
    }
    changes = {f"DISTILLERY_{name}": value for name, value in changes.items()}
    (tmp_path / "state").mkdir()
    db = Database.open(f"sqlite:///{tmp_path / 'state' / 'jobs.db'}")
    draft = draft_convert({"artifact": "digits", "target": "onnx-fp32"})
    job = requests.submit(db, [draft], requests.Options()).job
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **changes}
    worker = subprocess.Popen([sys.executable, "-m", "distillery_converter.worker"], env=environment)
    try:
        while requests.get(db, job.id).job.state not in ENDED:
            assert worker.poll() is None
            time.sleep(0.2)
    finally:
        worker.terminate()
        assert worker.wait() == 0
    ended = requests.get(db, job.id).job
    db.close()
    assert (ended.state, ended.artifact) == ("SUCCEEDED", "digits@2"), ended.error
    assert store.manifest("digits@2").job == job.id
