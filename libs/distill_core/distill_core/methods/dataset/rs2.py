"""RS2: repeated random sampling, each round one epoch over a fresh random subset; the baseline of distilled data.

    for round e:  S_e = r N items,  one epoch of  min mean CE(z(x), y)  over S_e;  lr is cosine over all rounds

Without replacement S_1, S_2 … are consecutive slices of one permutation, which is drawn anew when it is used up.
The rounds are the recipe's `[data.order]`; `kind = "static"` keeps S_1 for ever, as pruned and distilled sets do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch.nn.functional as F

from distill_core.data import Source
from distill_core.errors import ConfigError
from distill_core.method import Batch, Method, MethodConfig, Update
from distill_core.networks.predictor import image_classifier
from distill_core.networks.predictors import build_network
from distill_core.recipe.tables import EvaluateConfig, NetworkConfig


class Config(MethodConfig):
    pass


class RS2(Method):
    paper = (
        "Okanovic et al. 2023, Repeated Random Sampling for Minimizing the Time-to-Accuracy of Learning, "
        "arXiv 2305.18424"
    )
    kind = "predictor"
    roles = ("classifier",)
    result = "classifier"

    def __init__(self, config: Config, *, network: NetworkConfig, data: Source) -> None:
        super().__init__()
        self.config, self.data = config, data
        if data.order.config.kind not in ("rounds", "static"):
            raise ConfigError(
                f"rs2 needs rounds over subsets, and data.order.kind = {data.order.config.kind!r}; set "
                "data.order = { kind = 'rounds', share = 0.1 }",
                field="data.order.kind",
            )
        assert data.shape is not None  # `columns` asks for pictures
        facts = {"shape": data.shape, "num_classes": data.num_classes, "class_names": data.class_names}
        built = build_network(network, facts)
        self.classifier = image_classifier(built, network, shape=data.shape, class_names=data.class_names)

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return {"x0": "the classifier", "class_label": "the cross-entropy"}

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        yield Update(
            "classifier", F.cross_entropy(self.classifier(batch.columns["x0"]), batch.columns["class_label"])
        )

    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """Items of one round, and of the whole set, which has to be there while it trains."""
        return {"items_a_round": float(self.data.order.epoch), "items": float(self.data.size)}
