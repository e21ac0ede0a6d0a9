"""gRPC servers as every service here uses them: limits, tokens, TLS, rich errors, health, draining.

A servicer's methods are `async def`; they return messages and raise `DistilleryError`s, nothing else.
"""

from __future__ import annotations

import asyncio
import inspect
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as aio_health
from grpc_reflection.v1alpha import reflection
from pydantic import Field, model_validator
from structlog.contextvars import bind_contextvars

from distill_core.config import Config
from distill_core.errors import ConfigError, DistilleryError
from distill_service.addresses import check_host, is_loopback, joined
from distill_service.audit import AuditLog, target_of
from distill_service.auth import CALLER, Caller, Tokens, check_admin
from distill_service.channels import channel, read_file
from distill_service.status import StatusError, WireStatus, shortened, status_name, wire_status
from distill_service.tracing import tracing

__all__ = [
    "Health",
    "HealthServicer",
    "RpcSettings",
    "add_health_and_reflection",
    "bind",
    "build_server",
    "channel",
    "run_until_stopped",
]
OnCall = Callable[[str, str, float], None]  # (method, status name, seconds)
Handler = Callable[[Any, grpc.aio.ServicerContext], Any]
Reader = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]  # what a servicer takes: a message, or all
MAX_RECEIVE_BYTES = 64 * 2**20
UNLOGGED = ("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")  # refusals under load: metrics count them
HEALTH_PREFIX = "/grpc.health.v1.Health/"  # probes carry no token
_log = structlog.get_logger("distillery.rpc")


class Shed(NamedTuple):
    """Calls that are refused unread: those of `methods` for which `too_late` says why, given the seconds left."""

    methods: frozenset[str]
    too_late: Callable[[float], DistilleryError | None]


class RpcSettings(Config):
    """Address of a server, and who may call it."""

    host: str = "127.0.0.1"  # or unix:/path/to/socket
    port: int = Field(0, ge=0, le=65535)  # 0: any free port
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None  # given: clients must show a certificate signed by it
    tokens_file: Path | None = None
    audit_log: Path | None = None  # admin calls are appended here, beside their lines in the log
    max_concurrent: int = Field(1024, ge=1)  # calls in flight, the last fuse
    max_receive_bytes: int = Field(MAX_RECEIVE_BYTES, ge=1024)

    @model_validator(mode="after")
    def _secure(self) -> RpcSettings:
        check_host(self.host)
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together: give both or neither")
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        if self.tokens_file and not self.tls_cert and not is_loopback(self.host):
            raise ValueError(f"tokens on {self.host} would travel unencrypted: give tls_cert and tls_key too")
        return self

    @property
    def address(self) -> str:
        """Address that gRPC binds to."""
        return joined(self.host, self.port)


def build_server(
    settings: RpcSettings,
    *,
    admin_methods: frozenset[str] = frozenset(),
    on_call: OnCall | None = None,
    shed: Shed | None = None,
) -> grpc.aio.Server:
    """A server that authenticates, maps errors and reports each call; `run_until_stopped` binds it.

    What `shed` refuses is answered before its message is read: under overload that is what most calls are.
    """
    tokens = Tokens.read(settings.tokens_file) if settings.tokens_file else None
    options = [
        ("grpc.max_receive_message_length", settings.max_receive_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),  # else a second server on the same port takes half of the calls, silently
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_connection_age_ms", 30 * 60_000),
        ("grpc.max_connection_age_grace_ms", 60 * 60_000),
    ]
    traced = tracing()
    outer = [traced.server_interceptor()] if traced else []
    certified = settings.tls_client_ca is not None
    gate = _Gate(tokens, admin_methods, on_call, shed, AuditLog(settings.audit_log), certified)
    server = grpc.aio.server(
        interceptors=[*outer, gate],
        options=options,
        maximum_concurrent_rpcs=settings.max_concurrent,
    )
    # Methods are found by name: for one that is registered too, grpc.aio sets up a wait of its own at every call.
    server.add_registered_method_handlers = lambda service, handlers: None
    return server


class _Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Around each call: token, request id, error mapping, measurement."""

    def __init__(
        self,
        tokens: Tokens | None,
        admin_methods: frozenset[str],
        on_call: OnCall | None,
        shed: Shed | None,
        audit: AuditLog,
        certified: bool,
    ) -> None:
        self._tokens, self._admin_methods, self._certified = tokens, admin_methods, certified
        self._on_call, self._shed, self._audit = on_call, shed, audit
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        method = handler_call_details.method
        if method in self._handlers:
            return self._handlers[method]
        handler = await continuation(handler_call_details)
        if handler is None or method.startswith(HEALTH_PREFIX):
            return handler
        streams = handler.request_streaming, handler.response_streaming
        kind = "_".join("stream" if streaming else "unary" for streaming in streams)
        wrap = self._stream if handler.response_streaming else self._unary
        inner = getattr(handler, kind)
        # Requests are read here, all as streams: where gRPC reads the message of a unary call, one that is cut off is
        # never answered, and one that cannot be parsed with UNKNOWN and a traceback.
        build = grpc.stream_stream_rpc_method_handler if streams[1] else grpc.stream_unary_rpc_method_handler
        read = _pass if handler.request_streaming else _one_message
        wrapped = build(wrap(method, inner, read), handler.request_deserializer, handler.response_serializer)
        return self._handlers.setdefault(method, wrapped)

    def _unary(self, method: str, inner: Handler, read: Reader) -> Handler:
        async def call(requests: Any, context: grpc.aio.ServicerContext) -> Any:
            await self._refuse_early(method, context)
            with self._measured(method, context) as outcome:
                try:
                    request = await read(requests, context)
                    self._admit(method, request, context, outcome)
                    return await inner(request, context)
                except Exception as error:
                    await _answer(error, context, outcome)

        return call

    def _stream(self, method: str, inner: Handler, read: Reader) -> Handler:
        # An async generator, also for a call that is refused: gRPC answers UNKNOWN to anything else.
        async def call(requests: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            await self._refuse_early(method, context)
            with self._measured(method, context) as outcome:
                try:
                    request = await read(requests, context)
                    self._admit(method, request, context, outcome)
                    async with aclosing(inner(request, context)) as replies:
                        async for reply in replies:
                            yield reply
                except Exception as error:
                    await _answer(error, context, outcome)

        return call

    async def _refuse_early(self, method: str, context: grpc.aio.ServicerContext) -> None:
        """End a call that is shed. Whoever shows no token is told that, later, and not how long the queue is."""
        if self._shed is None or (
            self._tokens and not self._tokens.knows(context.invocation_metadata() or ())
        ):
            return
        started, seconds_left = time.perf_counter(), context.time_remaining()
        if seconds_left is None or method not in self._shed.methods:
            return
        error = self._shed.too_late(seconds_left)
        if error is None:
            return
        status = wire_status(error)
        if self._on_call:
            self._on_call(method, status.code.name, time.perf_counter() - started)
        await _abort(status, context)

    def _admit(self, method: str, request: Any, context: grpc.aio.ServicerContext, outcome: _Outcome) -> None:
        is_admin = method in self._admin_methods
        if is_admin:
            outcome.target = target_of(request)
        if self._tokens:
            CALLER.set(self._tokens.caller(context.invocation_metadata() or ()))
        if is_admin:
            check_admin(CALLER.get(), method)

    def _peer(self, context: grpc.aio.ServicerContext) -> Caller:
        """Caller before any token is read: the name in a client certificate, else the host."""
        names = context.auth_context().get("x509_common_name", ()) if self._certified else ()
        name = names[0].decode(errors="replace") if names else _peer_host(context.peer())
        return Caller(name, "use" if self._tokens else "admin")

    @contextmanager
    def _measured(self, method: str, context: grpc.aio.ServicerContext) -> Iterator[_Outcome]:
        CALLER.set(self._peer(context))
        started = time.perf_counter()
        outcome = _Outcome(f"{random.getrandbits(48):012x}")  # nosec B311: a name, no secret
        bind_contextvars(
            request_id=outcome.request_id, method=method
        )  # gRPC gives each call a context of its own
        try:
            yield outcome
            outcome.code = "OK"
        finally:
            if self._on_call:
                self._on_call(method, outcome.code, time.perf_counter() - started)
            if method in self._admin_methods:
                self._audit.record(
                    who=CALLER.get().name,
                    method=method,
                    target=outcome.target,
                    outcome=outcome.code,
                    request_id=outcome.request_id,
                )


@dataclass
class _Outcome:
    """Outcome of a call, and what the audit log wants to know of it."""

    request_id: str
    code: str = "CANCELLED"  # stays if the client leaves or its deadline passes
    target: str = ""


async def _pass(requests: Any, _context: grpc.aio.ServicerContext) -> Any:
    return requests


async def _one_message(_requests: Any, context: grpc.aio.ServicerContext) -> Any:
    request = await context.read()
    if request is grpc.aio.EOF:
        raise StatusError("INVALID_ARGUMENT", "the call ended before its message was whole; send one message")
    return request


def _peer_host(peer: str) -> str:
    return peer.rsplit(":", 1)[0] if peer.startswith(("ipv4:", "ipv6:")) else peer


async def _answer(error: Exception, context: grpc.aio.ServicerContext, outcome: _Outcome) -> None:
    """End the call with the error's status; always raises."""
    if isinstance(error, grpc.aio.AbortError):
        code = context.code()
        outcome.code = code.name if isinstance(code, grpc.StatusCode) else grpc.StatusCode(code).name
        raise error
    if isinstance(error, DecodeError):
        error = StatusError(
            "INVALID_ARGUMENT", "the message is none of this method's; compare the .proto files"
        )
    if not isinstance(error, DistilleryError):
        _log.exception("call failed", exc_info=error)
        error = StatusError("INTERNAL", f"internal error, request id {outcome.request_id}")
    outcome.code = status_name(error)
    if outcome.code not in UNLOGGED:
        _log.info("call refused", code=outcome.code, error=shortened(str(error)), field=error.field)
    await _abort(wire_status(error), context)


async def _abort(status: WireStatus, context: grpc.aio.ServicerContext) -> None:
    if tracing():
        context.set_code(status.code)  # its interceptor sees this, and not `abort_with_status`
    await context.abort_with_status(status)


class Health(aio_health.HealthServicer):  # type: ignore[misc]
    """grpc.health.v1 for a server's services, all in one state."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.names = tuple(names)

    @property
    def serving(self) -> bool:
        """State that the server as a whole reports."""
        return bool(self._server_status.get("") == health_pb2.HealthCheckResponse.SERVING)

    async def report(self, serving: bool) -> None:
        """Set every service, and the server as a whole, to SERVING or NOT_SERVING."""
        state = (
            health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", *self.names):
            await self.set(name, state)


HealthServicer = Health


def add_health_and_reflection(server: grpc.aio.Server, service_names: Iterable[str]) -> Health:
    """Serve grpc.health.v1 (NOT_SERVING until reported otherwise) and reflection for these services."""
    health = Health(service_names)
    for name in ("", *health.names):
        health._server_status[name] = health_pb2.HealthCheckResponse.NOT_SERVING  # `set` needs a running loop
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection(
        (*health.names, "grpc.health.v1.Health", reflection.SERVICE_NAME), server
    )
    return health


def bind(server: grpc.aio.Server, settings: RpcSettings) -> int:
    """Bind the server's port and return it.

    Raises:
        ConfigError: the port is taken or not allowed, or a TLS file cannot be read.
    """
    try:
        if settings.tls_cert is None:
            port: int = server.add_insecure_port(settings.address)
        else:
            port = server.add_secure_port(settings.address, _server_credentials(settings))
        return port
    except RuntimeError:
        raise ConfigError(
            f"cannot listen on {settings.address}: the port is in use, or this machine does not allow it; "
            "stop the other process or choose another port",
            field="port",
        ) from None


def _server_credentials(settings: RpcSettings) -> grpc.ServerCredentials:
    ca = read_file(settings.tls_client_ca, "tls_client_ca") if settings.tls_client_ca else None
    pair = (read_file(settings.tls_key, "tls_key"), read_file(settings.tls_cert, "tls_cert"))
    return grpc.ssl_server_credentials([pair], ca, require_client_auth=ca is not None)


async def _unless(stop: asyncio.Event, starting: asyncio.Future[Any]) -> None:
    """Wait for `starting`, which may take minutes, but give it up when the process is told to stop."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if starting.done():
        starting.result()
    starting.cancel()


async def run_until_stopped(
    server: grpc.aio.Server,
    settings: RpcSettings,
    health: Health,
    *,
    grace_s: float = 30,
    on_started: Callable[[int], Any] | None = None,
    ready: bool = True,
    stop: asyncio.Event | None = None,
) -> None:
    """Bind, serve, and on SIGTERM or SIGINT (or `stop`) finish the calls in flight within `grace_s`.

    `on_started` gets the port and may be async. With `ready=False` the caller reports SERVING itself.
    """
    port = bind(server, settings)
    stop = stop or asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await server.start()
    if ready:
        await health.report(True)
    _log.info("listening", address=settings.address, port=port)
    try:
        result = on_started(port) if on_started else None
        if inspect.isawaitable(result):
            await _unless(stop, asyncio.ensure_future(result))
        await stop.wait()
    finally:
        await health.enter_graceful_shutdown()
        await server.stop(grace_s)
        _log.info("stopped")
