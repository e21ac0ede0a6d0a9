"""A raw HTTP/2 client: what it sends is right only if it is told so. Each call is one connection."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from typing import Self

import h2.connection
import h2.events
from grpc import StatusCode
from h2.config import H2Configuration
from h2.exceptions import ProtocolError

WAIT_S = 10.0
FRAME = 16_384  # the most that one frame holds unless the server allows more
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
EMPTY_SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_STATUS = {str(code.value[0]): code.name for code in StatusCode}
GENERATE = "/distillery.v1.SamplerService/Generate"
STREAM = "/distillery.v1.SamplerService/GenerateStream"


def headers(path: str = GENERATE, *more: tuple[str, str], **changed: str | None) -> list[tuple[str, str]]:
    """The headers of a gRPC call; `changed` by name with _ for -, None leaves one out."""
    usual: dict[str, str | None] = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "sampler",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    for name, value in changed.items():
        usual[{"method": ":method", "scheme": ":scheme"}.get(name, name.replace("_", "-"))] = value
    return [(name, value) for name, value in usual.items() if value is not None] + list(more)


def framed(message: bytes, *, flag: int = 0, length: int | None = None) -> bytes:
    """A message as gRPC puts it on a stream: flag, length, bytes."""
    return struct.pack(">BI", flag, len(message) if length is None else length) + message


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """An HTTP/2 frame, as wrong as one likes."""
    size = len(payload) if length is None else length
    return struct.pack(">I", size)[1:] + struct.pack(">BBI", kind, flags, stream) + payload


class Raw:
    """One connection. `status()` says how its call ended: a gRPC status, HTTP_415, RESET, GOAWAY, CLOSED, SILENT."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # no TIME_WAIT
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        config = H2Configuration(
            client_side=True,
            header_encoding="utf-8",
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
            validate_inbound_headers=False,
        )
        self.http2 = h2.connection.H2Connection(config)
        self._http = self._found = ""  # the statuses seen so far

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def greet(self) -> None:
        """Preface and settings."""
        self.http2.initiate_connection()
        self.flush()

    def flush(self) -> None:
        """Send what h2 has prepared."""
        self.send(self.http2.data_to_send())

    def send(self, data: bytes) -> None:
        """Send bytes as they are; a server that has hung up is no news."""
        with contextlib.suppress(OSError):
            self.socket.sendall(data)

    def call(self, *parts: bytes, given: list[tuple[str, str]] | None = None, end: bool = True) -> int:
        """Open a stream, send `parts` (64 KiB at most) as its data and, with `end`, half-close it."""
        stream = self.http2.get_next_available_stream_id()
        self.http2.send_headers(stream, given or headers(), end_stream=end and not parts)
        for index, part in enumerate(parts):
            last = end and index == len(parts) - 1
            for at in range(0, max(len(part), 1), FRAME):
                self.http2.send_data(
                    stream, part[at : at + FRAME], end_stream=last and at + FRAME >= len(part)
                )
        self.flush()
        return stream

    def reset(self, stream: int) -> None:
        """RST_STREAM."""
        try:
            self.http2.reset_stream(stream, 8)
        except ProtocolError:
            return  # the server was faster
        self.flush()

    def status(self, wait_s: float = WAIT_S) -> str:
        """Read until the call or the connection ended."""
        deadline = time.monotonic() + wait_s
        while (left := deadline - time.monotonic()) > 0:
            self.socket.settimeout(left)
            try:
                data = self.socket.recv(65_536)
            except TimeoutError:
                return "SILENT"
            except OSError:
                return "CLOSED"
            if not data:
                return "CLOSED"
            try:
                events = self.http2.receive_data(data)
            except ProtocolError:
                return "GOAWAY"  # h2 refuses whatever follows our own breach
            for event in events:
                if end := self._end(event):
                    return end
            self.flush()
        return "SILENT"

    def _end(self, event: h2.events.Event) -> str:
        """How the call ended, if this event ends it."""
        if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
            got = dict(event.headers)
            self._http = got.get(":status", self._http)
            self._found = _STATUS.get(got.get("grpc-status", ""), self._found)
        elif isinstance(event, h2.events.DataReceived):
            self.http2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            return self._found or f"HTTP_{self._http}"
        elif isinstance(event, h2.events.StreamReset):
            return self._found or (f"HTTP_{self._http}" if self._http not in ("", "200") else "RESET")
        elif isinstance(event, h2.events.ConnectionTerminated) and event.error_code:
            return "GOAWAY"
        return ""
