"""What KServe says of a model in each of its states: all answers agree, and what is said can be done."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput, service_pb2
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from distill_core.artifacts import ArtifactStore, CondSpec, Manifest
from distill_core.kinds.cards import described
from distill_core.networks.diffusers_io import load_denoiser
from tests.helpers import tiny_text_to_image
from tests.services.sampler.helpers import (
    SIZE,
    SamplerProcess,
    class_means,
    publish_denoiser,
    teacher_spec,
    write_denoiser,
)
from tests.services.sampler.predictor_helpers import classifier, publish_classifier, publish_mixed
from tests.services.sampler.test_render import cloud, publish_cloud

NOT_SERVED = {
    "judge": "its signature is empty",
    "splats": "is a gaussians, which no sampler serves",
    "bare": "its manifest lacks image, cond or sampler",
    "alone": "is an adapter over nobody@1, which is missing",
}
SERVED = [
    "animals",
    "animals:features",
    "cloud",
    "digits",
    "mixed",
    "plain",
    "prompted",
    "steady",
    "teacher",
]
FILLS = {"zeros": 0, "ones": 1, "threes": 3}


def publish_like(
    store: ArtifactStore, folder: Path, name: str, cond: CondSpec, *, conditional: bool = True
) -> None:
    """The teacher's graph under another name and condition."""
    write_denoiser(folder / name / "exports/onnx-fp32/denoiser.onnx", class_means(), conditional=conditional)
    teacher = store.manifest("teacher")
    card = {**teacher.card, "cond": cond.model_dump(mode="json")}
    store.publish(folder / name, teacher.model_copy(update={"name": name, "card": card}))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ArtifactStore:
    root = tmp_path_factory.mktemp("states")
    store = ArtifactStore(root / "store")
    publish_denoiser(store, root / "student")
    publish_denoiser(store, root / "teacher", name="teacher", sampler=teacher_spec())
    publish_like(store, root, "steady", CondSpec(kind="class_label", num_classes=10))  # no null class
    publish_like(store, root, "plain", CondSpec(kind="none"), conditional=False)
    publish_cloud(store, root / "cloud", cloud(num_steps=4))
    denoiser = load_denoiser(tiny_text_to_image(root / "pipeline"))
    denoiser.save(root / "prompted")
    store.publish(root / "prompted", Manifest(name="prompted", **described(denoiser)))
    publish_classifier(store, root / "animals", classifier(5))
    publish_mixed(store, root / "mixed")
    for name, kind in (("judge", "predictor"), ("splats", "gaussians"), ("bare", "denoiser")):
        (root / name).mkdir()
        (root / name / "config.json").write_text("{}")
        store.publish(root / name, Manifest(name=name, kind=kind))
    (root / "alone" / "adapter").mkdir(parents=True)
    (root / "alone" / "adapter" / "adapter_config.json").write_text("{}")
    prompted = store.manifest("prompted")
    card = {**prompted.card, "base": "nobody@1"}
    adapter = prompted.model_copy(update={"name": "alone", "card": card})
    store.publish(root / "alone", adapter)
    return store


@pytest.fixture(scope="module")
def triton(store):
    with SamplerProcess(store.url) as process, InferenceServerClient(process.address) as client:
        yield client


def filled(listed: list, batch: int, value: int) -> list[InferInput]:
    """What a client that knows nothing of the model sends: every listed input, of the type and shape that are said."""
    inputs = []
    for tensor in listed:
        shape = [batch, *(max(1, int(side)) for side in tensor["shape"][1:])]  # -1: any size
        dtype = triton_to_np_dtype(tensor["datatype"])
        array = (
            np.full(shape, b"a cat", object)
            if tensor["datatype"] == "BYTES"
            else np.full(shape, value, dtype)
        )
        if tensor["name"] == "pose":
            array = np.tile(np.eye(4, dtype=np.float32), (batch, 1, 1))
        if tensor["name"] == "image":  # lies in [-1, 1], which the protocol has no words for
            array = np.full(shape, value / 4, np.float32)
        if tensor["name"] == "intrinsics":
            array = np.full(shape, 4, np.float32)
        inputs.append(InferInput(tensor["name"], shape, tensor["datatype"]))
        inputs[-1].set_data_from_numpy(array)
    return inputs


def answered(triton: InferenceServerClient, name: str, inputs: list[InferInput], batch: int) -> None:
    reply = triton.infer(name, inputs)
    for output in triton.get_model_metadata(name, as_json=True)["outputs"]:
        shape = reply.as_numpy(output["name"]).shape
        assert shape[0] == batch
        assert all(int(said) in (-1, got) for said, got in zip(output["shape"], shape, strict=True))


def index(triton: InferenceServerClient) -> dict[str, tuple[str, str]]:
    return {m.name: (m.state, m.reason) for m in triton.get_model_repository_index().models}


def ready_names(triton: InferenceServerClient) -> list[str]:
    """As all that list models agree on it."""
    listed = index(triton)
    ready = sorted(name for name, (state, _) in listed.items() if state == "READY")
    assert ready == sorted(name for name in listed if triton.is_model_ready(name))
    only_ready = triton._client_stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(ready=True))
    assert ready == sorted(model.name for model in only_ready.models)
    assert ready == sorted(stats.name for stats in triton.get_inference_statistics().model_stats)
    return ready


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("batch", [1, 2])
def test_who_fills_in_every_listed_input_gets_an_answer_of_every_ready_model(triton, batch, fill):
    assert set(SERVED) <= set(ready_names(triton))
    for name in SERVED:
        described = triton.get_model_metadata(name, as_json=True)
        config = triton.get_model_config(name, as_json=True)["config"]
        assert [t["name"] for t in config["input"]] == [t["name"] for t in described["inputs"]]
        answered(triton, name, filled(described["inputs"], batch, FILLS[fill]), batch)
        optional = {t["name"] for t in config["input"] if t.get("optional")}
        needed = [t for t in described["inputs"] if t["name"] not in optional]
        answered(triton, name, filled(needed, batch, FILLS[fill]), batch if needed else 1)


def test_guidance_is_listed_where_it_can_be_obeyed(triton):
    named = {name: {t.name for t in triton.get_model_metadata(name).inputs} for name in SERVED}
    assert {name for name in SERVED if "guidance_scale" in named[name]} == {"teacher", "digits", "prompted"}
    assert named["plain"] == {"seed", "latents"}
    assert named["cloud"] == {"pose", "intrinsics"}


@pytest.mark.parametrize("name", NOT_SERVED)
def test_what_is_not_served_is_not_ready_and_every_answer_says_why(triton, name):
    assert name not in ready_names(triton)
    state, reason = index(triton)[name]
    assert state == "UNAVAILABLE"
    assert NOT_SERVED[name] in reason
    taken = triton.get_model_metadata("prompted" if name == "alone" else "plain", as_json=True)["inputs"]
    calls = (
        lambda: triton.get_model_metadata(name),
        lambda: triton.get_model_config(name),
        lambda: triton.get_inference_statistics(name),
        lambda: triton.infer(name, filled([t for t in taken if t["name"] != "latents"], 1, 1)),
        lambda: triton.load_model(name),
    )
    for call in calls:
        with pytest.raises(InferenceServerException, match=NOT_SERVED[name]):
            call()


def test_a_model_is_ready_before_it_is_loaded_and_not_once_it_was_unloaded(triton):
    assert triton.is_model_ready("teacher")
    triton.load_model("teacher")
    assert index(triton)["teacher"] == ("READY", "")
    triton.unload_model("teacher")
    state, reason = index(triton)["teacher"]
    assert state == "UNAVAILABLE"
    assert "it was unloaded" in reason
    assert "teacher" not in ready_names(triton)
    described = triton.get_model_metadata("teacher", as_json=True)  # what a request would take
    assert triton.get_inference_statistics("teacher").model_stats[0].inference_count == 0
    answered(triton, "teacher", filled(described["inputs"], 1, 1), 1)
    assert "teacher" in ready_names(triton)


def test_a_version_that_fails_when_it_is_loaded_says_so_from_then_on(store, tmp_path):
    broken = tmp_path / "broken" / "exports" / "onnx-fp32"
    broken.mkdir(parents=True)
    (broken / "denoiser.onnx").write_bytes(b"this is no graph")
    store.publish(tmp_path / "broken", store.manifest("digits").model_copy(update={"name": "broken"}))
    said = "denoiser.onnx cannot be loaded"
    with SamplerProcess(store.url) as process, InferenceServerClient(process.address) as triton:
        for call in (triton.load_model, triton.get_model_metadata, triton.get_model_config):
            with pytest.raises(InferenceServerException, match=said):
                call("broken")
        assert said in index(triton)["broken"][1]
        assert "broken" not in ready_names(triton)


def test_what_no_room_can_be_made_for_is_not_ready(store):
    settings = {"DISTILLERY_SAMPLER_MAX_MODELS": "1", "DISTILLERY_SAMPLER_PRELOAD": '["digits"]'}
    with SamplerProcess(store.url, settings) as process, InferenceServerClient(process.address) as triton:
        assert ready_names(triton) == ["digits"]
        assert "no room beside the preloaded models" in index(triton)["teacher"][1]


def test_a_request_as_large_as_the_configuration_says_is_answered(store):
    settings = {
        "DISTILLERY_SAMPLER_MAX_REPLY_BYTES": str(5 * SIZE * SIZE * 5),
        "DISTILLERY_SAMPLER_MAX_QUEUE_IMAGES": "30",
    }
    with SamplerProcess(store.url, settings) as process, InferenceServerClient(process.address) as triton:
        most = triton.get_model_config("digits").config.max_batch_size
        assert most == 25
        described = triton.get_model_metadata("digits", as_json=True)
        answered(triton, "digits", filled(described["inputs"], most, 1), most)
        with pytest.raises(InferenceServerException):
            triton.infer("digits", filled(described["inputs"], most + 1, 1))
