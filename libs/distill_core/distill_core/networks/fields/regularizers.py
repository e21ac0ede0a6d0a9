"""Regularisers of a field's training loss, and the check that a field can be trained."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from distill_core.config import Config
from distill_core.errors import ConfigError
from distill_core.networks.fields.base import RadianceField


class RegularizerWeights(Config):
    """Weights of `RadianceField.regularizers`; 0 = off."""

    density_l1: float = Field(0.0, ge=0)  # vm, cp (TensoRF: 8e-5, then 4e-5; PVD: 1e-4)
    total_variation: float = Field(0.0, ge=0)  # tensors (Plenoxels: 1e-5 to 1e-3)


def regularization(field: RadianceField, weights: RegularizerWeights) -> Tensor | float:
    """Weighted sum of the regularisers that are on; 0.0 where none is."""
    active = {name: weight for name, weight in weights.model_dump().items() if weight}
    if not active:
        return 0.0
    terms = field.regularizers()
    total: Tensor = sum(weight * terms[name] for name, weight in active.items())
    return total


def check_trainable(field: RadianceField, weights: RegularizerWeights) -> None:
    """Raise ConfigError for a field without parameters, or for a weight of a regulariser that the kind lacks."""
    if not any(True for _ in field.parameters()):
        raise ConfigError(
            f"a field of kind {field.kind!r} has nothing to train; choose another network.name, "
            "or use it as a teacher",
            field="network.name",
        )
    known = field.regularizers()
    for name, weight in weights.model_dump().items():
        if weight and name not in known:
            raise ConfigError(
                f"a field of kind {field.kind!r} has no regulariser {name!r}; set its weight to 0",
                field=f"config.regularizers.{name}",
            )
