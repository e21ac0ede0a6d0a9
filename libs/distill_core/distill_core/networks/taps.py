"""Features of a network by the path of the module that gives them, caught while it runs: no network is changed for it.

A path is a name of `named_modules`, e.g. `blocks.1` or `model.vit.encoder.layer.3`. `dry_run` looks at all of them
before anything is trained: a path that is not there, or that gives no features, is an error of one sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distill_core.errors import ConfigError, nearest
from distill_core.networks.modes import evaluating


def tapped(
    network: nn.Module, paths: Sequence[str], x: Tensor, *, field: str = "config.taps"
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of `network` for `x`, and the output of the module at each path.

    Of a module that gives several tensors it is the first; of one that runs several times the last.

    Raises:
        ConfigError: a path that the network does not have (the nearest is named), or that `x` does not reach.
    """
    with tapping(network, paths, field=field) as found:
        out: Tensor = network(x)
    return out, {path: found[path] for path in paths}


@contextmanager
def tapping(
    network: nn.Module, paths: Sequence[str], *, field: str = "config.taps"
) -> Iterator[dict[str, Tensor]]:
    """The outputs of the modules at these paths, by path, as they run in the block.

    Raises:
        ConfigError: as `tapped`.
    """
    found: dict[str, Tensor] = {}
    modules = dict(network.named_modules())
    handles = []
    try:
        for path in paths:
            handles.append(_module(modules, path, field).register_forward_hook(_keeping(found, path)))
        yield found
    finally:
        for handle in handles:
            handle.remove()
    if missed := [path for path in paths if path not in found]:
        raise ConfigError(
            f"{field} names {missed[0]!r}, which gives no tensor when the network runs; choose another module",
            field=field,
        )


@torch.no_grad()
def dry_run(
    network: nn.Module, paths: Sequence[str], shape: tuple[int, ...], *, field: str = "config.taps"
) -> Mapping[str, tuple[int, ...]]:
    """Shapes, without the batch, of the features at `paths` for items of `shape`: (C, H, W), (N, D) or (D,).

    Raises:
        ConfigError: as `tapped`, and for what is not a batch of such features.
    """
    with evaluating(network):
        _, found = tapped(network, paths, torch.zeros(2, *shape), field=field)
    for path, features in found.items():
        if features.ndim not in (2, 3, 4) or len(features) != 2 or not features.is_floating_point():
            raise ConfigError(
                f"{field} names {path!r}, which gives {tuple(features.shape)} for two pictures; features are "
                "(2, C, H, W), (2, N, D) or (2, D)",
                field=field,
            )
    return {path: tuple(features.shape[1:]) for path, features in found.items()}


def _module(modules: Mapping[str, nn.Module], path: str, field: str) -> nn.Module:
    if path not in modules or not path:
        raise ConfigError(
            f"{field} names {path!r}, and the network has no such module{nearest(path, filter(None, modules))}",
            field=field,
        )
    return modules[path]


def _keeping(found: dict[str, Tensor], path: str) -> Callable[[nn.Module, Any, Any], None]:
    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor):
            found[path] = first

    return keep
