"""Classifiers with fresh weights, made to measure for a data set."""

from __future__ import annotations

from distill_core.data import Source
from distill_core.networks.predictor import Predictor, classifier_of, input_of
from distill_core.networks.predictors import build_network
from distill_core.recipe.tables import NetworkConfig


def classifier_of_column(
    network: NetworkConfig,
    data: Source,
    column: str,
    *,
    class_names: tuple[str, ...] = (),
    field: str = "network",
) -> Predictor:
    """A classifier of what `column` of the data holds, and of the data's classes or of those that are given.

    Raises:
        ConfigError: a network that cannot take it.
    """
    spec, names = data.columns[column], class_names or data.class_names
    facts = {"shape": spec.shape, "num_classes": len(names), "class_names": names}
    built = build_network(network, facts, field=field)
    return classifier_of(built, network, name=input_of(column), spec=spec, class_names=names)
