"""Long-tailed and noisily labelled views of any labelled data: options of every `[data]` table.

    imbalance = r      class k of K keeps the share r^(-k / (K - 1)) of its items: the first all, the last 1 / r
    label_noise = s    that share of the items is given another label, any of the others alike

Which items they are is a function of `draw_seed`. The long tail is drawn first, the labels of what is left after that.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from distill_core.config import Config, Seed
from distill_core.data.source import Source
from distill_core.errors import DataError

_TAIL, _NOISE = 0x7461696C, 0x6E6F6973  # set the random numbers of the two apart


class LabelViewConfig(Config):
    """Options of a `[data]` table that change which items and labels there are."""

    imbalance: float = Field(
        1.0, ge=1, le=1e6
    )  # items of the first class / those of the last; 1: as they are
    label_noise: float = Field(0.0, ge=0, lt=1)  # share of the items with a wrong label
    draw_seed: Seed = 0  # of both


def view_labels(source: Source, config: LabelViewConfig, *, where: str = "data") -> None:
    """Change the items and labels of `source` as `config` says.

    Raises:
        DataError: data without labels, of a single class, or with a class that has no item.
    """
    if config == LabelViewConfig(draw_seed=config.draw_seed):
        return
    option = "imbalance" if config.imbalance > 1 else "label_noise"
    if source.labels is None or len(source.class_names) < 2:
        raise DataError(
            f"{where}.{option} changes class labels, and this data has no two classes; choose labelled data",
            field=f"{where}.{option}",
        )
    if config.imbalance > 1:
        source.keep(long_tail(source.labels, _filled(source, where), config.imbalance, config.draw_seed))
    if config.label_noise:
        assert source.labels is not None
        source.labels = noisy(source.labels, len(source.class_names), config.label_noise, config.draw_seed)


def long_tail(labels: Tensor, classes: int, imbalance: float, seed: int) -> Tensor:
    """The items (M,), ascending, that an exponential long tail keeps of `labels` (N,): of each class at least one."""
    kept = []
    for label in range(classes):
        members = (labels == label).nonzero().squeeze(1)
        count = max(1, round(len(members) * imbalance ** (-label / (classes - 1))))
        shuffled = np.random.Generator(np.random.Philox([seed, _TAIL + label])).permutation(len(members))
        kept.append(members[torch.from_numpy(shuffled[:count])])
    return torch.cat(kept).sort().values


def noisy(labels: Tensor, classes: int, share: float, seed: int) -> Tensor:
    """`labels` (N,) of which that share, rounded, is another class."""
    random = np.random.Generator(np.random.Philox([seed, _NOISE]))
    wrong = torch.from_numpy(random.permutation(len(labels))[: round(share * len(labels))])
    steps = torch.from_numpy(random.integers(1, classes, len(wrong)))
    return labels.index_put((wrong,), (labels[wrong] + steps) % classes)


def _filled(source: Source, where: str) -> int:
    """The number of classes, of which each has an item."""
    assert source.labels is not None
    counts = torch.bincount(source.labels, minlength=len(source.class_names))
    if not counts.all():
        name = source.class_names[int(counts.argmin())]
        raise DataError(
            f"class {name!r} has no item, so a long tail would lack it; leave {where}.imbalance out, or use data "
            "with items of every class",
            field=f"{where}.imbalance",
        )
    return len(counts)
