"""An unmodified tritonclient against a real sampler process."""

import queue

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput, service_pb2
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from distill_core.artifacts import ArtifactStore
from distill_core.diffusion.noise import unit_normal
from distill_core.errors import ConfigError
from distillery_sampler.kserve.tensors import TensorSpec, read_inputs
from tests.services.sampler.helpers import SamplerProcess, publish_denoiser, teacher_spec


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    root = tmp_path_factory.mktemp("kserve")
    store = ArtifactStore(root / "store")
    publish_denoiser(store, root / "student")
    publish_denoiser(store, root / "teacher", name="teacher", sampler=teacher_spec())
    with SamplerProcess(str(root / "store")) as process:
        yield process


@pytest.fixture(scope="module")
def triton(sampler):
    with InferenceServerClient(sampler.address) as client:
        yield client


def tensors(**values: np.ndarray) -> list[InferInput]:
    inputs = []
    for name, value in values.items():
        inputs.append(InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype)))
        inputs[-1].set_data_from_numpy(value)
    return inputs


def digits(labels: list[int], seeds: list[int]) -> list[InferInput]:
    return tensors(seed=np.array(seeds, np.uint64)[:, None], class_label=np.array(labels, np.int64)[:, None])


def test_the_server_is_live_ready_and_describes_itself(triton):
    assert triton.is_server_live()
    assert not triton.is_model_ready("nothing")
    assert triton.is_server_ready()
    metadata = triton.get_server_metadata(as_json=True)
    assert metadata["name"] == "distillery"
    assert "model_repository" in metadata["extensions"]


def test_a_model_is_described_before_and_after_it_is_loaded(triton):
    for _ in range(2):
        assert triton.is_model_ready("digits")
        metadata = triton.get_model_metadata("digits", as_json=True)
        assert metadata["versions"] == ["1"]
        inputs = {tensor["name"]: (tensor["datatype"], tensor["shape"]) for tensor in metadata["inputs"]}
        assert inputs == {
            "seed": ("UINT64", ["-1", "1"]),
            "latents": ("FP32", ["-1", "1", "8", "8"]),
            "class_label": ("INT64", ["-1", "1"]),
            "guidance_scale": ("FP32", ["-1", "1"]),
        }
        (output,) = metadata["outputs"]
        assert (output["name"], output["shape"]) == ("images", ["-1", "8", "8", "1"])
        config = triton.get_model_config("digits", as_json=True)["config"]
        types = [(t["name"], t["data_type"], t.get("optional", False)) for t in config["input"]]
        assert types == [
            ("seed", "TYPE_UINT64", True),
            ("latents", "TYPE_FP32", True),
            ("class_label", "TYPE_INT64", False),
            ("guidance_scale", "TYPE_FP32", True),
        ]
        assert config["max_batch_size"] == 256
        assert config["dynamic_batching"]["priority_levels"] == "2"
        assert config["dynamic_batching"]["default_queue_policy"]["max_queue_size"] == 256
        triton.infer("digits", digits([1], [1]))


def test_an_inference_equals_generate_byte_for_byte(sampler, triton):
    labels, seeds = list(range(10)), list(range(100, 110))
    answer = triton.infer("digits", digits(labels, seeds), model_version="1", request_id="mine")
    images = answer.as_numpy("images")
    assert images.shape == (10, 8, 8, 1)
    assert answer.get_response().id == "mine"
    assert answer.get_response().model_version == "1"
    with sampler.client() as client:
        generated = client.generate("digits", class_labels=labels, seeds=seeds)
        assert images.tobytes() == b"".join(picture.tobytes() for picture in generated)
        more = triton.infer("digits", digits([3], [5]), parameters={"num_steps": 4}).as_numpy("images")
        assert (
            more.tobytes() == client.generate("digits", class_labels=[3], seeds=[5], num_steps=4)[0].tobytes()
        )


def noise(seeds: list[int], draw: int = 0) -> np.ndarray:
    """The noise of the pictures that have these seeds."""
    return np.stack([unit_normal(seed, 0, draw, (1, 8, 8)) for seed in seeds])


def latents(labels: list[int], values: np.ndarray) -> list[InferInput]:
    return tensors(latents=values, class_label=np.array(labels, np.int64)[:, None])


def test_given_latents_make_the_pictures_of_the_seeds_whose_noise_they_are(triton):
    labels, seeds = list(range(10)), list(range(100, 110))
    wanted = triton.infer("digits", digits(labels, seeds)).as_numpy("images")
    found = triton.infer("digits", latents(labels, noise(seeds))).as_numpy("images")
    assert found.tobytes() == wanted.tobytes()
    assert (
        found.tobytes()
        != triton.infer("digits", latents(labels, noise(seeds, 1))).as_numpy("images").tobytes()
    )
    wide = triton.infer("digits", latents(labels, noise(seeds).astype(np.float64))).as_numpy("images")
    assert wide.tobytes() == wanted.tobytes()
    scale = {"guidance_scale": np.full((2, 1), 2.0, np.float32)}
    guided = triton.infer("teacher", [*digits([1, 2], [7, 8]), *tensors(**scale)]).as_numpy("images")
    again = triton.infer("teacher", [*latents([1, 2], noise([7, 8])), *tensors(**scale)]).as_numpy("images")
    assert again.tobytes() == guided.tobytes()  # a teacher draws noise once


def test_seeds_beside_latents_say_the_later_draws(sampler, triton):
    both = [*digits([1, 2, 3], [41, 42, 43]), *tensors(latents=noise([41, 42, 43]))]
    found = triton.infer("digits", both, parameters={"num_steps": 4}).as_numpy("images")
    with sampler.client() as client:
        wanted = client.generate("digits", class_labels=[1, 2, 3], seeds=[41, 42, 43], num_steps=4)
    assert found.tobytes() == b"".join(picture.tobytes() for picture in wanted)
    other = [*digits([1, 2, 3], [7, 42, 43]), *tensors(latents=noise([41, 42, 43]))]
    changed = triton.infer("digits", other, parameters={"num_steps": 4}).as_numpy("images")
    assert (changed[0] != found[0]).any()
    assert changed[1:].tobytes() == found[1:].tobytes()


def test_what_says_no_noise_is_answered_like_generate_without_a_seed(sampler, triton):
    found = triton.infer("digits", tensors(class_label=np.array([[3], [4]]))).as_numpy("images")
    with sampler.client() as client:
        wanted = client.generate("digits", class_labels=[3, 4])
    assert found.tobytes() == b"".join(picture.tobytes() for picture in wanted)


def test_later_draws_beside_latents_are_those_of_seed_0_and_the_place(sampler, triton):
    own = np.stack([unit_normal(0, index, 0, (1, 8, 8)) for index in range(3)])
    found = triton.infer("digits", latents([1, 2, 3], own), parameters={"num_steps": 4}).as_numpy("images")
    with sampler.client() as client:
        wanted = client.generate("digits", class_labels=[1, 2, 3], seed=0, num_steps=4)
    assert found.tobytes() == b"".join(picture.tobytes() for picture in wanted)


def test_triton_priority_and_timeout_are_honoured(triton):
    requested = [InferRequestedOutput("images")]
    triton.infer("digits", digits([1], [1]), outputs=requested, priority=2, timeout=10_000_000)
    with pytest.raises(InferenceServerException) as error:
        triton.infer("digits", digits([1], [1]), timeout=1)
    assert error.value.status() == "StatusCode.DEADLINE_EXCEEDED"


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (lambda: digits([11], [1]), "class label 11 is not allowed"),
        (lambda: digits([1, 2], [1]), "these must be equal"),
        (lambda: digits([1], [2**64 - 1]), "seed 18446744073709551615 is not allowed"),
        (lambda: tensors(seed=np.ones((1, 1), np.uint64)), "input 'class_label' is missing"),
        (
            lambda: tensors(sed=np.ones((1, 1), np.uint64)),
            "input 'sed' is not known; known: seed, latents, class_label",
        ),
        (lambda: [*digits([1], [1]), *digits([2], [1])], "is given twice"),
        (lambda: tensors(seed=np.ones((1, 1), np.int64)), "wanted is UINT64"),
        (lambda: tensors(seed=np.ones((1, 2), np.uint64)), r"wanted is UINT64 \[-1, 1\]"),
        (lambda: [*digits([1], [1]), *tensors(latents=noise([1, 2]))], "1 for seeds, 2 for latents"),
        (lambda: latents([1], noise([1])[..., :4]), r"wanted is FP32 \[-1, 1, 8, 8\]"),
        (lambda: latents([1, 2], noise([1])), "2 for class_labels, 1 for latents; these must be equal"),
        (lambda: latents([1], noise([1]) * np.nan), "latents hold NaN, infinity or a value beyond 100"),
        (lambda: latents([1], noise([1]) * np.inf), "latents hold NaN"),
        (lambda: latents([1], np.full((1, 1, 8, 8), 1e300)), "latents hold NaN, infinity"),
        (lambda: latents([1], np.full((1, 1, 8, 8), -101.0, np.float32)), "latents hold NaN"),
    ],
)
def test_a_bad_inference_says_what_is_wrong(triton, inputs, said):
    with pytest.raises(InferenceServerException, match=said) as error:
        triton.infer("digits", inputs())
    assert error.value.status() == "StatusCode.INVALID_ARGUMENT"


PROMPT = {"prompt": TensorSpec("prompt", "BYTES", (-1, 1))}


def prompts(*texts: bytes, raw: bytes | None = None) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest()
    tensor = request.inputs.add(name="prompt", datatype="BYTES", shape=[len(texts) or 1, 1])
    if raw is None:
        tensor.contents.bytes_contents.extend(texts)
    else:
        request.raw_input_contents.append(raw)
    return request


def test_prompts_are_read_from_raw_and_from_typed_contents():
    for request in (prompts(b"seven", "zw\u00f6lf".encode()), prompts(b"", b"", raw=RAW_PROMPTS)):
        assert read_inputs(request, PROMPT)["prompt"].ravel().tolist() == ["seven", "zw\u00f6lf"]


RAW_PROMPTS = b"\x05\x00\x00\x00seven\x06\x00\x00\x00zw\xc3\xb6lf"


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (RAW_PROMPTS[:-1], "ends within a text"),
        (RAW_PROMPTS[:11], "ends within a length"),
        (b"\x01\x00\x00\x00\xff", "not UTF-8"),
        (b"", "holds 0 values, its shape says 1"),
        (b"\xff\xff\xff\xff", "ends within a text"),
    ],
)
def test_a_broken_prompt_tensor_is_refused(raw, said):
    with pytest.raises(ConfigError, match=said):
        read_inputs(prompts(raw=raw), PROMPT)


def test_a_shape_that_claims_more_than_it_sends_is_refused():
    request = service_pb2.ModelInferRequest(raw_input_contents=[b"\0" * 8])
    request.inputs.add(name="seed", datatype="UINT64", shape=[2**62, 1])
    with pytest.raises(ConfigError, match="holds 1 values"):
        read_inputs(request, {"seed": TensorSpec("seed", "UINT64", (-1, 1))})


def test_an_unknown_model_output_or_parameter_is_refused(triton):
    with pytest.raises(InferenceServerException, match="did you mean 'digits'") as error:
        triton.infer("digitz", digits([1], [1]))
    assert error.value.status() == "StatusCode.NOT_FOUND"
    with pytest.raises(InferenceServerException, match="known: images"):
        triton.infer("digits", digits([1], [1]), outputs=[InferRequestedOutput("pictures")])
    with pytest.raises(InferenceServerException, match="num_steps = 'many' is not a whole number"):
        triton.infer("digits", digits([1], [1]), parameters={"num_steps": "many"})


def test_a_stream_answers_each_request_and_survives_a_wrong_one(triton):
    answers: queue.Queue = queue.Queue()
    triton.start_stream(lambda result, error: answers.put((result, error)))
    for label in (1, 99, 2):
        triton.async_stream_infer("digits", digits([label], [7]), request_id=str(label))
    first, wrong, last = (answers.get() for _ in range(3))
    triton.stop_stream()
    assert first[0].get_response().id == "1"
    assert "class label 99 is not allowed" in str(wrong[1])
    assert last[0].as_numpy("images").shape == (1, 8, 8, 1)


def test_the_repository_is_listed_loaded_and_unloaded(triton):
    triton.load_model("teacher")
    assert states(triton)["teacher"] == "READY"
    triton.unload_model("teacher")
    assert states(triton)["teacher"] == "UNAVAILABLE"
    with pytest.raises(InferenceServerException, match="no model is called 'nothing'"):
        triton.load_model("nothing")


def states(triton: InferenceServerClient) -> dict[str, str]:
    return {model.name: model.state for model in triton.get_model_repository_index().models}
