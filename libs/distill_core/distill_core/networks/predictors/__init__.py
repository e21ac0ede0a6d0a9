"""Networks of predictors, found by name. Each module of this package lists its classes in a `NETWORKS` dictionary.

A class has `Args`, its validated arguments, and is made of these alone: `cls(args)`. Arguments that follow from the
data (`shape`, `num_classes`, …) are filled in by who builds it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from torch import nn

from distill_core.config import Config
from distill_core.errors import ConfigError, nearest
from distill_core.recipe.tables import NetworkConfig


def network_types() -> dict[str, type[nn.Module]]:
    """Every network there is: the name that a recipe's `[network]` table gives, and its class."""
    found: dict[str, type[nn.Module]] = {}
    for module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        found.update(getattr(importlib.import_module(f"{__name__}.{module}"), "NETWORKS", {}))
    return found


def arguments_of(name: str, *, field: str = "network") -> type[Config]:
    """The schema of a network's arguments.

    Raises:
        ConfigError: no such network; names the nearest.
    """
    known = network_types()
    if name not in known:
        raise ConfigError(f"no network is called {name!r}{nearest(name, known)}", field=f"{field}.name")
    network: Any = known[name]
    args: type[Config] = network.Args
    return args


def build_network(
    config: NetworkConfig, facts: Mapping[str, Any] | None = None, *, field: str = "network"
) -> nn.Module:
    """The network that a `[network]` table describes, with fresh weights.

    `facts` of the data (`shape`, `num_classes`, `class_names` …) fill in the arguments of these names.

    Raises:
        ConfigError: no such network, an unknown argument, or one that follows from the data and is given too.
    """
    schema = arguments_of(config.name, field=field)
    fixed = {name: value for name, value in (facts or {}).items() if name in schema.model_fields}
    if taken := sorted(fixed.keys() & config.args.keys()):
        raise ConfigError(
            f"{field}.args.{taken[0]} follows from the data; remove it", field=f"{field}.args.{taken[0]}"
        )
    args = schema.parse({**config.args, **fixed}, where=f"{field}.args")
    return network_types()[config.name](args)
