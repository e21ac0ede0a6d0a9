"""Radiance fields by kind."""

from __future__ import annotations

from distill_core.errors import ConfigError, nearest
from distill_core.networks.fields.analytic import AnalyticField
from distill_core.networks.fields.base import FieldSample, RadianceField
from distill_core.networks.fields.factors import CPField, VMField
from distill_core.networks.fields.hash import HashField
from distill_core.networks.fields.mlp import MLPField
from distill_core.networks.fields.tensors import SparseField, TensorsField
from distill_core.recipe.tables import NetworkConfig

__all__ = ["FIELDS", "FieldSample", "HashField", "MLPField", "RadianceField", "build_field"]

KINDS = (HashField, MLPField, VMField, CPField, TensorsField, SparseField, AnalyticField)
FIELDS: dict[str, type[RadianceField]] = {cls.kind: cls for cls in KINDS}


def build_field(network: NetworkConfig, bound: float) -> RadianceField:
    """A new field of kind `network.name` in the box [-bound, bound]^3; weights from torch's global generator.

    Raises:
        ConfigError: an unknown kind, or an argument that the kind does not have.
    """
    if network.name not in FIELDS:
        known = nearest(network.name, FIELDS)
        raise ConfigError(f"no radiance field is called {network.name!r}{known}", field="network.name")
    cls = FIELDS[network.name]
    return cls(cls.Config.parse(network.args, where="network.args"), bound)
