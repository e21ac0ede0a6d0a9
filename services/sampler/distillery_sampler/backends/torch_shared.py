"""Common parts of all torch backends. Imports no diffusers, which takes longer than a small model's loading."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable
from typing import Any

import torch

_own = threading.local()


def use_threads(count: int) -> None:
    """Let this thread's operators use `count` threads; torch keeps the number per thread."""
    if getattr(_own, "count", None) != count:
        torch.set_num_threads(count)
        _own.count = count


def storages(modules: Iterable[Any]) -> dict[Hashable, int]:
    """Bytes of all parameters and buffers, by where they are: what two modules share is there once."""
    sizes: dict[Hashable, int] = {}
    for module in modules:
        for value in (*module.parameters(), *module.buffers()):
            storage = value.untyped_storage()
            sizes[value.device.type, storage.data_ptr()] = storage.nbytes()
    return sizes
