"""Ways to damage a file's bytes: each takes them and a source of chance, and returns others."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

Damage = Callable[[bytes, Random], bytes]
HEAD = 8  # bytes of a safetensors file that say how long its header is
ODD = (
    None,
    True,
    -1,
    0,
    1.5,
    2**31,
    10**30,
    "",
    "x",
    "é" * 50,
    [],
    {},
    [[[]]],
    {"a": {"b": 1}},
    "../../etc/passwd",
)


def truncated(data: bytes, chance: Random) -> bytes:
    """Cut off anywhere."""
    return data[: chance.randrange(len(data))]


def flipped(data: bytes, chance: Random) -> bytes:
    """One to sixty-four bits turned."""
    broken = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8, 64))):
        broken[chance.randrange(len(broken))] ^= 1 << chance.randrange(8)
    return bytes(broken)


def head_flipped(data: bytes, chance: Random) -> bytes:
    """The same near the beginning, where formats say what follows."""
    head = data[:2048]
    return flipped(head, chance) + data[len(head) :]


def zeroed(data: bytes, chance: Random) -> bytes:
    """A hole of zeros, as a disk leaves it."""
    begin = chance.randrange(len(data))
    end = min(len(data), begin + chance.choice((1, 8, 512)))
    return data[:begin] + bytes(end - begin) + data[end:]


def spliced(data: bytes, chance: Random) -> bytes:
    """A piece of the file over another one."""
    size = chance.choice((4, 64, 1024))
    here, there = chance.randrange(len(data)), chance.randrange(len(data))
    return data[:here] + data[there : there + size] + data[here + size :]


def overlong(data: bytes, chance: Random) -> bytes:
    """A number in protobuf's form that is far too large, put in anywhere."""
    here = chance.randrange(len(data))
    return data[:here] + b"\xff" * chance.choice((1, 4, 9)) + b"\x7f" + data[here:]


def lying_header(data: bytes, chance: Random) -> bytes:
    """A safetensors header that says what is not so: lengths, offsets, shapes, types, names."""
    (length,) = struct.unpack("<Q", data[:HEAD])
    header = json.loads(data[HEAD : HEAD + length])
    if chance.random() < 0.2:
        wrong = chance.choice((0, 1, length - 1, length + 1, 2**32, 2**63, 2**64 - 1))
        return struct.pack("<Q", wrong) + data[HEAD:]
    name = chance.choice(sorted(key for key in header if key != "__metadata__"))
    one = header[name]
    lie = chance.choice(("shape", "dtype", "offsets", "gone", "renamed", "odd"))
    if lie == "shape":
        one["shape"] = chance.choice(([], [0], [2**40, 2**40], [-1], [*one["shape"], 1], one["shape"][::-1]))
    elif lie == "dtype":
        one["dtype"] = chance.choice(("F64", "I8", "BOOL", "F8_E4M3", "X", ""))
    elif lie == "offsets":
        begin, end = one["data_offsets"]
        one["data_offsets"] = chance.choice(([end, begin], [begin, end + 4], [begin, 2**62], [0, 0], [0]))
    elif lie == "gone":
        del header[name]
    elif lie == "renamed":
        header[f"{name}.other"] = header.pop(name)
    else:
        header[name] = chance.choice(ODD)
    told = json.dumps(header).encode()
    return struct.pack("<Q", len(told)) + told + data[HEAD + length :]


def odd_value(data: bytes, chance: Random) -> bytes:
    """JSON whose form is right, with a value of another kind or size, or without a key."""
    tree = json.loads(data)
    parent, key = _somewhere(tree, chance)
    if chance.random() < 0.25:
        del parent[key]
    else:
        parent[key] = chance.choice(ODD)
    return json.dumps(tree).encode()


def odd_document(data: bytes, chance: Random) -> bytes:
    """Something else where JSON is expected."""
    odd = (b"", b"[]", b"null", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"a": NaN}', b"1e999", data + data)
    return chance.choice(odd)


def _somewhere(tree: Any, chance: Random) -> tuple[Any, Any]:
    """A container inside `tree` and a key of it."""
    while True:
        key = chance.choice(sorted(tree) if isinstance(tree, dict) else range(len(tree)))
        below = tree[key]
        if not isinstance(below, dict | list) or not below or chance.random() < 0.5:
            return tree, key
        tree = below


BYTES: tuple[Damage, ...] = (truncated, flipped, head_flipped, zeroed, spliced)
KINDS: dict[str, tuple[Damage, ...]] = {
    ".onnx": (*BYTES, overlong),
    ".safetensors": (*BYTES, lying_header, lying_header),
    ".json": (*BYTES, odd_value, odd_value, odd_value, odd_document),
}
