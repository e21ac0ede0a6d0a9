"""FerKD: a student learns from stored labels of crops, which are believed by how sure the teacher was of the truth.

    L = -mean_i g_i sum_c q_ic log softmax(z_i / T)_c
    q = stored soft label,                    g = 1     where p_t(y) is above its quantile `drop` + `soften`
    q = (1 - eps) onehot(y) + eps / K,        g = 1     between that and its quantile `drop`: hard to see, label known
                                              g = 0     below: background, or another object
    SelfMix: a box of one crop is pasted into another of the same picture, and their labels are mixed by area

No teacher is in memory. `drop` = `soften` = `selfmix` = 0 is FKD: raw soft labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from distill_core.data import Source
from distill_core.data.augmentation import augment
from distill_core.errors import ConfigError
from distill_core.losses.distillation import reduced, soft_ce
from distill_core.method import Batch, Method, MethodConfig, Update
from distill_core.methods.recognition._mixing import pasted, random_box, random_share
from distill_core.methods.recognition._soft_labels import CLASSES, CROP, FLIP, STORED, VALUES, decompressed
from distill_core.methods.recognition._students import LABELLED, new_classifier
from distill_core.recipe.tables import EvaluateConfig, NetworkConfig


class Config(MethodConfig):
    num_crops: int = Field(4, ge=1, le=1000)  # of each item in a batch; the paper's is 4
    temperature: float = Field(1.0, gt=0)  # of the student
    drop: float = Field(0.05, ge=0, lt=1)  # share of all crops, the least sure ones, that count nothing
    soften: float = Field(
        0.15, ge=0, le=1
    )  # share after those that has the true label in the place of the teacher's
    smoothing: float = Field(0.1, ge=0, lt=1)  # eps of these true labels
    selfmix: float = Field(0.5, ge=0, le=1)  # share of the batches that are mixed; the paper's is not known

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        if self.drop + self.soften > 1:
            raise ValueError(f"drop + soften = {self.drop + self.soften:g} of the crops; together at most 1")
        if self.selfmix and self.num_crops < 2:
            raise ValueError("selfmix pastes one crop of a picture into another; set num_crops to 2 or more")
        return self


def calibrated(
    soft: Tensor, labels: Tensor, low: float, high: float, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Targets (M, K) and weights (M,) of crops with soft labels (M, K) of items with labels (M,).

    Below `low` of the teacher's probability of the label a crop counts nothing, below `high` it has the true label.
    """
    one_hot = F.one_hot(labels, soft.shape[1]).to(soft)
    sure = (soft * one_hot).sum(1)
    true = (1 - smoothing) * one_hot + smoothing / soft.shape[1]
    return torch.where((sure < high)[:, None], true, soft), (sure >= low).to(soft)


def quantile(values: Tensor, share: float) -> float:
    """The value (a float) below which that share of `values` (N,) lies; the least one at 0, infinity at 1."""
    place = int(share * len(values))
    return float("inf") if place >= len(values) else float(values.sort().values[place])


class FerKD(Method):
    paper = (
        "Shen 2023, FerKD: Surgical Label Adaptation for Efficient Distillation, arXiv 2312.17473; "
        "Shen & Xing 2022, A Fast Knowledge Distillation Framework for Visual Recognition, arXiv 2112.01528"
    )
    kind = "predictor"
    roles = ("student",)

    def __init__(self, config: Config, *, network: NetworkConfig, data: Source) -> None:
        super().__init__()
        self.config = config
        stored = data.arrays[CLASSES].shape[1]
        if config.num_crops > stored:
            raise ConfigError(
                f"config.num_crops = {config.num_crops}, and the data has {stored} crops of each item; lower it, or "
                "label more crops",
                field="config.num_crops",
            )
        self.student = new_classifier(network, data)
        sure = certainties(data)
        self.low, self.high = quantile(sure, config.drop), quantile(sure, config.drop + config.soften)

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return {**LABELLED, "class_label": "the crops that are calibrated", **STORED}

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        x0, target, weights = self.crops(batch)
        if self.config.selfmix and float(torch.rand(())) < self.config.selfmix:
            x0, target, weights = self.selfmixed(x0, target, weights)
        logits = self.student(x0)
        loss = reduced(soft_ce(logits, target, self.config.temperature), weights)
        yield Update("student", loss, {"counted_crops": weights.mean()})

    def crops(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Crops (B m, C, H, W), drawn from those that are stored, with their targets and weights."""
        columns, count = batch.columns, self.config.num_crops
        stored = columns[CLASSES]
        chosen = torch.rand(stored.shape[:2], device=stored.device).argsort(1)[:, :count]
        item = torch.arange(batch.size, device=stored.device)[:, None]
        rows = {name: columns[name][item, chosen].flatten(0, 1) for name in STORED}
        x0 = augment(columns["x0"].repeat_interleave(count, 0), {CROP: rows[CROP], FLIP: rows[FLIP]})
        labels = columns["class_label"].repeat_interleave(count)
        soft = decompressed(rows[CLASSES], rows[VALUES], len(self.student.described.class_names))
        return x0, *calibrated(soft, labels, self.low, self.high, self.config.smoothing)

    def selfmixed(self, x0: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each crop with a box of the next crop of the same picture; labels and weights mixed by area."""

        def of_next(values: Tensor) -> Tensor:
            crops = values.reshape(-1, self.config.num_crops, *values.shape[1:])
            return crops.roll(1, 1).flatten(0, 1)

        box = random_box(x0.shape[2], x0.shape[3], 1 - random_share(1.0))
        mixed, share = pasted(x0, of_next(x0), box)
        own, other = share * weights, (1 - share) * of_next(weights)
        total = own + other
        target = own[:, None] * target + other[:, None] * of_next(target)
        return mixed, target / total.clamp_min(1e-6)[:, None], total

    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """The teacher's probabilities of the label below which a crop counts nothing, and has the true label."""
        return {"least_certainty": self.low, "soft_label_certainty": min(self.high, 1.0)}


def certainties(data: Source) -> Tensor:
    """The teacher's probability (N n,) of its item's label for every stored crop."""
    assert data.labels is not None
    soft = decompressed(data.arrays[CLASSES], data.arrays[VALUES], len(data.class_names))
    return soft.gather(2, data.labels[:, None, None].expand(*soft.shape[:2], 1)).flatten()
