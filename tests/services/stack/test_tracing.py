"""OpenTelemetry: one trace over client, server and batch; nothing of it where no endpoint is set."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from distill_core.artifacts import ArtifactStore
from distill_core.errors import ConfigError
from distill_service import tracing
from distill_service.settings import load_settings
from distillery_sampler.client import AsyncSamplerClient
from distillery_sampler.engine.batcher import Batcher
from distillery_sampler.engine.statistics import ModelStats
from distillery_sampler.metrics import Metrics
from tests.services.sampler.helpers import SamplerProcess, publish_denoiser

pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc  # noqa: E402
from opentelemetry.sdk.trace import TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter  # noqa: E402

GENERATE = "/distillery.v1.SamplerService/Generate"


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP collector that remembers spans, by name."""

    def __init__(self) -> None:
        self.spans: dict[str, list] = {}
        self.services: set[str] = set()

    def Export(self, request, context):
        for resource in request.resource_spans:
            named = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
            self.services.add(named["service.name"])
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.setdefault(span.name, []).append(span)
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def receiver() -> Iterator[tuple[Receiver, str]]:
    server = grpc.server(ThreadPoolExecutor(2))
    servicer = Receiver()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"http://127.0.0.1:{port}"
    server.stop(None)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Tracing is on in this process; its spans are kept here."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_active", tracing.Tracing(provider))
    return exporter


def test_one_trace_goes_through_client_server_and_batch(receiver, recorded, tmp_path):
    collector, endpoint = receiver
    store = ArtifactStore(str(tmp_path / "store"))
    publish_denoiser(store, tmp_path / "model")
    with SamplerProcess(store.url, {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}) as sampler:
        with sampler.client() as client:
            client.generate("digits", class_labels=[1, 2])
            streamed = list(client.generate_stream("digits", class_labels=[1, 2]))
            with pytest.raises(ConfigError):
                client.generate("digits", class_labels=[99])
        asynchronous = asyncio.run(ask(sampler.address))
        with grpc.insecure_channel(sampler.address) as channel:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert sampler.stop() == 0  # which sends the last spans
    assert len(streamed) == 2
    assert len(asynchronous) == 1
    asked: dict[str, list] = {}
    for span in recorded.get_finished_spans():
        if span.status.is_ok:
            asked.setdefault(span.name, []).append(span)
    assert len(asked) == 2  # Generate and GenerateStream
    assert collector.services == {"distillery-sampler"}
    assert not [name for name in collector.spans if "Health" in name]

    good, bad, other = collector.spans[GENERATE]
    sent, third = (span.context for span in asked[GENERATE])
    assert other.trace_id.hex() == f"{third.trace_id:032x}"
    assert len({span.trace_id for span in collector.spans[GENERATE]}) == 3
    assert good.trace_id.hex() == f"{sent.trace_id:032x}"
    assert good.parent_span_id.hex() == f"{sent.span_id:016x}"
    batches = [span for span in collector.spans["batch"] if span.trace_id == good.trace_id]
    waits = [span for span in collector.spans["batch.wait"] if span.trace_id == good.trace_id]
    assert batches
    assert len(waits) == len(batches)
    for span in (*batches, *waits):
        assert span.parent_span_id == good.span_id
    for batch in batches:
        assert [link.span_id for link in batch.links] == [good.span_id]
        said = {pair.key: pair.value for pair in batch.attributes}
        assert said["model"].string_value == "digits"
        assert good.start_time_unix_nano <= batch.start_time_unix_nano <= batch.end_time_unix_nano
    assert sum(dict_of(batch)["images"] for batch in batches) == 2

    assert dict_of(bad)["rpc.grpc.status_code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    (refusal,) = [event for event in sampler.events if event.get("event") == "call refused"]
    assert refusal["trace_id"] == bad.trace_id.hex()
    assert refusal["request_id"]


async def ask(address: str) -> list:
    async with AsyncSamplerClient(address) as client:
        async with aclosing(client.generate_stream("digits", class_labels=[1, 2, 3])) as stream:
            async for _ in stream:
                break  # a traced stream can be left
        return await client.generate("digits", class_labels=[3])


def dict_of(span) -> dict[str, int]:
    """A span's whole numbers."""
    return {pair.key: pair.value.int_value for pair in span.attributes}


def test_a_batch_links_to_the_calls_of_all_its_images(recorded):
    provider = tracing.tracing().provider
    tracer = provider.get_tracer("test")

    async def run() -> None:
        gate = threading.Event()

        def device(_key: object, payloads: list[int]) -> list[int]:
            gate.wait()
            return payloads

        stats = ModelStats(Metrics(), ("digits", "1", "onnxruntime"))
        batcher = Batcher(device, stats, max_batch=4, max_queue=16)
        futures = batcher.submit("key", [0])  # outside any call: it occupies the device
        while batcher.queued:
            await asyncio.sleep(0)
        for name in ("first", "second"):
            with tracer.start_as_current_span(name):
                futures += batcher.submit("key", [1, 2])
        gate.set()
        await asyncio.gather(*futures)
        while "batch" not in {
            span.name for span in recorded.get_finished_spans()
        }:  # reported after its images
            await asyncio.sleep(0.001)
        await batcher.close()

    asyncio.run(run())
    spans: dict[str, list] = {}
    for span in recorded.get_finished_spans():
        spans.setdefault(span.name, []).append(span)
    (first,), (second,), (batch,) = spans["first"], spans["second"], spans["batch"]
    assert {link.context.span_id for link in batch.links} == {first.context.span_id, second.context.span_id}
    assert batch.parent.span_id == first.context.span_id
    assert batch.attributes["images"] == 4
    assert {span.parent.span_id for span in spans["batch.wait"]} == {
        first.context.span_id,
        second.context.span_id,
    }


def test_without_an_endpoint_nothing_of_opentelemetry_is_imported(monkeypatch):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    program = (
        "import sys; from distillery_sampler import server, client; from distill_service import tracing;"
        "client.SamplerClient(); print(tracing.start_tracing('sampler'),"
        "any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert found.stdout == "None False\n"


def test_an_endpoint_without_the_extra_is_one_sentence(monkeypatch):
    monkeypatch.setattr(tracing, "_active", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT is set.*\[otel\]"):
        tracing.start_tracing("sampler", load_settings(otlp_endpoint="http://127.0.0.1:4317"))
