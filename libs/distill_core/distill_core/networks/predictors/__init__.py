"""Networks of predictors, found by name. Each module of this package lists its classes in a `NETWORKS` dictionary.

A class has `Args`, its validated arguments, and is made of these alone: `cls(args)`. Arguments that follow from the
data (`shape`, `num_classes`, …) are filled in by who builds it. A module may also list `FAMILIES`: bases of
classes that `named` makes of the name of a model, which recipes write as FAMILY:NAME.
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
    return _listed("NETWORKS")


def network_families() -> dict[str, Any]:
    """The bases of networks that are named FAMILY:NAME, by family."""
    return _listed("FAMILIES")


def network_type(name: str, *, field: str = "network") -> type[nn.Module]:
    """The network of that name.

    Raises:
        ConfigError: no such network; names the nearest. Unavailable: it is of a package that is not there.
    """
    known, families = network_types(), network_families()
    family, separator, model = name.partition(":")
    if separator and family in families:
        made: type[nn.Module] = families[family].named(model, f"{field}.name")
        return made
    if name not in known:
        raise ConfigError(f"no network is called {name!r}{nearest(name, known)}", field=f"{field}.name")
    return known[name]


def arguments_of(name: str, *, field: str = "network") -> type[Config]:
    """The schema of a network's arguments.

    Raises:
        ConfigError, Unavailable: no such network.
    """
    network: Any = network_type(name, field=field)
    args: type[Config] = network.Args
    return args


def _listed(what: str) -> dict[str, Any]:
    listed: dict[str, Any] = {}
    for module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        listed.update(getattr(importlib.import_module(f"{__name__}.{module}"), what, {}))
    return listed


def build_network(
    config: NetworkConfig, facts: Mapping[str, Any] | None = None, *, field: str = "network"
) -> nn.Module:
    """The network that a `[network]` table describes, with fresh weights.

    `facts` of the data (`shape`, `num_classes`, `class_names` …) fill in the arguments of these names.

    Raises:
        ConfigError: no such network, an unknown argument, or one that follows from the data and is given too.
        Unavailable: it is of a package that is not there.
    """
    schema = arguments_of(config.name, field=field)
    fixed = {name: value for name, value in (facts or {}).items() if name in schema.model_fields}
    if taken := sorted(fixed.keys() & config.args.keys()):
        raise ConfigError(
            f"{field}.args.{taken[0]} follows from the data; remove it", field=f"{field}.args.{taken[0]}"
        )
    args = schema.parse({**config.args, **fixed}, where=f"{field}.args")
    return network_type(config.name, field=field)(args)
