"""Functions that are called by their signature: the same values as torch's own forward, whoever else is served."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from distill_core.artifacts import ArtifactStore, ExportReport
from distill_core.errors import ArtifactError, ConfigError
from distill_core.kinds import find_kind
from distill_core.probe import write_probe
from distillery_sampler.client import AsyncSamplerClient
from distillery_sampler.engine.engine import Engine
from distillery_sampler.engine.requests import PredictRequest
from distillery_sampler.metrics import Metrics
from distillery_sampler.settings import SamplerSettings
from tests.services.sampler.helpers import SamplerProcess, publish_denoiser
from tests.services.sampler.predictor_helpers import (
    CLASSES,
    REPORT,
    SHAPE,
    classifier,
    publish_classifier,
    publish_mixed,
)
from tests.services.sampler.test_reload import until

WARM = {
    "DISTILLERY_SAMPLER_PRELOAD": '["animals"]'
}  # torch is imported before the first call, not in its time
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def pictures(count: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, *SHAPE)).astype(np.float32)


def forward(seed: int, images: np.ndarray) -> np.ndarray:
    """Torch's own forward of the published network."""
    with torch.no_grad():
        return classifier(seed).network(torch.from_numpy(images)).numpy()


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ArtifactStore:
    root = tmp_path_factory.mktemp("predict")
    store = ArtifactStore(root / "store")
    publish_classifier(store, root / "animals", classifier(5))
    publish_mixed(store, root / "mixed")
    publish_denoiser(store, root / "digits")
    return store


@pytest.fixture(scope="module")
def sampler(store):
    with SamplerProcess(store.url, WARM) as process:
        yield process


@pytest.fixture
def client(sampler):
    with sampler.client() as client:
        yield client


def mixed_inputs() -> dict[str, np.ndarray]:
    return {
        "x": np.arange(12, dtype=np.float16).reshape(2, 2, 3) / 7,
        "gain": np.array([2.25, -3.5]),
        "votes": np.array([[3, 1, 4, 1], [5, 9, 2, 6]], np.int32),
        "shift": np.array([[3], [200]], np.uint8),
        "on": np.array([True, False]),
        "words": np.array(["größer", "less"], dtype=object),
    }


def check_mixed(outputs: dict[str, np.ndarray]) -> None:
    given = mixed_inputs()
    gained = given["x"].astype(np.float64) * given["gain"][:, None, None]
    np.testing.assert_allclose(outputs["scaled"], gained + given["shift"][:, :, None], rtol=1e-12)
    assert outputs["total"].ravel().tolist() == [9, 22]
    assert outputs["twice"].tolist() == [[6, 2, 8, 2], [10, 18, 4, 12]]
    assert outputs["off"].ravel().tolist() == [False, True]


def test_an_answer_is_torchs_own_forward_and_functions_are_called_by_name(client):
    images = pictures(7)
    outputs = client.predict("animals", image=images)
    assert set(outputs) == {"logits"}
    assert outputs["logits"].dtype == np.float32
    np.testing.assert_allclose(outputs["logits"], forward(5, images), **CLOSE)
    with torch.no_grad():
        activations = classifier(5).network.features(torch.from_numpy(images)).numpy()
    named = client.predict("animals@latest", "features", image=images.astype(np.float64))
    np.testing.assert_allclose(named["activations"], activations, **CLOSE)


def test_an_item_is_the_same_whatever_it_is_batched_with(sampler):
    sizes = (1, 17, 1, 5, 1, 17)
    with sampler.client() as client, ThreadPoolExecutor(len(sizes)) as pool:
        asked = [
            pool.submit(client.predict, "animals", image=pictures(size, seed))
            for seed, size in enumerate(sizes)
        ]
        for seed, (size, answer) in enumerate(zip(sizes, asked, strict=True)):
            np.testing.assert_allclose(answer.result()["logits"], forward(5, pictures(size, seed)), **CLOSE)


def test_every_type_of_tensor_goes_there_and_back(client):
    outputs = client.predict("mixed", **mixed_inputs())
    check_mixed(outputs)
    types = {name: values.dtype.name for name, values in outputs.items()}
    wanted = {"scaled": "float64", "total": "int64", "twice": "int32", "off": "bool", "said": "object"}
    assert types == wanted
    assert outputs["said"].tolist() == ["größer", "less"]
    assert outputs["total"].shape == (2,)


def test_the_asyncio_client_gets_the_same(sampler):
    async def ask() -> list[dict[str, np.ndarray]]:
        async with AsyncSamplerClient(sampler.address) as client:
            return await asyncio.gather(*(client.predict("animals", image=pictures(3, k)) for k in range(4)))

    for seed, outputs in enumerate(asyncio.run(ask())):
        np.testing.assert_allclose(outputs["logits"], forward(5, pictures(3, seed)), **CLOSE)


def test_models_say_what_they_take_and_answer(client):
    animals = client.model("animals")
    assert [function.name for function in animals.functions] == ["predict", "features"]
    (image,) = animals.functions[0].inputs
    assert (image.name, image.dtype, tuple(image.shape), image.low, image.high) == (
        "image",
        "float32",
        SHAPE,
        -1,
        1,
    )
    assert list(animals.card["class_names"]) == list(CLASSES)
    votes = {tensor.name: tensor for tensor in client.model("mixed").functions[0].inputs}["votes"]
    assert (list(votes.shape), list(votes.max_shape), votes.HasField("low")) == ([-1], [7], True)


@pytest.mark.parametrize(
    ("model", "function", "changed", "field", "said"),
    [
        ("animals", "", {"image": pictures(2)[:, :, :5]}, "inputs.image", r"float32 \(3, 6, 10\)"),
        ("animals", "", {"image": pictures(2) * 3}, "inputs.image", "allowed are -1 to 1"),
        ("animals", "", {"image": np.float32(1)}, "inputs.image", "is a single value"),
        ("animals", "", {"imagge": pictures(1)}, "inputs.imagge", "did you mean 'image'"),
        ("animals", "", {}, "inputs.image", "input image is missing"),
        ("animals", "", {"image": pictures(257)}, "inputs.image", "257 items in one request are too many"),
        ("animals", "featured", {"image": pictures(1)}, "function", "did you mean 'features'"),
        ("mixed", "", {"votes": np.array([[1], [2**40]])}, "inputs.votes", "allowed are 0 to 9"),
        ("mixed", "", {"votes": np.ones((2, 8), int)}, "inputs.votes", r"int32 \(<=7\)"),
        ("mixed", "", {"x": np.full((2, 2, 3), 1e5)}, "inputs.x", "beyond float16"),
        ("mixed", "", {"gain": np.array([1.0, np.nan])}, "inputs.gain", "NaN"),
        ("mixed", "", {"gain": np.array([1.0])}, "inputs", "equally many items"),
        ("mixed", "", {"words": np.array(["x" * 2001, ""])}, "inputs.words", "2001 characters"),
        ("mixed", "", {"shift": np.array([[3], [4]], np.int16)}, "shift", "cannot be sent"),
        ("digits", "", {"image": pictures(1)}, "model", "digits@1 is a denoiser; use Generate"),
    ],
)
def test_a_wrong_request_is_answered_with_the_field(client, model, function, changed, field, said):
    inputs = {**(mixed_inputs() if model == "mixed" else {}), **changed}
    with pytest.raises(ConfigError, match=said) as caught:
        client.predict(model, function, **inputs)
    assert caught.value.field == field


def test_a_call_for_pictures_is_told_what_to_use(client):
    with pytest.raises(ConfigError, match="animals@1 is a predictor; use Predict"):
        client.generate("animals", class_labels=[1])
    with pytest.raises(ConfigError, match="animals@1 is a predictor; use Predict"):
        client.render("animals")


def test_an_answer_larger_than_a_message_is_refused(store):
    settings = {**WARM, "DISTILLERY_SAMPLER_MAX_REPLY_BYTES": str(64 * len(CLASSES) * 4)}
    with SamplerProcess(store.url, settings) as process, process.client() as client:
        assert len(client.predict("animals", image=pictures(64))["logits"]) == 64
        with pytest.raises(ConfigError, match="use smaller requests"):
            client.predict("animals", image=pictures(65))


def test_triton_clients_call_functions_as_models_and_count_them(store, tmp_path):
    def infer(name: str, images: np.ndarray, version: str = "") -> object:
        given = InferInput("image", list(images.shape), "FP32")
        given.set_data_from_numpy(images)
        return triton.infer(name, [given], model_version=version)

    with SamplerProcess(store.url, WARM) as process, InferenceServerClient(process.address) as triton:
        listed = {model.name: model.state for model in triton.get_model_repository_index().models}
        assert {"animals": "READY", "animals:features": "READY", "mixed": "READY"}.items() <= listed.items()
        assert triton.is_model_ready("animals:features")
        assert not triton.is_model_ready("animals:nothing")
        described = triton.get_model_metadata("animals:features")
        assert [(t.name, t.datatype, list(t.shape)) for t in described.outputs] == [
            ("activations", "FP32", [-1, 5])
        ]
        assert triton.get_model_config("animals").config.max_batch_size == 256
        for count in (3, 4):
            reply = infer("animals", pictures(count))
            np.testing.assert_allclose(reply.as_numpy("logits"), forward(5, pictures(count)), **CLOSE)
        reply = infer("animals:features", pictures(2), "1")
        assert reply.get_response().model_name == "animals:features"
        assert reply.as_numpy("activations").shape == (2, 5)
        counted = {
            name: triton.get_inference_statistics(name).model_stats[0]
            for name in ("animals", "animals:predict", "animals:features", "mixed")
        }
        assert [stats.inference_count for stats in counted.values()] == [9, 7, 2, 0]
        assert counted["animals"].inference_stats.success.count == 3
        batched = counted["animals:features"].batch_stats
        assert sum(batch.batch_size * batch.compute_infer.count for batch in batched) == 2
        with pytest.raises(InferenceServerException, match="no function 'nothing'"):
            infer("animals:nothing", pictures(1))
        with pytest.raises(InferenceServerException, match="no function 'x'"):
            triton.get_model_metadata("digits:x")


def test_triton_clients_send_and_get_every_type(sampler):
    with InferenceServerClient(sampler.address) as triton:
        listed = {t.name: t for t in triton.get_model_metadata("mixed").inputs}
        inputs = []
        for name, values in mixed_inputs().items():
            shape = [len(values), *values.shape[1:]] if values.ndim > 1 else [len(values), 1]
            inputs.append(InferInput(name, shape, listed[name].datatype))
            given = np.array([text.encode() for text in values], object) if name == "words" else values
            inputs[-1].set_data_from_numpy(given.reshape(shape))
        reply = triton.infer("mixed", inputs)
        outputs = {t.name: reply.as_numpy(t.name) for t in triton.get_model_metadata("mixed").outputs}
        check_mixed(outputs)
        assert [text.decode() for text in outputs["said"].ravel()] == ["größer", "less"]
        assert outputs["total"].shape == (2, 1)


def test_a_new_version_is_swapped_in_and_one_that_answers_otherwise_is_refused(tmp_path):
    store = ArtifactStore(tmp_path / "store")
    publish_classifier(store, tmp_path / "one", classifier(5))
    images = pictures(3)
    with SamplerProcess(store.url, WARM) as process, process.client() as client:
        answered = lambda: client.predict("animals", image=images)["logits"]  # noqa: E731
        np.testing.assert_allclose(answered(), forward(5, images), **CLOSE)
        publish_classifier(store, tmp_path / "two", classifier(6))
        until(lambda: np.allclose(answered(), forward(6, images), **CLOSE))
        publish_classifier(store, tmp_path / "three", classifier(7), probe=classifier(6))
        until(lambda: any(event["event"].startswith("new version refused") for event in process.events))
        with pytest.raises(ArtifactError, match=r"of its probe of \w+ is off by"):
            client.predict("animals@3", image=images)
        np.testing.assert_allclose(answered(), forward(6, images), **CLOSE)


def engine_answer(store: ArtifactStore, cache, request: PredictRequest, **settings: object):
    async def run():
        engine = Engine(store, cache, SamplerSettings(instances=1, **settings), Metrics())
        try:
            return await engine.predict(request)
        finally:
            await engine.close()

    return asyncio.run(run())


def test_an_exported_version_is_run_from_its_graphs(tmp_path):
    store, predictor = ArtifactStore(tmp_path / "store"), classifier(5)
    target = tmp_path / "model" / "exports" / "onnx-fp32"
    target.mkdir(parents=True)
    predictor.save(tmp_path / "model")
    kind = find_kind("predictor")
    write_probe(tmp_path / "model", kind.probe(predictor))
    published = publish_classifier(store, tmp_path / "plain", predictor)
    for graph in kind.graphs(predictor, published):
        torch.onnx.export(
            graph.module,
            tuple(graph.example.values()),
            target / f"{graph.name}.onnx",
            input_names=list(graph.example),
            output_names=list(graph.outputs),
            dynamic_axes={name: {0: "batch"} for name in graph.example},
            dynamo=False,
        )
    files = tuple(f"exports/onnx-fp32/{name}.onnx" for name in published.signature.functions)
    report = ExportReport(target="onnx-fp32", files=files, **REPORT)
    store.publish(tmp_path / "model", published.model_copy(update={"exports": {"onnx-fp32": report}}))
    request = PredictRequest("animals", inputs={"image": pictures(9)})
    for settings, backend in (
        ({}, "onnxruntime"),
        ({"backend": "torch"}, "torch"),
        ({"buckets": (4,)}, "onnxruntime"),
    ):
        outputs, summary = engine_answer(store, tmp_path / "cache", request, **settings)
        assert (summary.model, summary.backend, summary.count) == ("animals@2", backend, 9)
        np.testing.assert_allclose(outputs["logits"], forward(5, pictures(9)), **CLOSE)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"predict/inputs.image": pictures(2), "predict/outputs.scores": pictures(2)}, "off by inf"),
        ({"predict/inputs.image": pictures(2) * 5}, "that its signature does not allow"),
        ({"picture": pictures(2)}, "holds 'picture', expected FUNCTION/inputs.NAME"),
        (b"no safetensors", "damaged or not safetensors"),
    ],
)
def test_a_damaged_probe_is_refused_in_one_sentence(tmp_path, damage, said):
    from safetensors.numpy import save_file

    store, folder = ArtifactStore(tmp_path / "store"), tmp_path / "model"
    manifest = publish_classifier(store, folder, classifier(5))
    (folder / "probe.safetensors").unlink()
    if isinstance(damage, bytes):
        (folder / "probe.safetensors").write_bytes(damage)
    else:
        save_file(damage, folder / "probe.safetensors")
    store.publish(folder, manifest)
    request = PredictRequest("animals@2", inputs={"image": pictures(1)})
    with pytest.raises(ArtifactError, match=said):
        engine_answer(store, tmp_path / "cache", request)


def test_a_function_that_shares_no_call_gets_each_request_whole(tmp_path):
    store, predictor = ArtifactStore(tmp_path / "store"), classifier(5)
    functions = {
        name: function.model_copy(update={"batched": False})
        for name, function in predictor.described.functions.items()
    }
    predictor.described = predictor.described.model_copy(update={"functions": functions})
    publish_classifier(store, tmp_path / "model", predictor)
    settings = {**WARM, "DISTILLERY_SAMPLER_MAX_BATCH": "4"}
    with SamplerProcess(store.url, settings) as process, process.client() as client:
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(client.predict, "animals", image=pictures(9, k)) for k in range(3)]
            for seed, answer in enumerate(asked):
                np.testing.assert_allclose(answer.result()["logits"], forward(5, pictures(9, seed)), **CLOSE)
        with InferenceServerClient(process.address) as triton:
            (stats,) = triton.get_inference_statistics("animals").model_stats
    assert (stats.inference_count, stats.execution_count) == (27, 3)
