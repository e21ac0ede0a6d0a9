"""Routing of conditions to one of several networks, on torch tensors and NumPy arrays alike.

    class label c              part = of_class[c]
    prompt_embeds (T, D)       part = argmin_k |e - centroid_k|^2 - offset_k,   e = mean over the T tokens

A rule depends on one item's condition alone, so a batch changes no item's part.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from distill_core.config import Config

Array = Any  # torch.Tensor or numpy.ndarray
ROUTER = (
    "router.safetensors"  # beside the experts of a prompt-conditioned model: centroids (K, D), offsets (K,)
)


class PartitionSpec(Config):
    """A split of the conditions into `parts`, one network each; part of a routed model's manifest."""

    kind: Literal["none", "class_label", "prompt"]
    parts: int = Field(ge=1, le=4096)
    of_class: tuple[int, ...] = ()  # class_label: the part of each class
    default: int = Field(0, ge=0)  # of what no rule knows: no condition, the null class

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.default >= self.parts or any(not 0 <= part < self.parts for part in self.of_class):
            raise ValueError(f"parts are numbered 0 to {self.parts - 1}")
        if self.kind == "none" and self.parts > 1:
            raise ValueError("without conditions there is only one part")
        if self.kind == "class_label" and set(self.of_class) != set(range(self.parts)):
            raise ValueError(f"each of the {self.parts} parts needs at least one class")
        return self

    @property
    def table(self) -> list[int]:
        """`of_class` with one row more, for labels outside it."""
        return [*self.of_class, self.default]


def class_parts(labels: Array, table: Array) -> Array:
    """The part (B,) of each class label (B,); `table` is `PartitionSpec.table`, as an integer array."""
    last = len(table) - 1
    known = (labels >= 0) & (labels < last)
    return table[labels * known + last * ~known]


def pooled(prompt_embeds: Array) -> Array:
    """(B, D) from (B, T, D): the mean over the tokens."""
    return prompt_embeds.mean(1)


def prompt_parts(embeds: Array, centroids: Array, offsets: Array) -> Array:
    """The part (B,) of each pooled prompt (B, D): its nearest centroid (K, D) after the handicaps (K,)."""
    return (2 * embeds @ centroids.T - (centroids**2).sum(1) + offsets).argmax(1)
