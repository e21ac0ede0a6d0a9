"""Checkpoints: a folder a step, safetensors and JSON only, complete or absent."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill_core.errors import ArtifactError, Unavailable
from distill_core.training.strategy import place

log = logging.getLogger(__name__)
STATE = "state.json"


@contextlib.contextmanager
def writing(what: str, checkpoints: Path) -> Iterator[None]:
    """Turn a failure to write into one sentence; safetensors and the system each have errors of their own.

    It says to continue from the last one of `checkpoints` where there is one.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        again = "continue from the last checkpoint" if complete_checkpoints(checkpoints) else "begin again"
        raise Unavailable(
            f"cannot write {what}: {reason}; free space or rights there, then {again}"
        ) from error


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], *, method: str, keep: int
) -> Path:
    """Write `folder/<step>/` atomically and drop all but the `keep` newest.

    `tensors` maps a part's name (`student`, `student.ema`, `student.optim` …) to its tensors.
    """
    with writing(f"the checkpoint of step {step} to {folder}", folder):
        return _save_checkpoint(folder, step, tensors, method=method, keep=keep)


def _save_checkpoint(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], *, method: str, keep: int
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        for part, values in tensors.items():
            save_file(
                {name: value.detach().contiguous().clone() for name, value in values.items()},
                partial / f"{part}.safetensors",
            )
        (partial / STATE).write_text(json.dumps({"step": step, "method": method, "parts": sorted(tensors)}))
        target = folder / f"{step:09d}"
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in complete_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoint folders, oldest first."""
    return sorted(path.parent for path in folder.glob(f"[0-9]*/{STATE}"))


def load_latest(folder: Path, *, method: str) -> tuple[int, dict[str, dict[str, Tensor]]] | None:
    """Step and tensors of the newest readable checkpoint, None where there is none.

    Raises:
        ArtifactError: the checkpoints are another method's.
    """
    for path in reversed(complete_checkpoints(folder)):
        try:
            state: dict[str, Any] = json.loads((path / STATE).read_text())
            if state["method"] != method:
                raise ArtifactError(
                    f"checkpoint {path.name} is of the method {state['method']!r}, the recipe says {method!r}; "
                    "use another run folder"
                )
            return state["step"], {part: load_file(path / f"{part}.safetensors") for part in state["parts"]}
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            log.warning("checkpoint %s is damaged and skipped: %s", path.name, error)
    return None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as named tensors; its hyper-parameters are the recipe's."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}/{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, values in state.items()
        for name, value in values.items()
        if value is not None
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = place(value, parameters[int(index)])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
