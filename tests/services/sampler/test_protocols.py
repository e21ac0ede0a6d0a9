"""Both protocols are answered in full: every call, every kind of content, statistics that add up."""

import queue
import time

import grpc
import numpy as np
import pytest
from tritonclient.grpc import (
    InferenceServerClient,
    InferInput,
    InferRequestedOutput,
    service_pb2,
    service_pb2_grpc,
)
from tritonclient.utils import InferenceServerException

from distill_core.artifacts import ArtifactStore
from distill_core.errors import ConfigError
from distillery.v1 import models_pb2, sampler_pb2
from distillery_sampler.engine.statistics import RequestStats, current_request
from distillery_sampler.kserve.tensors import FLOATS, TensorSpec, read_inputs
from tests.services.sampler.helpers import SamplerProcess, executed, publish_denoiser, teacher_spec
from tests.services.sampler.test_kserve import digits, tensors

UNSERVED = {
    *(
        f"{kind}SharedMemory{what}"
        for kind in ("System", "Cuda")
        for what in ("Status", "Register", "Unregister")
    ),
    "TraceSetting",
    "LogSettings",
}
KSERVE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
OURS = [
    sampler_pb2.DESCRIPTOR.services_by_name["SamplerService"],
    models_pb2.DESCRIPTOR.services_by_name["ModelsService"],
]


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    root = tmp_path_factory.mktemp("protocols")
    store = ArtifactStore(root / "store")
    publish_denoiser(store, root / "student")
    publish_denoiser(store, root / "teacher", name="teacher", sampler=teacher_spec())
    settings = {"DISTILLERY_SAMPLER_INSTANCES": "1", "DISTILLERY_SAMPLER_MAX_BATCH": "4"}
    with SamplerProcess(str(root / "store"), settings) as process:
        yield process


@pytest.fixture(scope="module")
def triton(sampler):
    with InferenceServerClient(sampler.address) as client:
        yield client


def answer_to(address: str, method) -> tuple[str, str]:
    """The status and the sentence for an empty request, of any method that a descriptor names."""
    streams = {(False, False): "unary_unary", (False, True): "unary_stream", (True, True): "stream_stream"}
    kind = streams[method.client_streaming, method.server_streaming]
    with grpc.insecure_channel(address) as channel:
        call = getattr(channel, kind)(
            f"/{method.containing_service.full_name}/{method.name}",
            request_serializer=lambda _empty: b"",
            response_deserializer=bytes,
        )
        request = iter([None]) if method.client_streaming else None
        try:
            reply = call(request, timeout=240)
            if method.server_streaming:
                next(reply)
                reply.cancel()
        except grpc.RpcError as error:
            return error.code().name, error.details()
        return "OK", ""


@pytest.mark.parametrize(
    "method", [*KSERVE.methods, *(m for s in OURS for m in s.methods)], ids=lambda m: m.name
)
def test_every_call_of_the_protocols_is_answered(sampler, method):
    code, said = answer_to(sampler.address, method)
    if method.containing_service is KSERVE and method.name in UNSERVED:
        assert code == "UNIMPLEMENTED"
        assert said.startswith(f"{method.name} is not served here: ")
    else:
        assert code in ("OK", "INVALID_ARGUMENT", "NOT_FOUND"), said
    assert "\n" not in said
    assert "Unexpected" not in said


def statistics(triton: InferenceServerClient, name: str) -> service_pb2.ModelStatistics:
    return triton.get_inference_statistics(name).model_stats[0]


def test_statistics_are_those_of_the_requests_that_were_counted(sampler, triton):
    triton.load_model("teacher")
    began = time.time_ns() // 1_000_000
    with sampler.client(retries=0) as client:
        seconds = 0.0
        for labels in ([1], [1, 2, 3], [4, 5], [0] * 9):
            started = time.perf_counter()
            client.generate("teacher", class_labels=labels, num_steps=50)
            seconds += time.perf_counter() - started
        list(client.generate_stream("teacher", class_labels=[1], num_steps=50))
        with pytest.raises(ConfigError):
            client.generate("teacher", class_labels=[99])  # refused by its checks: no request of the model's
        with pytest.raises(ConfigError, match="not a picture"):
            client.generate("teacher", class_labels=[1], image=b"nor is this")
    packed = statistics(triton, "teacher").inference_stats.compute_output.ns
    triton.infer("teacher", digits([1, 2], [1, 2]), parameters={"num_steps": 50})
    assert statistics(triton, "teacher").inference_stats.compute_output.ns > packed  # in either protocol
    with pytest.raises(InferenceServerException):
        triton.infer("teacher", digits([1], [1]), timeout=1)  # over before it is queued
    stats = statistics(triton, "teacher")
    counts = stats.inference_stats
    assert stats.inference_count == 1 + 3 + 2 + 9 + 2 + 1
    answered = 6
    for name in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        assert getattr(counts, name).count == answered
    assert counts.fail.count == 1
    assert counts.fail.ns > 0
    assert counts.cache_hit.count == counts.cache_miss.count == 0
    sizes = {batch.batch_size: batch.compute_infer.count for batch in stats.batch_stats}
    assert stats.execution_count == sum(sizes.values())
    assert executed(sampler.address, "teacher") == stats.inference_count  # the expired one never ran
    assert sizes[4] >= 2
    assert max(sizes) == 4
    parts = [getattr(counts, f"compute_{name}").ns for name in ("input", "infer", "output")]
    assert min(parts[1:]) > 0
    assert counts.queue.ns + sum(parts) <= counts.success.ns
    assert counts.success.ns < 1e9 * (seconds + 60)
    assert began <= stats.last_inference <= time.time_ns() // 1_000_000


def test_statistics_are_asked_for_one_model_or_for_all_that_are_loaded(triton):
    triton.load_model("digits")
    triton.load_model("teacher")
    names = {stats.name for stats in triton.get_inference_statistics().model_stats}
    assert names == {"digits", "teacher"}
    assert statistics(triton, "digits").version == "1"
    with pytest.raises(InferenceServerException, match="no model is called"):
        triton.get_inference_statistics("nothing")


def test_times_are_parted_into_waiting_and_running_whatever_overlaps():
    stats = RequestStats()
    now = [100.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distillery_sampler.engine.statistics.time.perf_counter", lambda: now[0])
        with stats.request(3) as times:
            now[0] = 100.5
            times.queued()
            now[0] = 103.0
            times.ran(1.5, 1.0)  # waited 100.5 to 102, ran to 103
            times.ran(1.5, 1.0)  # its neighbour in the batch
            now[0] = 105.0
            times.ran(3.5, 1.0)  # waited while the first ran, then from 103 to 104
            times.packed(0.25)
        current_request().packed(0.5)
    assert (stats.success.count, stats.inferences) == (1, 3)
    assert stats.success.seconds == pytest.approx(5.5)
    assert stats.queue.seconds == pytest.approx(1.5 + 1.0)
    assert stats.compute_infer.seconds == pytest.approx(2.0)
    assert stats.compute_input.seconds == pytest.approx(0.5)
    assert stats.compute_output.seconds == pytest.approx(0.75)


def test_a_long_path_keeps_no_span_of_each_of_its_tiles():
    stats = RequestStats()
    now = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distillery_sampler.engine.statistics.time.perf_counter", lambda: now[0])
        with stats.request(1) as times:
            for _ in range(1000):
                now[0] += 3.0
                times.ran(1.0, 1.0)
    assert stats.compute_infer.seconds == pytest.approx(1000)
    assert stats.queue.seconds == pytest.approx(1000)
    assert len(times.run._spans) < 100


# -- contents and parameters

FLOAT = {"pose": TensorSpec("pose", "FP32", (-1, 2), accepts=FLOATS)}
NUMBERS = np.array([[0.5, -2.0]], np.float32)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_of_every_width_are_read_as_float32(dtype):
    (given,) = tensors(pose=NUMBERS.astype(dtype))
    request = service_pb2.ModelInferRequest(inputs=[given._get_tensor()])
    request.raw_input_contents.append(given._get_content())
    found = read_inputs(request, FLOAT)["pose"]
    assert found.dtype == np.float32
    assert np.array_equal(found, NUMBERS)


def typed(datatype: str, field: str) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest()
    tensor = request.inputs.add(name="pose", datatype=datatype, shape=[1, 2])
    getattr(tensor.contents, field).extend(NUMBERS.ravel().tolist())
    return request


def test_typed_contents_are_read_where_the_protocol_has_them():
    for datatype, field in (("FP32", "fp32_contents"), ("FP64", "fp64_contents")):
        assert np.array_equal(read_inputs(typed(datatype, field), FLOAT)["pose"], NUMBERS)
    with pytest.raises(ConfigError, match="FP16, which goes in raw_input_contents only"):
        read_inputs(typed("FP16", "fp32_contents"), FLOAT)
    both = typed("FP32", "fp32_contents")
    both.raw_input_contents.append(NUMBERS.tobytes())
    with pytest.raises(ConfigError, match="send one of them"):
        read_inputs(both, FLOAT)


def test_typed_contents_are_answered_like_raw_ones(sampler, triton):
    raw = triton.infer("digits", digits([3], [5])).as_numpy("images")
    request = service_pb2.ModelInferRequest(model_name="digits")
    seed = request.inputs.add(name="seed", datatype="UINT64", shape=[1, 1])
    seed.contents.uint64_contents.append(5)
    label = request.inputs.add(name="class_label", datatype="INT64", shape=[1, 1])
    label.contents.int64_contents.append(3)
    with grpc.insecure_channel(sampler.address) as channel:
        reply = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    assert reply.raw_output_contents[0] == raw.tobytes()


def test_guidance_comes_as_an_input_or_as_a_parameter(sampler, triton):
    def scaled(*values: float, labels=(1, 2), **options):
        scale = tensors(guidance_scale=np.array(values, np.float16)[:, None])
        return triton.infer("teacher", digits(list(labels), [1, 2]) + scale, **options).as_numpy("images")

    with sampler.client() as client:
        wanted = client.generate("teacher", class_labels=[1, 2], seeds=[1, 2], guidance=2.5)
    assert np.array_equal(scaled(2.5, 2.5), np.stack(wanted))
    by_name = triton.infer("teacher", digits([1, 2], [1, 2]), parameters={"guidance": 2.5})
    assert np.array_equal(by_name.as_numpy("images"), np.stack(wanted))
    with pytest.raises(InferenceServerException, match="these must be equal"):
        scaled(2.5, 3.0)
    with pytest.raises(InferenceServerException, match="give one"):
        scaled(2.5, 2.5, parameters={"guidance": 2.5})


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"num_step": 4}, "'num_step' is not known; did you mean 'num_steps'"),
        ({"width": 4}, "'width' is not known"),
        ({"num_steps": True}, "num_steps = True is not a whole number"),
        ({"guidance": "2"}, "guidance = '2' is not a number"),
        ({"num_steps": 1.5}, "num_steps = 1.5 is not a whole number"),
        ({"num_steps": float("nan")}, "num_steps = nan is not a whole number"),
    ],
)
def test_a_parameter_that_would_be_passed_over_or_rounded_is_refused(sampler, parameters, said):
    request = service_pb2.ModelInferRequest(model_name="digits")
    for name, value in parameters.items():
        kinds = {bool: "bool_param", str: "string_param", int: "int64_param", float: "double_param"}
        setattr(request.parameters[name], kinds[type(value)], value)
    with grpc.insecure_channel(sampler.address) as channel, pytest.raises(grpc.RpcError) as error:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    assert said in error.value.details()
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_negative_terms_shared_memory_and_overrides_are_refused_and_tritons_own_marks_are_not(triton):
    with pytest.raises(InferenceServerException, match="timeout = -1 is not allowed"):
        triton.infer("digits", digits([1], [1]), timeout=-1)
    outside = InferInput("seed", [1, 1], "UINT64")
    outside.set_shared_memory("region", 8)
    with pytest.raises(InferenceServerException, match="no shared memory here"):
        triton.infer("digits", [outside])
    with pytest.raises(
        InferenceServerException, match="'seed' has the parameters shared_memory.*no shared memory"
    ):
        triton.infer(
            "digits", [outside, *digits([1], [1])[1:]]
        )  # one of two: the other's content is in the message
    with pytest.raises(InferenceServerException, match="no classification here"):
        triton.infer("digits", digits([1], [1]), outputs=[InferRequestedOutput("images", class_count=2)])
    with pytest.raises(InferenceServerException, match="leave config and files out"):
        triton.load_model("digits", config='{"max_batch_size": 1}')
    answers: queue.Queue = queue.Queue()
    triton.start_stream(lambda result, error: answers.put((result, error)))
    triton.async_stream_infer("digits", digits([1], [1]), enable_empty_final_response=True)
    result, error = answers.get()
    triton.stop_stream()
    assert error is None
    assert len(result.as_numpy("images")) == 1
