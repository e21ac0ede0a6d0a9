"""Tensors by index that are made once and found again: shards in a folder whose name is the key of what made them.

A folder is the address of its content: its name is a digest of model, solver, levels, guidance and conditions, and each
file repeats it in its header. So what one model made is never read as another's, a kill costs one shard, and all runs
and methods that want the same share it. Data assets (`data = { recipe = … }`) are no place for this: what a flow that
is still being trained makes of noise belongs to the weights of one step of one run, which no recipe names.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill_core.errors import ConfigError, DataError

log = logging.getLogger(__name__)
SHARD = 1024  # items per file: what a kill can cost
HEADER = "distillery"
GIB = 2**30

# told how many of how many items there are and the seconds that are left; may raise, to stop between two shards
filling: ContextVar[Callable[[int, int, float], None]] = ContextVar(
    "filling", default=lambda made, count, left_s: None
)


class Shards:
    """Values by name, (count, …) each: the files are mapped, and rows are read as they are asked for."""

    def __init__(self, values: list[Mapping[str, Tensor]]) -> None:
        self.values = values
        self.starts = [0]
        for shard in values:
            self.starts.append(self.starts[-1] + len(next(iter(shard.values()))))

    def __len__(self) -> int:
        return self.starts[-1]

    def at(self, name: str, indices: Tensor, parts: Tensor | None = None) -> Tensor:
        """The rows `indices` (B,) of a value, on the CPU; of each row only the entries `parts` (B, P), if given."""
        found = []
        for place, index in enumerate(map(int, indices)):  # also of fake tensors, whose values are 0
            shard = bisect_right(self.starts, index) - 1
            row = self.values[shard][name][index - self.starts[shard]]
            found.append(row if parts is None else row[parts[place]])
        return torch.stack(found)

    def all(self, name: str) -> Tensor:
        """Every row of a value, in memory."""
        return torch.cat([shard[name] for shard in self.values])


def fill(
    folder: Path,
    count: int,
    make: Callable[[int, int], dict[str, Tensor]],
    *,
    what: str = "teacher pairs",
) -> Shards:
    """The `count` items in `folder`; `make(start, stop)` gives those that are missing, shard by shard.

    Raises:
        DataError: a file there was made by something else, or is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {start: folder / f"{start:09d}.safetensors" for start in range(0, count, SHARD)}
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs that want the same make it once
        made, began = 0, time.monotonic()
        for start, file in files.items():
            stop = min(start + SHARD, count)
            if file.is_file():
                continue
            _write(file, make(start, stop))
            made += stop - start
            left = (count - stop) * (time.monotonic() - began) / made
            log.info("%s: %d of %d, about %.0f s left", what, stop, count, left)
            filling.get()(stop, count, left)
    return Shards([_read(file, min(SHARD, count - start)) for start, file in files.items()])


def check_size(count: int, shape: tuple[int, ...], max_gib: float, *, field: str) -> None:
    """Refuse more float32 items of `shape` than `max_gib` GiB hold, before the first is made.

    Raises:
        ConfigError: the table asks for more.
    """
    gib = count * math.prod(shape) * 4 / GIB
    if gib > max_gib:
        raise ConfigError(
            f"{count} items of shape {shape} take {gib:.3g} GiB on disk, and pairs.max_gib allows {max_gib:g}; "
            "lower pairs.count or raise that limit",
            field=field,
        )


def _write(file: Path, values: dict[str, Tensor]) -> None:
    draft = file.with_suffix(".tmp")
    header = {HEADER: json.dumps({"version": 1, "made_by": file.parent.name})}
    save_file({name: value.contiguous() for name, value in values.items()}, draft, header)
    draft.replace(file)


def _read(file: Path, count: int) -> dict[str, Tensor]:
    """The values of a file, mapped, after a look at who made them and how many they are."""
    try:
        with safe_open(file, "pt") as opened:
            made_by = json.loads((opened.metadata() or {}).get(HEADER, "{}")).get(
                "made_by", "nobody knows what"
            )
        if made_by != file.parent.name:
            raise DataError(
                f"{file.name} in {file.parent} was made by another model, solver or data ({made_by}) than is asked "
                "for; remove the folder, and it is made anew",
                field="pairs",
            )
        values = load_file(file)
    except (SafetensorError, OSError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{file.name} in {file.parent} is damaged ({error}); remove it, and it is made anew",
            field="pairs",
        ) from None
    if any(len(value) != count for value in values.values()) or not values:
        raise DataError(
            f"{file.name} in {file.parent} does not hold the {count} items that belong there; remove it, and it "
            "is made anew",
            field="pairs",
        )
    return values
