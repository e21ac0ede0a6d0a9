"""Published engines where they do not fit: built again, passed over or refused. TensorRT is a stand-in."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import structlog
import torch

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.errors import ArtifactError, Unavailable
from distill_core.tensorrt import building as engine_building
from distill_core.tensorrt.building import SOURCES, fitting
from distill_core.tensorrt.engines import read_info
from distillery_sampler.backends import tensorrt_backend
from distillery_sampler.engine.requests import GenerateRequest
from distillery_sampler.models.memory import weight_bytes
from tests.services.converter.tensorrt_stand_in import HOST, install
from tests.services.sampler.helpers import answer, publish_denoiser

THERE = HOST.model_copy(update={"gpu": "NVIDIA H100", "compute_capability": "9.0"})
PROFILE = {"x_sigma": ((1, 1, 8, 8), (8, 1, 8, 8), (32, 1, 8, 8)), "sigma": ((1,), (8,), (32,))}
WANTED = GenerateRequest("engine", class_labels=(3, 1, 4), seed=7)


@pytest.fixture
def trt(monkeypatch):
    monkeypatch.setattr(tensorrt_backend, "this_host", lambda: HOST)
    return install(monkeypatch)


def publish(store: ArtifactStore, folder: Path, *, sources: bool = True, fallback: bool = True) -> Manifest:
    """A model with a `trt-fp16` export that was built by `THERE`, and perhaps with what it was built from."""
    made = publish_denoiser(ArtifactStore(folder / "aside"), folder / "model", name="engine")
    exports = folder / "model" / "exports"
    shutil.copytree(exports / "onnx-fp32", exports / "trt-fp16" / SOURCES)
    source = exports / "trt-fp16" / SOURCES / "denoiser.onnx"
    place = {"target": "trt-fp16", "host": THERE, "cache": folder / "there"}
    engine_building.build([source], [PROFILE], exports / "trt-fp16", **place)
    (exports / "trt-fp16" / "denoiser.plan").write_bytes(b"a plan of there")
    if not sources:
        shutil.rmtree(exports / "trt-fp16" / SOURCES)
    reports = {"trt-fp16": made.exports["onnx-fp32"].model_copy(update={"target": "trt-fp16"})}
    if fallback:
        reports |= made.exports
    return store.publish(folder / "model", made.model_copy(update={"exports": reports}))


@pytest.fixture
def store(tmp_path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def exported(store: ArtifactStore) -> Path:
    return store.fetch("engine@1") / "exports" / "trt-fp16"


def test_engines_of_another_machine_are_built_once_for_this_one_with_a_sentence(trt, store, tmp_path, caplog):
    publish(store, tmp_path)
    trt.built.clear()
    found = fitting(exported(store), HOST, tmp_path / "cache")
    assert trt.built == ["denoiser.onnx"]
    assert "trt-fp16 were built by TensorRT 11.4.0 on NVIDIA H100" in caplog.text
    assert "here is TensorRT 11.4.0 on NVIDIA L4" in caplog.text
    assert (found / "denoiser.plan").read_bytes() == b"a plan"
    info, there = read_info(found), read_info(exported(store))
    assert info.host == HOST
    assert info.engines == there.engines  # of the same graph, for the same shapes
    assert found.is_relative_to(tmp_path / "cache")

    assert fitting(exported(store), HOST, tmp_path / "cache") == found
    assert trt.built == ["denoiser.onnx"]
    newer = HOST.model_copy(update={"tensorrt": "11.5.0"})
    assert fitting(exported(store), newer, tmp_path / "cache") != found
    assert trt.built == ["denoiser.onnx"] * 2
    assert fitting(exported(store), THERE, tmp_path / "cache") == exported(store)  # it fits as it is
    assert trt.built == ["denoiser.onnx"] * 2


def test_the_sampler_opens_what_was_built_here_and_else_uses_the_next_export(trt, store, tmp_path):
    manifest = publish(store, tmp_path)
    (wanted,) = answer(store, tmp_path / "cache", WANTED)
    with structlog.testing.capture_logs() as logged:
        (found,) = answer(store, tmp_path / "cache", WANTED, targets=("trt-fp16", "onnx-fp32"))
    assert trt.opened == [b"a plan"]  # of this machine; the stand-in cannot run it
    (said,) = [entry for entry in logged if entry["log_level"] == "warning"]
    assert (said["model"], said["target"], said["instead"]) == ("engine@1", "trt-fp16", "onnx-fp32")
    assert "denoiser.plan is damaged" in said["error"]
    np.testing.assert_array_equal(found, wanted)
    plan = len(b"a plan of there") + (exported(store) / "engine.json").stat().st_size
    assert weight_bytes(manifest, "trt-fp16") == plan  # what they are built from is not loaded


def test_engines_that_cannot_be_built_are_passed_over(trt, store, tmp_path):
    publish(store, tmp_path, sources=False)
    trt.built.clear()
    with structlog.testing.capture_logs() as logged:
        answer(store, tmp_path / "cache", WANTED, targets=("trt-fp16", "onnx-fp32"))
    (said,) = [entry for entry in logged if entry["log_level"] == "warning"]
    assert "built by TensorRT 11.4.0 on NVIDIA H100" in said["error"]
    assert "distillery convert MODEL --target trt-fp16" in said["error"]
    assert trt.built == trt.opened == []


def test_a_build_that_fails_is_said_and_the_next_export_is_used(trt, store, tmp_path):
    publish(store, tmp_path)
    trt.Builder.plan = None
    with structlog.testing.capture_logs() as logged:
        answer(store, tmp_path / "cache", WANTED, targets=("trt-fp16", "onnx-fp32"))
    (said,) = [entry for entry in logged if entry["log_level"] == "warning"]
    assert "could not build denoiser.onnx: no kernel for this layer" in said["error"]
    trt.Builder.plan = b"a plan"
    (tmp_path / "no folder").write_bytes(b"")
    with pytest.raises(Unavailable, match="engines cannot be kept in .*: Not a directory"):
        fitting(exported(store), HOST, tmp_path / "no folder")


def test_without_the_package_the_next_export_is_used_and_without_one_the_model_is_refused(
    store, tmp_path, monkeypatch
):
    with monkeypatch.context() as there:
        install(there)
        publish(store, tmp_path)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with structlog.testing.capture_logs() as logged:
        answer(store, tmp_path / "cache", WANTED, targets=("trt-fp16", "onnx-fp32"))
    (said,) = [entry for entry in logged if entry["log_level"] == "warning"]
    assert "tensorrt is not installed" in said["error"]
    with pytest.raises(Unavailable, match=r"tensorrt is not installed.*\[trt\]"):
        answer(store, tmp_path / "cache", WANTED, targets=("trt-fp16",))
    with pytest.raises(Unavailable, match="need an NVIDIA GPU"):
        tensorrt_backend.open_tensorrt(tmp_path, exported(store), store.manifest("engine"), tmp_path)


def test_an_engine_of_another_gpu_without_its_sources_is_refused_with_the_way_to_rebuild_it(
    trt, store, tmp_path
):
    manifest = publish(store, tmp_path, sources=False, fallback=False)
    with pytest.raises(
        ArtifactError, match="built by .* H100 .*, and here is .* L4 .*distillery convert MODEL --target trt"
    ):
        tensorrt_backend.open_tensorrt(store.fetch(manifest.ref), exported(store), manifest, tmp_path)
