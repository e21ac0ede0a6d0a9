"""The client for ordinary, threaded programs."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, Unpack

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from distill_core.errors import Unavailable
from distill_service.channels import MAX_RETRIES, channel
from distill_service.status import error_from_call, errors_from
from distillery.v1 import models_pb2, models_pb2_grpc, sampler_pb2, sampler_pb2_grpc
from distillery_sampler.client.limits import Limits
from distillery_sampler.client.messages import (
    GenerateOptions,
    OnSummary,
    SeenView,
    ViewOptions,
    improved,
    orbit,
    outputs_of,
    path_request,
    picture_from,
    predict_request,
    progressive_request,
    raw_request,
    render_request,
    seen,
    warn_of_cut_prompts,
)

DEFAULT_ADDRESS = "127.0.0.1:50052"
DEFAULT_TIMEOUT_S = 60.0
WAIT_S = 0.1  # between two looks at a sampler that breaks off
SERVICE = "distillery.v1.SamplerService"


class SamplerClient:
    """Calls raise the `DistilleryError` that the server raised. Safe to use from several threads.

    `address` is host:port or unix:/path; `ca`, `cert` and `key` are PEM files: the authority to trust, which turns TLS
    on, and the client's own certificate where the server asks for one. A call that the server refuses as overloaded, or
    that does not reach it, is sent again up to `retries` times (0 to 4), when the server said it should be, else after
    0.1 s, 0.2 s, …; all within `timeout_s`, which each call may override. Where it refuses even so, no more calls at
    once are sent than it takes; one above that ends with `Overloaded` at once.

    Raises:
        ConfigError: a file cannot be read, or a token would travel unencrypted.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        token: str | None = None,
        ca: Path | str | None = None,
        cert: Path | str | None = None,
        key: Path | str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retries: int = MAX_RETRIES,
    ) -> None:
        self.address, self.timeout_s = address, timeout_s
        self._limits = Limits(address)
        self._channel = channel(address, token=token, ca=ca, cert=cert, key=key, retries=retries)
        self._sampler = sampler_pb2_grpc.SamplerServiceStub(self._channel)
        self._models = models_pb2_grpc.ModelsServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls in flight end with CANCELLED."""
        self._channel.close()

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return as soon as the sampler reports SERVING: its preloaded models are warm.

        Raises:
            Unavailable: it did not within `timeout_s`.
        """
        until = time.monotonic() + timeout_s
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        while (left := until - time.monotonic()) > 0:
            call = self._health.Watch(request, timeout=left, wait_for_ready=True)
            try:
                for reply in call:
                    if reply.status == health_pb2.HealthCheckResponse.SERVING:
                        return
            except grpc.RpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise error_from_call(error, self.address) from None
                time.sleep(WAIT_S)
            finally:
                call.cancel()
        raise not_ready(self.address, timeout_s)

    def generate(
        self,
        model: str,
        *,
        timeout_s: float | None = None,
        on_summary: OnSummary = warn_of_cut_prompts,
        **options: Unpack[GenerateOptions],
    ) -> list[np.ndarray]:
        """Pictures uint8 (H, W, C), in the order of the conditions; `to_pil` makes PIL images of them.

        `on_summary` hears how it went; unset, it warns of prompts whose end the model does not read.
        """
        reply = self.call_generate(raw_request(model, options), timeout_s=timeout_s)
        on_summary(reply.summary)
        return [picture_from(image) for image in reply.images]

    def call_generate(
        self, request: sampler_pb2.GenerateRequest, *, timeout_s: float | None = None
    ) -> sampler_pb2.GenerateResponse:
        """Generate with the messages themselves: encoded bytes, the float tensor, the summary."""
        seconds = self._seconds(timeout_s)
        with self._calling(request.model, seconds):
            response: sampler_pb2.GenerateResponse = self._sampler.Generate(request, timeout=seconds)
            return response

    def generate_stream(
        self,
        model: str,
        *,
        timeout_s: float | None = None,
        on_summary: OnSummary = warn_of_cut_prompts,
        **options: Unpack[GenerateOptions],
    ) -> Generator[tuple[int, np.ndarray], None, None]:
        """(index, picture) pairs, each as soon as it is ready. Close the iterator to cancel what is left."""
        request = sampler_pb2.GenerateStreamRequest(request=raw_request(model, options))
        for reply in self._read(self._sampler.GenerateStream, request, self._seconds(timeout_s), model):
            if reply.HasField("image"):
                yield reply.image.index, picture_from(reply.image)
            else:
                on_summary(reply.summary)

    def render(
        self,
        model: str,
        *,
        azimuth: float = 0.0,
        elevation: float = 30.0,
        radius: float | None = None,
        pose: Any = None,
        timeout_s: float | None = None,
        **options: Unpack[ViewOptions],
    ) -> SeenView:
        """One view of a scene, from a camera on an orbit (degrees) or at a `pose`, camera-to-world (4, 4)."""
        request = render_request(model, orbit(azimuth, elevation, radius), pose, options)
        seconds = self._seconds(timeout_s)
        with self._calling(model, seconds):
            return seen(self._sampler.Render(request, timeout=seconds).view)

    def render_path(
        self,
        model: str,
        *,
        count: int = 60,
        elevation: float = 30.0,
        radius: float | None = None,
        degrees: float = 360.0,
        poses: Iterable[Any] | None = None,
        timeout_s: float | None = None,
        **options: Unpack[ViewOptions],
    ) -> Generator[SeenView, None, None]:
        """The views of an orbit of `count` cameras, or of `poses`, in order, rendered no faster than they are read.

        A path may take long, so it has no deadline unless `timeout_s` is given. Close the iterator to end it.
        """
        start = sampler_pb2.OrbitPath(count=count, start=orbit(0.0, elevation, radius), degrees=degrees)
        request = path_request(model, start, poses, options)
        for reply in self._read(self._sampler.RenderPath, request, timeout_s, model):
            if reply.HasField("view"):
                yield seen(reply.view)

    def render_progressive(
        self,
        model: str,
        *,
        azimuth: float = 0.0,
        elevation: float = 30.0,
        radius: float | None = None,
        pose: Any = None,
        timeout_s: float | None = None,
        **options: Unpack[ViewOptions],
    ) -> Generator[SeenView, None, None]:
        """One view, better each time: a small one enlarged, then with more and more of the tiles of `render`'s.

        The last one is `render`'s, bit for bit unless `image_format` is JPEG. Close the iterator to stop rendering.
        """
        request = progressive_request(model, orbit(azimuth, elevation, radius), pose, options)
        shown: SeenView | None = None
        for reply in self._read(self._sampler.RenderPath, request, self._seconds(timeout_s), model):
            if reply.HasField("view"):
                shown = improved(shown, reply.view, request.options)
                yield shown

    def predict(
        self,
        model: str,
        function: str = "",
        *,
        timeout_s: float | None = None,
        bulk: bool = False,
        **arrays: Any,
    ) -> dict[str, np.ndarray]:
        """Outputs (B, …) by name of one of a model's functions, "" its first, for `arrays` (B, …) by input.

        `sampler.predict("digits-student", image=batch)["logits"]`; `sampler.model(ref).functions` says what there is.
        `bulk` waits while others' interactive requests wait.
        """
        request = predict_request(model, function, arrays, bulk=bulk)
        return outputs_of(self.call_predict(request, timeout_s=timeout_s))

    def call_predict(
        self, request: sampler_pb2.PredictRequest, *, timeout_s: float | None = None
    ) -> sampler_pb2.PredictResponse:
        """Predict with the messages themselves: tensors, and the summary."""
        seconds = self._seconds(timeout_s)
        with self._calling(request.model, seconds):
            response: sampler_pb2.PredictResponse = self._sampler.Predict(request, timeout=seconds)
            return response

    def models(self, *, all_versions: bool = False) -> list[models_pb2.Model]:
        """The models of the sampler's store, and which are loaded."""
        with errors_from(self.address):
            request = models_pb2.ListModelsRequest(all_versions=all_versions)
            return list(self._models.ListModels(request, timeout=self.timeout_s).models)

    def model(self, ref: str) -> models_pb2.Model:
        """One version."""
        with errors_from(self.address):
            served: models_pb2.Model = self._models.GetModel(
                models_pb2.GetModelRequest(model=ref), timeout=self.timeout_s
            ).model
            return served

    def load(self, ref: str) -> models_pb2.Model:
        """Load a version now; needs an admin token where tokens are used."""
        with errors_from(self.address):
            request = models_pb2.LoadModelRequest(model=ref)
            loaded: models_pb2.Model = self._models.LoadModel(request, timeout=self.timeout_s).model
            return loaded

    def unload(self, ref: str) -> None:
        """Free a version's memory; needs an admin token where tokens are used."""
        with errors_from(self.address):
            self._models.UnloadModel(models_pb2.UnloadModelRequest(model=ref), timeout=self.timeout_s)

    def watch_models(self) -> Generator[models_pb2.Model, None, None]:
        """Every model's state, then each change, until the iterator is closed."""
        for reply in self._read(self._models.WatchModels, models_pb2.WatchModelsRequest()):
            yield reply.model

    def _seconds(self, timeout_s: float | None) -> float:
        return self.timeout_s if timeout_s is None else timeout_s

    @contextmanager
    def _calling(self, model: str, seconds: float | None) -> Iterator[None]:
        """Around a call to a model's queue."""
        with errors_from(self.address), self._limits.call(model, seconds):
            yield

    def _read(
        self, method: Any, request: Any, seconds: float | None = None, model: str | None = None
    ) -> Generator[Any, None, None]:
        """A stream's messages, each fetched when it is asked for; the call is cancelled when nobody asks any more."""
        with errors_from(self.address) if model is None else self._calling(model, seconds):
            call = method(request, timeout=seconds)
            try:
                yield from call
            finally:
                call.cancel()


def not_ready(address: str, timeout_s: float) -> Unavailable:
    """The error of a sampler that does not become ready."""
    return Unavailable(
        f"no sampler at {address} reported SERVING within {timeout_s:g} s; its log says what it waits for, "
        "and `distillery health` what it answers"
    )
