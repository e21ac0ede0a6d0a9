"""Client channels: retries that obey the server's pushback, keepalive, tokens, TLS."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from distill_core.errors import ConfigError
from distill_service.addresses import checked, grpc_options, is_local
from distill_service.tracing import start_tracing

MAX_RETRIES = 4  # gRPC's own limit
_POLICY = {
    "initialBackoff": "0.1s",
    "maxBackoff": "5s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
}
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.per_rpc_retry_buffer_size", 64 * 2**20),  # by default a request over 256 KiB is never sent again
]


def _options(address: str, retries: int) -> list[tuple[str, Any]]:
    """A channel's options; refused calls are sent again when the server's pushback says, up to `retries` times."""
    if not 0 <= retries <= MAX_RETRIES:
        raise ConfigError(f"retries = {retries} is not allowed: give 0 to {MAX_RETRIES}", field="retries")
    options = [*_OPTIONS, *grpc_options(address)]
    if not retries:
        return [*options, ("grpc.enable_retries", 0)]
    policy = {"name": [{}], "retryPolicy": {"maxAttempts": retries + 1, **_POLICY}}
    config = json.dumps({"methodConfig": [policy]})
    return [*options, ("grpc.enable_retries", 1), ("grpc.service_config", config)]


def read_file(path: Path | None, field: str) -> bytes:
    """A TLS file's content; a `ConfigError` that names the setting if it cannot be read."""
    try:
        return Path(path or "").read_bytes()
    except OSError as error:
        raise ConfigError(f"{field} {path} cannot be read: {error.strerror}", field=field) from None


def channel(
    address: str,
    *,
    token: str | None = None,
    ca: Path | str | None = None,
    cert: Path | str | None = None,
    key: Path | str | None = None,
    retries: int = MAX_RETRIES,
    aio: bool = False,
) -> Any:
    """A `grpc.Channel` (`grpc.aio.Channel` with `aio=True`) to a Distillery server; TLS if `ca` is given.

    `cert` and `key` are the client's own certificate, for servers that ask for one. Calls that are refused as
    overloaded, or do not arrive, are sent again up to `retries` times, 0 to 4, within their deadline.

    A proxy of the environment is used for other machines alone.

    Raises:
        ConfigError: no address; a token would be sent unencrypted to another machine; a file cannot be read.
    """
    address = checked(address)
    if token and ca is None and not is_local(address):
        raise ConfigError(
            f"a token for {address} would travel unencrypted; set DISTILLERY_TLS_CA to the server's CA file",
            field="token",
        )
    credentials, options = _credentials(ca, cert, key), _options(address, retries)
    traced = start_tracing("client")
    if aio:
        interceptors = [kind(token) for kind in _AIO_KINDS] if token else []
        interceptors += traced.client_interceptors() if traced else []
        if credentials:
            return grpc.aio.secure_channel(address, credentials, options, interceptors=interceptors)
        return grpc.aio.insecure_channel(address, options, interceptors=interceptors)
    plain = (
        grpc.secure_channel(address, credentials, options)
        if credentials
        else grpc.insecure_channel(address, options)
    )
    plain = grpc.intercept_channel(plain, _Token(token)) if token else plain
    return traced.intercepted(plain) if traced else plain


def _credentials(
    ca: Path | str | None, cert: Path | str | None, key: Path | str | None
) -> grpc.ChannelCredentials | None:
    if (cert is None) != (key is None):
        raise ConfigError(
            "a client certificate and its key belong together; set DISTILLERY_TLS_CLIENT_CERT and "
            "DISTILLERY_TLS_CLIENT_KEY, or neither",
            field="cert",
        )
    if ca is None:
        if cert is not None:
            raise ConfigError(
                "a client certificate goes with TLS; set DISTILLERY_TLS_CA to the server's CA file too",
                field="ca",
            )
        return None
    if cert is None or key is None:
        return grpc.ssl_channel_credentials(read_file(Path(ca), "ca"))
    return grpc.ssl_channel_credentials(
        read_file(Path(ca), "ca"), read_file(Path(key), "key"), read_file(Path(cert), "cert")
    )


class _Details(NamedTuple):
    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


grpc.ClientCallDetails.register(_Details)


class _Token(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[misc]
    grpc.UnaryStreamClientInterceptor,  # type: ignore[misc]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[misc]
    grpc.StreamStreamClientInterceptor,  # type: ignore[misc]
):
    """Adds the bearer token to every call."""

    def __init__(self, token: str) -> None:
        self._header = ("authorization", f"Bearer {token}")

    def _call(self, continuation: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        metadata = [*(details.metadata or ()), self._header]
        with_token = _Details(
            details.method,
            details.timeout,
            metadata,
            details.credentials,
            details.wait_for_ready,
            getattr(details, "compression", None),
        )
        return continuation(with_token, request)

    intercept_unary_unary = intercept_unary_stream = _call
    intercept_stream_unary = intercept_stream_stream = _call


class _AioToken:
    def __init__(self, token: str) -> None:
        self._value = f"Bearer {token}"

    async def _call(self, continuation: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        metadata = grpc.aio.Metadata(*(details.metadata or ()))
        metadata.add("authorization", self._value)
        return await continuation(details._replace(metadata=metadata), request)


class _AioUnaryUnary(_AioToken, grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    intercept_unary_unary = _AioToken._call


class _AioUnaryStream(_AioToken, grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[misc]
    intercept_unary_stream = _AioToken._call


class _AioStreamUnary(_AioToken, grpc.aio.StreamUnaryClientInterceptor):  # type: ignore[misc]
    intercept_stream_unary = _AioToken._call


class _AioStreamStream(_AioToken, grpc.aio.StreamStreamClientInterceptor):  # type: ignore[misc]
    intercept_stream_stream = _AioToken._call


_AIO_KINDS = (_AioUnaryUnary, _AioUnaryStream, _AioStreamUnary, _AioStreamStream)
