"""Data sets: items that a method made or chose, to train others on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_core.data import Source
from distill_core.data.item_set import ItemSet, load_item_set
from distill_core.kinds.base import Kind, Models
from distill_core.kinds.loading import config_kind

SHOWN = 100  # pictures of a preview


class DatasetKind(Kind):
    """Sets of pictures, labels and further columns."""

    name = "dataset"

    def recognise(self, folder: Path) -> bool:
        return config_kind(folder) == self.name

    def load(self, folder: Path, *, device: str = "cpu", models: Models | None = None) -> ItemSet:
        return load_item_set(folder)

    def preview(self, model: Any, source: Source, seed: int, references: Mapping[str, Any]) -> Tensor | None:
        """The pictures, class by class; of many as many of each class, spread evenly."""
        if model.pixels is None:
            return None
        order = torch.arange(model.size) if model.labels is None else model.labels.argsort(stable=True)
        count = min(SHOWN, model.size)
        shown: Tensor = model.pixels.take(order[torch.arange(count) * model.size // count])
        return shown if shown.shape[1] in (1, 3) else shown[:, :3].mean(1, keepdim=True)


KIND = DatasetKind()
