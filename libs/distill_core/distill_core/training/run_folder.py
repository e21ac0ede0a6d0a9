"""A run folder: the resolved recipe, metrics.jsonl, samples, checkpoints, the finished model, its charts."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from distill_core.charts import beside
from distill_core.files.text import lines, read_text
from distill_core.pictures import save_sheet
from distill_core.recipe import Recipe

Listener = Callable[
    [dict[str, Any]], None
]  # receives progress, metrics, sample … events as plain dictionaries
IDENTITY = ".run"  # the file with a run's own random name


class Run:
    """One run's folder; every event is told to `listener` too."""

    def __init__(self, folder: Path, listener: Listener | None = None) -> None:
        self.folder = folder
        self._listener = listener or (lambda event: None)
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def write_recipe(self, recipe: Recipe) -> None:
        (self.folder / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")

    @property
    def identity(self) -> str:
        """A random name of this run; made with the folder, and kept in it."""
        path = self.folder / IDENTITY
        with contextlib.suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
            file.write(secrets.token_hex(8))
        return path.read_text(encoding="utf-8").strip()

    def tell(self, event: str, **values: Any) -> None:
        """Pass an event on to whoever watches."""
        self._listener({"event": event, **values})

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line to metrics.jsonl."""
        line = {"step": step, "time": round(time.time(), 3), **values}
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.tell("metrics", step=step, values=dict(values))

    def sample(self, step: int, pictures: Tensor) -> Path:
        """Save a sheet of pictures (B, C, H, W) in [-1, 1]."""
        path = self.folder / "samples" / f"{step:09d}.png"
        save_sheet(pictures, path)
        self.tell("sample", step=step, path=path.relative_to(self.folder).as_posix())
        return path

    def charts(self, pictures: Mapping[str, Image.Image]) -> None:
        """Save charts of the result's figures, by name, and side by side as the model's preview."""
        folder = self.folder / "charts"
        for name, picture in pictures.items():
            folder.mkdir(exist_ok=True)
            picture.save(folder / f"{name}.png")
        if pictures:
            beside(list(pictures.values())).save(self.model / "preview.png")

    def drop_metrics_after(self, step: int) -> None:
        """Forget lines of steps that a resumed run will do again."""
        path = self.folder / "metrics.jsonl"
        if path.is_file():
            kept = [line for line in lines(read_text(path)) if _step_of(line) <= step]
            path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        step: float = json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # a line cut off by a kill
    return step
