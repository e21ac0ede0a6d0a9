"""Errors on the wire: a `DistilleryError` becomes a rich google.rpc status, and itself again in a client."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from distill_core.errors import (
    ERROR_CODES,
    ArtifactError,
    ConfigError,
    DistilleryError,
    NotFound,
    Overloaded,
    Unavailable,
    codes_of,
)

DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"  # gRPC clients with a retry policy wait exactly this long
DEFAULT_RETRY_S = 1.0
M = TypeVar("M", bound=Message)
DOMAIN = "distillery"  # whose class names the reason of an ErrorInfo is
CLASSES: dict[str, type[DistilleryError]] = {  # what a status means where no ErrorInfo says more
    "INVALID_ARGUMENT": ConfigError,
    "NOT_FOUND": NotFound,
    "FAILED_PRECONDITION": ArtifactError,
}
MAX_MESSAGE_BYTES = (
    1000  # it travels thrice in headers, and gRPC refuses answers with more than 8 KiB of them
)


class StatusError(DistilleryError):
    """A user's error whose gRPC status no class implies, e.g. `StatusError("UNAUTHENTICATED", "…")`."""

    def __init__(self, grpc_status: str, message: str, *, field: str | None = None) -> None:
        super().__init__(message, field=field)
        self.grpc_status = grpc_status


class WireStatus(NamedTuple):
    """Status as `context.abort_with_status` takes it."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


grpc.Status.register(WireStatus)


def status_name(error: DistilleryError) -> str:
    """The gRPC status of an error, e.g. `NOT_FOUND`: its own `grpc_status`, or its class's."""
    return getattr(error, "grpc_status", None) or codes_of(error).grpc_status


def shortened(text: str) -> str:
    """A sentence without its middle if a caller's own long value is in it."""
    data = text.encode(errors="replace")
    if len(data) <= MAX_MESSAGE_BYTES:
        return text
    half = MAX_MESSAGE_BYTES // 2 - 2
    return data[:half].decode(errors="ignore") + "…" + data[-half:].decode(errors="ignore")


def wire_status(error: DistilleryError) -> WireStatus:
    """The error as a status with machine-readable details; its sentence is also the plain message."""
    name, message = status_name(error), shortened(str(error))
    status = status_pb2.Status(code=code_pb2.Code.Value(name), message=message)
    for detail in [*_details(error, name, message), *_class_details(error, name)]:
        status.details.add().Pack(detail)
    metadata: list[tuple[str, str | bytes]] = [(DETAILS_KEY, status.SerializeToString())]
    if isinstance(error, Overloaded):
        metadata.append((PUSHBACK_KEY, str(max(1, math.ceil(error.retry_after_s * 1000)))))
    return WireStatus(grpc.StatusCode[name], message, tuple(metadata))


def _class_details(error: DistilleryError, name: str) -> list[Message]:
    """The error's class, where its status means another one first."""
    kind = next((cls for cls in type(error).__mro__ if cls in ERROR_CODES), DistilleryError)
    row = ERROR_CODES[kind]
    if row.grpc_status != name or row.retry or kind in (CLASSES.get(name), DistilleryError):
        return []
    return [error_details_pb2.ErrorInfo(reason=kind.__name__, domain=DOMAIN)]


def _details(error: DistilleryError, name: str, message: str) -> list[Message]:
    field = shortened(error.field or "")
    if isinstance(error, Overloaded):
        delay = Duration()
        delay.FromMicroseconds(round(error.retry_after_s * 1e6))
        return [error_details_pb2.RetryInfo(retry_delay=delay)]
    if name == "INVALID_ARGUMENT" and field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message)
        return [error_details_pb2.BadRequest(field_violations=[violation])]
    if name == "NOT_FOUND":
        return [error_details_pb2.ResourceInfo(resource_type=field, description=message)]
    if name == "FAILED_PRECONDITION":
        broken = error_details_pb2.PreconditionFailure.Violation(type=field, description=message)
        return [error_details_pb2.PreconditionFailure(violations=[broken])]
    return []


_HANDSHAKES = {  # what gRPC says of a connection that was not made, and what that is
    "WRONG_VERSION_NUMBER": "speaks no TLS; unset DISTILLERY_TLS_CA to ask it without",
    "CERTIFICATE_VERIFY_FAILED": "has a certificate that DISTILLERY_TLS_CA does not vouch for, or that names another "
    "host; give the file of the authority that signed it",
    "Socket closed": "hung up on this connection: if it speaks TLS, set DISTILLERY_TLS_CA to its authority's file, and "
    "DISTILLERY_TLS_CLIENT_CERT and DISTILLERY_TLS_CLIENT_KEY where it asks for a certificate",
}
_HANDSHAKES["Connection reset"] = _HANDSHAKES["Socket closed"]


def error_from_call(call: grpc.RpcError, address: str = "") -> DistilleryError:
    """The server's error as the exception it was there, so that client programs can act on it."""
    code, message = call.code(), call.details() or call.code().name
    if code is grpc.StatusCode.UNAVAILABLE:
        where = f" at {address}" if address else ""
        for hint, said in _HANDSHAKES.items():
            if "failed to connect" in message and hint in message:
                return Unavailable(f"the server{where} {said}")
        if not _no_server(message):
            return Unavailable(message)
        reason = message.rsplit("connect to remote host: ", 1)[-1]
        return Unavailable(
            f"no server answers{where} ({reason}); `distillery up` starts one, "
            "DISTILLERY_JOBS_PORT and DISTILLERY_SAMPLER_PORT say where to look"
        )
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Overloaded(message, retry_after_s=_retry_after(call))
    cls = _class(call) or CLASSES.get(code.name)
    return StatusError(code.name, message) if cls is None else cls(message, field=_field(call))


def _class(call: grpc.RpcError) -> type[DistilleryError] | None:
    """The class that the server raised, if it said so and the status is that of this class."""
    info = _unpacked(call, error_details_pb2.ErrorInfo)
    if info is None or info.domain != DOMAIN:
        return None
    known = {cls.__name__: cls for cls, row in ERROR_CODES.items() if row.grpc_status == call.code().name}
    found = known.get(info.reason)
    return found if found is not None and issubclass(found, DistilleryError) else None


@contextmanager
def errors_from(address: str) -> Iterator[None]:
    """Around calls to a server at `address`: what they raise as the exception that was raised there."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_from_call(error, address) from None


def _no_server(message: str) -> bool:
    return any(hint in message for hint in ("failed to connect", "Connection refused", "No such file", "DNS"))


def _unpacked(call: grpc.RpcError, kind: type[M]) -> M | None:
    status = rpc_status.from_call(call)
    for packed in status.details if status else ():
        detail = kind()
        if packed.Unpack(detail):
            return detail
    return None


def _field(call: grpc.RpcError) -> str | None:
    bad = _unpacked(call, error_details_pb2.BadRequest)
    if bad is not None and bad.field_violations:
        field: str = bad.field_violations[0].field
        return field
    missing = _unpacked(call, error_details_pb2.ResourceInfo)
    return (missing.resource_type or None) if missing is not None else None


def _retry_after(call: grpc.RpcError) -> float:
    info = _unpacked(call, error_details_pb2.RetryInfo)
    return info.retry_delay.ToMicroseconds() / 1e6 if info is not None else DEFAULT_RETRY_S
