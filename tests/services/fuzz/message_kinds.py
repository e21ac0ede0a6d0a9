"""Calls whose HTTP/2 is right and whose messages are not; and right ones in between, whose bytes must not change."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import grpc
import numpy as np
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2, service_pb2_grpc

from distillery.v1 import models_pb2, models_pb2_grpc, sampler_pb2, sampler_pb2_grpc

Draw = st.SearchStrategy[tuple[Any, frozenset[str]]]  # a request, and how it may end
CLASSES, SIDE, MAX_IMAGES, MAX_STEPS, MAX_LATENT = 10, 8, 256, 4, 100
OK, WRONG = frozenset({"OK"}), frozenset({"INVALID_ARGUMENT"})
NO_MODEL = frozenset({"NOT_FOUND", "INVALID_ARGUMENT"})
ANY = OK | NO_MODEL | {"RESOURCE_EXHAUSTED"}
_INT64, _INT32 = st.integers(-(2**63), 2**63 - 1), st.integers(-(2**31), 2**31 - 1)
_LABELS = st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=3)
_NAMES = st.text(st.characters(codec="utf-8"), max_size=80).filter(lambda name: "digits" not in name)


class Stubs:
    """One channel, no retries, so that a refusal is seen."""

    def __init__(self, address: str) -> None:
        options = [("grpc.enable_retries", 0), ("grpc.max_send_message_length", -1)]
        self.channel = grpc.insecure_channel(address, options)
        self.sampler = sampler_pb2_grpc.SamplerServiceStub(self.channel)
        self.models = models_pb2_grpc.ModelsServiceStub(self.channel)
        self.kserve = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)


def ended(call: Callable[[], Any]) -> str:
    """The status of a call."""
    try:
        call()
    except grpc.RpcError as error:
        return error.code().name
    except grpc.FutureCancelledError:
        return "CANCELLED"
    return "OK"


# -- distillery.v1 -----------------------------------------------------------------------------------------


def _outside(low: int, high: int, of: st.SearchStrategy[int]) -> st.SearchStrategy[int]:
    return of.filter(lambda value: not low <= value <= high)


_WRONG_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "class_labels": st.lists(_outside(0, CLASSES - 1, _INT64), min_size=1, max_size=4),
    "count": st.one_of(_outside(1, MAX_IMAGES, _INT32), st.integers(4, MAX_IMAGES)),  # labels are 3 at most
    "num_steps": _outside(1, MAX_STEPS, _INT32),
    "guidance": st.sampled_from([float("nan"), float("inf"), -1e300, 101.0]),
    "seeds": st.lists(st.integers(0, 2**64 - 1), min_size=4, max_size=9),
    "seed": st.integers(2**63, 2**64 - 1),
    "prompts": st.lists(st.text(st.characters(codec="utf-8"), max_size=3000), min_size=1, max_size=3),
    "negative_prompts": st.lists(st.text(st.characters(codec="utf-8"), max_size=9), min_size=1, max_size=3),
    "image_format": _outside(0, 9, _INT32),
    "priority": _outside(0, 2, _INT32),
    "image": st.builds(sampler_pb2.ImageInput, image=st.binary(max_size=99), mask=st.binary(max_size=99)),
}


@st.composite
def one_wrong_field(draw: st.DrawFn) -> tuple[Any, frozenset[str]]:
    """A right GenerateRequest but for one field."""
    name = draw(st.sampled_from(["model", *_WRONG_FIELDS]))
    values: dict[str, Any] = {"model": "digits", "class_labels": draw(_LABELS)}
    if name == "model":
        return sampler_pb2.GenerateRequest(**{**values, "model": draw(_NAMES)}), NO_MODEL
    return sampler_pb2.GenerateRequest(**{**values, name: draw(_WRONG_FIELDS[name])}), WRONG


@st.composite
def any_message(draw: st.DrawFn) -> tuple[Any, frozenset[str]]:
    """A GenerateRequest of any values."""
    values = {
        "model": st.one_of(st.sampled_from(["digits", "digits@1", "digits@latest"]), _NAMES),
        "class_labels": st.lists(st.one_of(st.integers(0, CLASSES - 1), _INT64), max_size=4),
        "prompts": st.lists(st.text(st.characters(codec="utf-8"), max_size=40), max_size=2),
        "count": st.none() | _INT32,
        "seed": st.integers(0, 2**64 - 1),
        "num_steps": st.none() | st.integers(-1, 6) | _INT32,
        "guidance": st.none() | st.floats(),
        "image_format": st.integers(-2, 9),
        "with_tensor": st.booleans(),
        "priority": st.integers(-1, 4),
    }
    return sampler_pb2.GenerateRequest(**{name: draw(value) for name, value in values.items()}), ANY


_VIEWS = st.builds(
    sampler_pb2.RenderRequest,
    model=st.sampled_from(["digits", "none", ""]),
    orbit=st.none() | st.builds(sampler_pb2.Orbit, radius=st.none() | st.floats(width=32)),
    options=st.builds(
        sampler_pb2.ViewOptions, width=_INT32, height=_INT32, outputs=st.lists(st.integers(0, 9))
    ),
)
views: Draw = _VIEWS.map(lambda request: (request, NO_MODEL))
names: Draw = _NAMES.map(lambda name: (models_pb2.GetModelRequest(model=name), NO_MODEL))


# -- KServe v2 ---------------------------------------------------------------------------------------------


@st.composite
def _tensor(draw: st.DrawFn, name: str, datatype: str, value: st.SearchStrategy[int], count: int) -> Any:
    """(input, raw bytes, whether they are right): `count` values, about which one thing may be a lie."""
    dtype = np.uint64 if datatype == "UINT64" else np.int64
    raw = np.array([draw(value) for _ in range(count)], dtype).tobytes()
    shape, lie = [count, 1], draw(st.sampled_from(["", "", "", "shape", "type", "bytes", "name"]))
    if lie == "shape":
        sizes = st.lists(
            st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 257, 2**31, 2**62, 2**63 - 1]), max_size=5
        )
        shape = draw(sizes.filter(lambda other: other != [count, 1]))
    elif lie == "type":
        known = ["INT32", "FP32", "FP16", "BYTES", "BOOL", "", "UINT64X", "uint64", "FP64", "UINT8"]
        datatype = draw(st.sampled_from(known))
    elif lie == "bytes":
        raw = draw(st.binary(max_size=64).filter(lambda other: len(other) != len(raw)))
    elif lie == "name":
        name = draw(st.text(st.characters(codec="utf-8"), max_size=9).filter(lambda other: other != name))
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape)
    return tensor, raw, not lie


@st.composite
def _latents(draw: st.DrawFn, count: int) -> Any:
    """As `_tensor`, of noise for `count` pictures: what is no finite number is a lie, too."""
    shape, value = [count, 1, SIDE, SIDE], draw(st.floats(width=32))
    values = np.full(shape, draw(st.floats(-3, 3)), np.float32)
    values.ravel()[draw(st.integers(0, values.size - 1))] = value
    lie = draw(st.sampled_from(["", "", "shape", "bytes"]))
    if lie == "shape":
        shape[draw(st.integers(0, 3))] += draw(st.sampled_from([-(2**40), -1, 1, 2**62]))
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="latents", datatype="FP32", shape=shape)
    return tensor, values.tobytes()[1 if lie == "bytes" else 0 :], not lie and abs(value) <= MAX_LATENT


@st.composite
def lying_tensors(draw: st.DrawFn) -> tuple[Any, frozenset[str]]:
    """A ModelInferRequest for `digits` whose tensors may lie about their shape, type, bytes or name."""
    count = draw(st.integers(1, 3))
    noise = draw(
        st.sampled_from([_latents(count), *[_tensor("seed", "UINT64", st.integers(0, 2**63 - 1), count)] * 3])
    )
    seed, seeds, right = draw(noise)
    other = count if draw(st.booleans()) else draw(st.integers(1, 3))
    label, labels, also = draw(_tensor("class_label", "INT64", st.integers(0, CLASSES - 1), other))
    request = service_pb2.ModelInferRequest(model_name="digits", inputs=[seed, label])
    request.raw_input_contents.extend([seeds, labels])
    right = right and also and count == other
    broken = draw(st.sampled_from(["", "", "", "output", "raw", "twice", "parameter"]))
    if broken == "output":
        request.outputs.add(name=draw(st.text(st.characters(codec="utf-8"), max_size=9)))
    elif broken == "raw":
        request.raw_input_contents.append(draw(st.binary(max_size=9)))
    elif broken == "twice":
        request.inputs.append(seed)
        request.raw_input_contents.append(seeds)
    elif broken == "parameter":
        request.parameters["num_steps"].int64_param = draw(_outside(1, MAX_STEPS, _INT64))
    return request, OK if right and not broken else WRONG


def stream_of(requests: list[tuple[Any, frozenset[str]]], stubs: Stubs) -> str:
    """ModelStreamInfer: one answer a request, in order, an error where one is due; then our half-close ends it."""
    wanted = [allowed == OK for _, allowed in requests]
    try:
        replies = stubs.kserve.ModelStreamInfer(iter([request for request, _ in requests]), timeout=20)
        answered = [not reply.error_message for reply in replies]
    except grpc.RpcError as error:
        return error.code().name
    return "OK" if answered == wanted else "WRONG ANSWERS"


# -- calls that end early ----------------------------------------------------------------------------------


def cancelled(stubs: Stubs, random: Random) -> str:
    """The caller leaves while the call waits, runs or is packed."""
    model, steps = random.choice([("digits", 1), ("slow", 60)])
    request = sampler_pb2.GenerateRequest(
        model=model, class_labels=[1] * random.randrange(1, 9), num_steps=steps
    )
    if random.random() < 0.5:
        call = stubs.sampler.Generate.future(request)
        time.sleep(random.random() / 100)
        call.cancel()
        return ended(call.result)
    stream = stubs.sampler.GenerateStream(sampler_pb2.GenerateStreamRequest(request=request))
    if random.random() < 0.5:
        next(stream, None)
    stream.cancel()
    return ended(partial(list, stream))


def late(stubs: Stubs, random: Random) -> str:
    """A deadline that cannot be met, or just so."""
    request = sampler_pb2.GenerateRequest(model="slow", class_labels=[1], num_steps=random.choice([20, 2000]))
    return ended(partial(stubs.sampler.Generate, request, timeout=random.choice([1e-4, 1e-3, 0.01, 0.03])))


# -- right calls -------------------------------------------------------------------------------------------


class Reference:
    """Calls whose answers are known from the start."""

    def __init__(self, stubs: Stubs) -> None:
        self._pictures = self._asked(stubs), self._inferred(stubs)
        assert self._pictures[0] == self._pictures[1]

    def _asked(self, stubs: Stubs) -> bytes:
        request = sampler_pb2.GenerateRequest(
            model="digits", class_labels=[1, 5], seeds=[7, 8], num_steps=1, image_format=1
        )
        return b"".join(image.data for image in stubs.sampler.Generate(request, timeout=20).images)

    def _inferred(self, stubs: Stubs) -> bytes:
        request = service_pb2.ModelInferRequest(model_name="digits")
        for name, datatype, values in (
            ("seed", "UINT64", np.array([7, 8], np.uint64)),
            ("class_label", "INT64", np.array([1, 5])),
        ):
            request.inputs.add(name=name, datatype=datatype, shape=[2, 1])
            request.raw_input_contents.append(values.tobytes())
        request.parameters["num_steps"].int64_param = 1
        return stubs.kserve.ModelInfer(request, timeout=20).raw_output_contents[0]

    def check(self, stubs: Stubs, random: Random) -> str:
        """Ask again, by one protocol or the other."""
        which = random.randrange(2)
        try:
            found = (self._asked, self._inferred)[which](stubs)
        except grpc.RpcError as error:
            return error.code().name
        return "OK" if found == self._pictures[which] else "WRONG BYTES"
