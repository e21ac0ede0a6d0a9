"""Memory limit of loaded models, and what they use."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path

from distill_core.artifacts import Manifest

SHARE = 0.8  # of the memory there is, for models; the rest is for requests, and for what is being loaded
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
WEIGHTS = ".safetensors"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of malloc.h
ARENAS, LARGE = 2, 256 * 2**10  # pools; bytes
TORCH_LARGE = 32 * 2**20  # torch asks anew for each operator: giving back would cost it more than it takes
GC_AFTER = 10_000  # new objects, until the young ones are looked through
Held = Mapping[Hashable, int]  # bytes by what holds them: what two models share has one key


def default_limit(device: str, cgroup_limits: Iterable[Path] = CGROUP_LIMITS) -> int:
    """`SHARE` of the GPU's memory, or of the host's as far as this process may use it; bytes."""
    if device.startswith("cuda"):
        import torch

        if torch.cuda.is_available():
            return int(SHARE * torch.cuda.mem_get_info(device)[1])
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in cgroup_limits:
        try:
            there = min(there, int(path.read_text(encoding="ascii")))
        except (OSError, ValueError):  # another cgroup version, or "max"
            continue
    return int(SHARE * there)


def resident() -> int:
    """Bytes of this process that are in memory; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf(
            "SC_PAGE_SIZE"
        )
    except (OSError, ValueError):
        return 0


def weight_bytes(manifest: Manifest, target: str | None) -> int:
    """Bytes of a version by its files: those of an export, or without one its own weights."""
    if target is not None:
        folder = f"exports/{target}"  # not those below it: what engines are built from is not loaded
        return sum(file.size for path, file in manifest.files.items() if path.rpartition("/")[0] == folder)
    own = (path for path in manifest.files if path.endswith(WEIGHTS) and not path.startswith("exports/"))
    return sum(manifest.files[path].size for path in own)


def total(held: Iterable[Held]) -> int:
    """Bytes of several models together; what they share counts once."""
    merged: dict[Hashable, int] = {}
    for parts in held:
        merged.update(parts)
    return sum(merged.values())


def limit_malloc_arenas(large: int = LARGE) -> None:
    """Have glibc keep few pools, and give pieces of `large` bytes back when they are freed; before threads start.

    Otherwise each thread has a pool of its own, and holes that one model left in it fit no other: after 50 versions
    that followed each other a process held up to 32 MiB more than at first, with this up to 8.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, ARENAS)
        mallopt(M_MMAP_THRESHOLD, large)
        mallopt(M_TRIM_THRESHOLD, 2 * large)  # as glibc itself has it once the other is not set by hand


def freeze_garbage_collector() -> None:
    """Leave what is alive out of later garbage collections: a full one kept the event loop for 70 ms.

    What an earlier call left out and nobody uses any more, as a model that was there then, is freed now.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_AFTER)


def trim_heap() -> None:
    """Return what freed models held to the system: glibc would keep it for the next one."""
    freeze_garbage_collector()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def readable(count: int) -> str:
    """Bytes as a person reads them."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.3g} {unit}"
