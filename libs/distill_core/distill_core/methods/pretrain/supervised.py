"""Supervised training of any network of predictors on labelled items: teachers, and students alone.

L = -log softmax(z(x))_y                         z: logits of the classes, x: an item's column, y: its label
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch.nn.functional as F
from pydantic import Field

from distill_core.config import Words
from distill_core.data import Source
from distill_core.method import Batch, Method, MethodConfig, Update
from distill_core.networks.new_classifier import classifier_of_column
from distill_core.recipe.tables import NetworkConfig


class Config(MethodConfig):
    column: Words = "x0"  # of the data that the network sees: x0 for pictures, iq for radio frames
    label_smoothing: float = Field(0.0, ge=0, lt=1)  # share of the target that is spread over all classes


class Supervised(Method):
    paper = "Bridle 1990, Probabilistic Interpretation of Feedforward Classification Network Outputs"
    kind = "predictor"
    roles = ("classifier",)
    result = "classifier"

    def __init__(self, config: Config, *, network: NetworkConfig, data: Source) -> None:
        super().__init__()
        self.config = config
        self.classifier = classifier_of_column(network, data, config.column)

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return {config.column: "what the network sees", "class_label": "the cross-entropy"}

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        labels = batch.columns["class_label"]
        logits = self.classifier(batch.columns[self.config.column])
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        yield Update("classifier", loss, {"train_accuracy": (logits.argmax(1) == labels).float().mean()})
