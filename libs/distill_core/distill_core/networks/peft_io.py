"""The only door to peft: low-rank factors put into a network, and taken out of the way."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import peft
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from distill_core.errors import ConfigError, nearest
from distill_core.networks.denoiser import Denoiser


def with_lora(
    denoiser: Denoiser, *, rank: int, alpha: float, targets: tuple[str, ...] | None
) -> tuple[Denoiser, dict[str, nn.Parameter]]:
    """A second module tree over the very same weights with trainable low-rank factors, and these by name.

    `denoiser` gains nothing and loses nothing, but its weights are frozen. `targets` are the ends of the names of
    the layers that get factors; None is every linear layer. The factors are float32 and begin as the identity.

    Raises:
        ConfigError: a target that no layer's name ends with, or a layer that cannot have factors.
    """
    shared = {id(tensor): tensor for tensor in (*denoiser.parameters(), *denoiser.buffers())}
    twin = copy.deepcopy(denoiser, shared)  # what is in the memo is not copied
    network = getattr(twin, "network", twin)
    names = [name for name, layer in network.named_modules() if name and not list(layer.children())]
    for target in targets or ():
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise ConfigError(
                f"no layer of {type(network).__name__} is called {target!r}"
                f"{nearest(target, {name.split('.')[-1] for name in names})}",
                field="lora.targets",
            )
    chosen = targets or [n for n, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    try:
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(chosen))
        peft.inject_adapter_in_model(config, network)
    except ValueError as error:
        raise ConfigError(f"lora.targets are refused: {error}", field="lora.targets") from None
    twin.eval()
    factors = {name: value for name, value in network.named_parameters() if ".lora_" in name}
    for value in factors.values():
        value.data = value.data.float()
    return twin, {name.replace(".default.", "."): value for name, value in factors.items()}


def merge_lora(denoiser: Denoiser) -> Denoiser:
    """`denoiser` itself with its low-rank factors added into the layers they adapt, which are plain again."""
    adapted = [(name, layer) for name, layer in denoiser.named_modules() if isinstance(layer, BaseTunerLayer)]
    for name, layer in adapted:
        layer.merge()
        denoiser.set_submodule(name, layer.get_base_layer())
    network = getattr(denoiser, "network", denoiser)
    if hasattr(network, "peft_config"):
        del network.peft_config
    return denoiser


@contextlib.contextmanager
def lora_off(denoiser: Denoiser) -> Iterator[None]:
    """The weights without their low-rank factors for the duration, whatever happens inside; may be nested."""
    layers = [layer for layer in denoiser.modules() if isinstance(layer, BaseTunerLayer)]
    active = [layer for layer in layers if not layer.disable_adapters]
    flags = [(value, value.requires_grad) for value in denoiser.parameters()]
    try:
        for layer in active:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in active:
            layer.enable_adapters(True)
        for value, flag in flags:  # peft sets them as it likes
            value.requires_grad_(flag)
