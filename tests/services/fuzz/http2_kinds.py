"""Calls that break HTTP/2, gRPC's framing of messages, or the manners of a stream."""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable
from random import Random

from distillery.v1 import sampler_pb2
from tests.services.fuzz.raw import (
    EMPTY_SETTINGS,
    GENERATE,
    PREFACE,
    STREAM,
    Raw,
    frame,
    framed,
    headers,
)

DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, END_HEADERS = 1, 4
ASKED = sampler_pb2.GenerateRequest(model="digits", class_labels=[3], seed=1).SerializeToString()
STREAMED = sampler_pb2.GenerateStreamRequest(
    request=sampler_pb2.GenerateRequest(model="slow", class_labels=[3] * 64, num_steps=20, image_format=1)
).SerializeToString()
SLOW = sampler_pb2.GenerateRequest(model="slow", class_labels=[3], num_steps=100).SerializeToString()
MAX_MESSAGE = 64 * 2**20
BOMB = gzip.compress(bytes(MAX_MESSAGE + 1), 9)[:65_500]  # the end of it is not needed

Call = Callable[[int, Random], str]  # (port, random) -> how it ended


# -- gRPC framing ------------------------------------------------------------------------------------------


def _sent(*parts: bytes, given: list[tuple[str, str]] | None = None, end: bool = True) -> Call:
    def call(port: int, _random: Random) -> str:
        with Raw(port) as raw:
            raw.greet()
            raw.call(*parts, given=given, end=end)
            return raw.status()

    return call


def truncated(port: int, random: Random) -> str:
    """The stream ends within a message."""
    whole = framed(ASKED)
    return _sent(whole[: random.randrange(1, len(whole))])(port, random)


def in_pieces(port: int, random: Random) -> str:
    """A right message, in frames of any size, empty ones too."""
    whole, at, parts = framed(ASKED), 0, []
    while at < len(whole):
        size = random.randrange(0, 8)
        parts.append(whole[at : at + size])
        at += size
    return _sent(*parts, b"")(port, random)


def trailing(port: int, random: Random) -> str:
    """Bytes after the one message of a unary call."""
    return _sent(framed(ASKED) + random.randbytes(random.randrange(1, 40)))(port, random)


def garbage_message(port: int, random: Random) -> str:
    """Bytes that are no protobuf message: a field of the reserved wire type 7."""
    return _sent(framed(b"\x0f" + random.randbytes(random.randrange(0, 60))))(port, random)


def bad_flag(port: int, random: Random) -> str:
    """A compression flag that does not exist."""
    return _sent(framed(ASKED, flag=random.randrange(2, 256)))(port, random)


def too_long(port: int, random: Random) -> str:
    """A length above the limit; the bytes never come."""
    length = random.choice([MAX_MESSAGE + 1, 2**31, 2**32 - 1])
    return _sent(framed(b"", length=length), end=False)(port, random)


def gzip_bomb(port: int, random: Random) -> str:
    """A small message that would be larger than allowed once unpacked."""
    return _sent(framed(BOMB, flag=1), given=headers(grpc_encoding="gzip"))(port, random)


def broken_gzip(port: int, random: Random) -> str:
    """Bytes that are said to be gzip."""
    return _sent(framed(random.randbytes(30), flag=1), given=headers(grpc_encoding="gzip"))(port, random)


# -- headers -----------------------------------------------------------------------------------------------


def content_type(port: int, random: Random) -> str:
    """Not gRPC, by its own words."""
    kind = random.choice(["text/html", "application/json", "", "application/grp", "multipart/form-data"])
    return _sent(framed(ASKED), given=headers(content_type=kind))(port, random)


def unknown_path(port: int, random: Random) -> str:
    """No such method."""
    path = random.choice(
        ["/", "", "/x", "nothing", GENERATE + "2", "/a/b/c", "/" + "x" * 2000, "/%00/\u00e9"]
    )
    return _sent(framed(ASKED), given=headers(path))(port, random)


def verb(port: int, random: Random) -> str:
    """Not a POST."""
    return _sent(framed(ASKED), given=headers(method=random.choice(["GET", "PUT", "DELETE", "x"])))(
        port, random
    )


def odd_header(port: int, random: Random) -> str:
    """Names and values that HTTP/2 or gRPC forbid."""
    more = random.choice(
        [
            ("Upper", "case"),
            ("nul", "a\x00b"),
            ("line", "a\r\nb: c"),
            ("thing-bin", "%%% no base64"),
            ("connection", "close"),
            (":path", "/again"),
            (":made-up", "x"),
            ("", "nameless"),
            ("grpc-timeout", "soon"),
            ("grpc-timeout", "-5S"),
            ("grpc-timeout", "99999999999999999999H"),
            ("grpc-encoding", "zip"),
            ("authorization", "Bearer " + "x" * 500),
        ]
    )
    return _sent(framed(ASKED), given=headers(GENERATE, more))(port, random)


def missing_header(port: int, random: Random) -> str:
    """Without one that must be there."""
    given = headers()
    del given[random.choice([0, 1, 2])]
    return _sent(framed(ASKED), given=given)(port, random)


def header_flood(port: int, random: Random) -> str:
    """More metadata than a server should keep."""
    if random.random() < 0.5:
        more = [(f"flood-{index}", "x" * 500) for index in range(200)]
    else:
        more = [("flood", "x" * 100_000)]
    given = headers(GENERATE, *more)
    with Raw(port) as raw:
        raw.greet()
        raw.status(0.02)  # let the server's settings come: h2 obeys its limit on frames
        raw.call(framed(ASKED), given=given)
        return raw.status()


def continuation_flood(port: int, random: Random) -> str:
    """A header block that never ends."""
    with Raw(port) as raw:
        raw.send(PREFACE + EMPTY_SETTINGS + frame(HEADERS, 0, 1, b"\x83\x86"))
        part = frame(CONTINUATION, 0, 1, b"\x00\x01a\x7f\x80\x01" + b"x" * 255)
        for _ in range(40):
            raw.send(part * 50)
        return raw.status()


# -- streams -----------------------------------------------------------------------------------------------


def half_closed(port: int, random: Random) -> str:
    """The caller is done before it said anything."""
    return _sent(given=headers(random.choice([GENERATE, STREAM])))(port, random)


def left_open(port: int, random: Random) -> str:
    """Half a request, then a deadline that passes."""
    part = framed(ASKED)[: random.randrange(0, 10)]
    return _sent(part, given=headers(grpc_timeout="50m"), end=False)(port, random)


def slow_body(port: int, random: Random) -> str:
    """A byte now and then, until the deadline."""
    with Raw(port) as raw:
        raw.greet()
        stream = raw.call(given=headers(grpc_timeout="120m"), end=False)
        for byte in framed(ASKED)[:6]:
            time.sleep(0.03)
            raw.http2.send_data(stream, bytes([byte]))
            raw.flush()
        return raw.status()


def reset(port: int, random: Random) -> str:
    """RST_STREAM somewhere; the connection must live on: the next call on it is answered."""
    with Raw(port) as raw:
        raw.greet()
        sent = framed(SLOW if random.random() < 0.5 else ASKED)
        cut = random.randrange(0, len(sent) + 1)
        stream = raw.call(sent[:cut], end=cut == len(sent))
        if random.random() < 0.3:
            time.sleep(random.random() / 100)
        raw.reset(stream)
        raw.call(framed(ASKED))
        return raw.status()


def rapid_reset(port: int, random: Random) -> str:
    """Streams opened and reset at once, many of them."""
    with Raw(port) as raw:
        raw.greet()
        try:
            for _ in range(100):
                raw.reset(raw.call(framed(ASKED)))
        except Exception:  # h2's own bookkeeping of a connection that is going away
            return raw.status()
        raw.call(framed(ASKED))
        return raw.status()


def hung_up(port: int, random: Random) -> str:
    """The connection is gone while the call runs."""
    with Raw(port) as raw:
        raw.greet()
        raw.call(framed(random.choice([ASKED, SLOW])), end=random.random() < 0.5)
        if random.random() < 0.3:
            time.sleep(random.random() / 100)
    return "LEFT"


def unread_stream(port: int, random: Random) -> str:
    """A stream of pictures that the caller does not read: no window for them."""
    with Raw(port) as raw:
        raw.greet()
        raw.send(frame(SETTINGS, 0, 0, b"\x00\x04" + bytes(4)))  # a window of 0; h2 knows nothing of it
        raw.call(framed(STREAMED), given=headers(STREAM, grpc_timeout="100m"))
        return raw.status()


# -- connections -------------------------------------------------------------------------------------------


def no_http2(port: int, random: Random) -> str:
    """Another protocol, or none."""
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
    said = [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", hello + random.randbytes(500), random.randbytes(300)]
    with Raw(port) as raw:
        raw.send(random.choice(said))
        return raw.status()


_BREACHES = (
    frame(DATA, 0, 0, b"data on stream 0"),
    frame(DATA, 0, 1, b"data on an idle stream"),
    frame(HEADERS, END_HEADERS, 2, b"\x83"),
    frame(HEADERS, END_HEADERS, 0, b"\x83"),
    frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff"),
    frame(HEADERS, 0, 1, b"\x83") + frame(PING, 0, 0, bytes(8)),
    frame(CONTINUATION, END_HEADERS, 1, b"\x83"),
    frame(RST, 0, 0, bytes(4)),
    frame(RST, 0, 1, bytes(3)),
    frame(SETTINGS, 0, 0, bytes(5)),
    frame(SETTINGS, 1, 0, bytes(6)),
    frame(SETTINGS, 0, 0, b"\x00\x04\xff\xff\xff\xff"),
    frame(PING, 0, 0, bytes(7)),
    frame(WINDOW, 0, 0, bytes(3)),
    frame(WINDOW, 0, 0, bytes(4)),
    frame(WINDOW, 0, 0, b"\x7f\xff\xff\xff") * 3,
    frame(DATA, 0, 1, b"", length=2**24 - 1) + bytes(70_000),
    frame(PUSH, 4, 1, bytes(8)),
)


def broken_frame(port: int, random: Random) -> str:
    """A frame that HTTP/2 forbids: the connection is ended, nobody waits."""
    with Raw(port) as raw:
        raw.send(PREFACE + EMPTY_SETTINGS + random.choice(_BREACHES))
        ended = raw.status(0.1)
        return "LEFT" if ended == "SILENT" else ended


def random_frames(port: int, random: Random) -> str:
    """Frames of random kinds, flags, streams and bytes."""
    with Raw(port) as raw:
        raw.send(PREFACE + EMPTY_SETTINGS)
        for _ in range(random.randrange(1, 12)):
            size = random.randrange(0, 60)
            raw.send(
                frame(
                    random.randrange(0, 14),
                    random.randrange(256),
                    random.randrange(6),
                    random.randbytes(size),
                )
            )
        ended = raw.status(0.05)
        return "LEFT" if ended == "SILENT" else ended


def unknown_frames(port: int, random: Random) -> str:
    """Frame types of the future are to be skipped, and the call answered."""
    with Raw(port) as raw:
        raw.greet()
        for _ in range(20):
            raw.send(frame(random.randrange(32, 256), 0, 0, random.randbytes(9)))
        raw.call(framed(ASKED))
        return raw.status()


def flood(port: int, random: Random) -> str:
    """Cheap frames by the hundred: pings, settings, empty data."""
    with Raw(port) as raw:
        raw.greet()
        stream = raw.call(end=False)
        part = random.choice(
            [frame(PING, 0, 0, random.randbytes(8)), frame(SETTINGS, 0, 0), frame(DATA, 0, stream)]
        )
        raw.send(part * 500)
        raw.http2.send_data(stream, framed(ASKED), end_stream=True)
        raw.flush()
        return raw.status()
