"""Predictions by item: what a classifier said of each item when it saw it last."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_core.data import Source
from distill_core.data.item_store import ItemStore
from distill_core.reductions import of_all_processes
from distill_core.signature import TensorSpec

PROBABILITIES = "probabilities"


class PredictionMemory:
    """M (N, K): class probabilities of each item of `data` by its id, on the CPU; one-hot labels at first.

    With several processes each remembers what all of them predict, so that their memories are equal.
    """

    def __init__(self, data: Source) -> None:
        assert data.labels is not None
        classes = len(data.class_names)
        columns = {PROBABILITIES: TensorSpec(dtype="float32", shape=(classes,))}
        self.store = ItemStore.blank(data, columns)
        self.store.put(torch.arange(data.size), **{PROBABILITIES: F.one_hot(data.labels, classes)})

    def at(self, index: Tensor) -> Tensor:
        """What is remembered (B, K) of the items `index` (B,), where these are."""
        return self.store.at(index)[PROBABILITIES].to(index.device)

    def put(self, index: Tensor, probabilities: Tensor) -> None:
        """Remember `probabilities` (B, K) of the items `index` (B,)."""
        index, values = of_all_processes(index), of_all_processes(probabilities.detach())
        self.store.put(index.cpu(), **{PROBABILITIES: values.cpu()})

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"memory": self.store.values[PROBABILITIES]}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self.store.values[PROBABILITIES] = state["memory"].cpu()
