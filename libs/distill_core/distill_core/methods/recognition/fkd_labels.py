"""FKD's label pass: a teacher labels crops of each picture once; students then train on these without it.

    for each item: n crops, p = softmax(z_t(crop)),    kept: box, flip, the k largest p_c and their classes

A crop is a function of (seed, item, number) and can be shown again exactly. The result is a data set: the items with
the columns crop (n, 4), flip (n,), soft_classes (n, k) and soft_values (n, k). Items that no step saw are left out:
let it run for at least (items / batch size) steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from distill_core.data import Source
from distill_core.data.augmentation import ViewConfig, augment, draw_views
from distill_core.data.item_set import ItemSet
from distill_core.errors import ConfigError
from distill_core.method import Batch, Method, MethodConfig, Model, Update
from distill_core.methods.recognition._soft_labels import CLASSES, CROP, FLIP, VALUES, compressed
from distill_core.methods.recognition._students import LABELLED, classes_of, taught, use_classes_of
from distill_core.recipe.tables import EvaluateConfig
from distill_core.reductions import of_all_processes


class Config(MethodConfig):
    crops: int = Field(8, ge=1, le=1000)  # of each item; the paper stores 500
    top: int = Field(5, ge=1, le=1000)  # classes that are kept of each; the paper keeps 5
    view: ViewConfig = ViewConfig(
        crop_scale=0.1
    )  # from which crops are drawn; the paper's least share is 0.08

    @model_validator(mode="after")
    def _kept(self) -> Self:
        if self.view.shift:
            raise ValueError("view.shift is not kept with a crop; leave it out, crops are moved already")
        return self


class Labels(nn.Module):
    """What is kept of N items with n crops and k classes each; `done` (N,) says which have been labelled."""

    done: Tensor

    def __init__(self, items: int, crops: int, top: int) -> None:
        super().__init__()
        kept = {
            CROP: torch.zeros(items, crops, 4),
            FLIP: torch.zeros(items, crops, dtype=torch.bool),
            CLASSES: torch.zeros(items, crops, top, dtype=torch.int32),
            VALUES: torch.zeros(items, crops, top, dtype=torch.float16),
            "done": torch.zeros(items, dtype=torch.bool),
        }
        for name, value in kept.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def put(self, index: Tensor, **values: Tensor) -> None:
        """Keep `values` of the items `index` (B,), and those of other processes."""
        index = of_all_processes(index.to(self.done.device))
        for name, value in values.items():
            kept = self.get_parameter(name)
            found = value.to(kept.device, torch.uint8 if kept.dtype == torch.bool else kept.dtype)
            kept[index] = of_all_processes(found).to(kept.dtype)
        self.done[index] = True


class FKDLabels(Method):
    paper = (
        "Shen & Xing 2022, A Fast Knowledge Distillation Framework for Visual Recognition, arXiv 2112.01528"
    )
    kind = "dataset"
    roles = ("labels",)
    result = "labels"
    plan = "step"  # crops and labels are of real items

    def __init__(self, config: Config, *, teacher: nn.Module, data: Source, seed: int) -> None:
        super().__init__()
        self.config, self.teacher, self.data, self.seed = config, teacher, data, seed
        use_classes_of(teacher, data, "fkd_labels")
        classes = len(classes_of(teacher, data, "fkd_labels"))
        if config.top > classes:
            raise ConfigError(
                f"config.top = {config.top} keeps more classes than the teacher's {classes}; lower it",
                field="config.top",
            )
        self.labels = Labels(data.size, config.crops, config.top)

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return {**LABELLED, "class_label": "the calibration of the labels"}

    @torch.no_grad()
    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        view = self.views(batch.index)
        x0 = batch.columns["x0"].repeat_interleave(self.config.crops, 0)
        logits = taught(self.teacher, augment(x0, view)).unflatten(0, (-1, self.config.crops))
        classes, values = compressed(logits, self.config.top)
        rows = {name: value.unflatten(0, (-1, self.config.crops)) for name, value in view.items()}
        self.labels.put(batch.index, **{CLASSES: classes, VALUES: values}, **rows)
        right = (logits.argmax(2) == batch.columns["class_label"][:, None]).float().mean()
        yield Update("labels", None, {"labelled": self.labels.done.float().mean(), "right_crops": right})

    def views(self, index: Tensor) -> dict[str, Tensor]:
        """The crops (B n, …) of the items `index` (B,), one after the other."""
        count = self.config.crops
        drawn = [
            draw_views(self.config.view, self.seed, item * count, (item + 1) * count)
            for item in index.tolist()
        ]
        view = {name: torch.cat([one[name] for one in drawn]) for name in drawn[0]}
        return {CROP: torch.tensor([0.0, 0, 1, 1]).expand(len(index) * count, 4), **view}

    def published(self) -> Mapping[str, Model]:
        done = self.labels.done.nonzero().squeeze(1).cpu()
        if not len(done):
            done = torch.arange(1)  # before the first step
        items = self.data.items(done)
        kept = {
            name: self.labels.get_parameter(name).detach()[done] for name in (CROP, FLIP, CLASSES, VALUES)
        }
        return {
            "labels": ItemSet(
                items.columns["x0"],
                labels=items.columns["class_label"],
                class_names=self.data.class_names,
                arrays=kept,
            )
        }

    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """Items that were labelled, the share of their crops that the teacher names otherwise, and bytes of each."""
        assert self.data.labels is not None
        done = self.labels.done.cpu()
        first = self.labels.get_parameter(CLASSES)[:, :, 0].cpu()
        wrong = (first != self.data.labels[:, None])[done].double().mean()
        size = sum(self.labels.get_parameter(name).nbytes for name in (CROP, FLIP, CLASSES, VALUES))
        return {
            "labelled_items": float(done.sum()),
            "wrong_crop_share": float(wrong),
            "label_bytes_per_item": size / len(done),
        }
