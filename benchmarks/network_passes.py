"""The network passes of a training step: watched in one run of it, then repeated bare, with the same shapes.

A network is what the step calls that is none of Distillery's own classes and has parameters: a diffusers network, a
discriminator's layers, a text encoder. Whether a pass is differentiated, from where in it, and in what, is seen in
the backward passes themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_flatten, tree_map_only

if TYPE_CHECKING:
    from distill_core.training.loop import Trainer


@dataclass
class Pass:
    """One call of a network; `differentiated` once a backward pass has gone through it."""

    network: nn.Module
    args: tuple[Any, ...]
    options: dict[str, Any]
    inner: list[tuple[nn.Module, int]] = field(
        default_factory=list
    )  # its layers' calls, in order: layer, which one
    parameters: Sequence[nn.Parameter] = ()  # that the backward pass was for
    reached: int = -1  # the last inner call that a gradient came to: where it entered
    wanted: set[int] = field(default_factory=set)  # inputs that a gradient left through

    @property
    def differentiated(self) -> bool:
        return self.reached >= 0

    def repeat(self) -> None:
        """The same work again, and nothing else."""
        if not self.differentiated:
            with torch.no_grad():
                self.network(*self.args, **self.options)
            return
        leaves: list[Tensor] = []

        def fresh(value: Tensor) -> Tensor:
            if id(value) not in self.wanted:
                return value
            leaves.append(value.detach().requires_grad_(True))
            return leaves[-1]

        args, options = tree_map_only(Tensor, fresh, (self.args, self.options))
        with _output_of(*self.inner[self.reached]) as seen:
            self.network(*args, **options)
        output = seen[-1]
        own = {id(parameter) for parameter in self.network.parameters()}
        inputs = [parameter for parameter in self.parameters if id(parameter) in own] + leaves
        torch.autograd.grad(output, inputs, torch.ones_like(output), allow_unused=True)


@contextmanager
def _output_of(layer: nn.Module, which: int) -> Iterator[list[Tensor]]:
    """The output of the layer's call number `which`, 0 the first."""
    seen: list[Tensor] = []
    calls = 0

    def keep(_layer: nn.Module, _args: Any, output: Any) -> None:
        nonlocal calls
        if calls == which:
            seen.append(_tensors(output)[0])
        calls += 1

    handle = layer.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def passes_of_a_step(trainer: Trainer) -> list[Pass]:
    """Take one training step, and say which network passes it consisted of."""
    watch = _Watch(trainer)
    with watch.watching():
        trainer.train_step()
    return watch.passes


class _Watch:
    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.passes: list[Pass] = []
        self._open: list[tuple[nn.Module, Any]] = []  # the network being called, with its layers' outputs
        self._depth, self._backward = 0, False
        self._inputs: Sequence[nn.Parameter] = ()

    @contextmanager
    def watching(self) -> Iterator[None]:
        accelerator = self.trainer.accelerator
        backward = accelerator.backward

        def watched(loss: Tensor, *, inputs: Sequence[nn.Parameter]) -> None:
            self._inputs = inputs
            self._backward = True  # what is called inside is a recomputation, part of the pass it belongs to
            try:
                backward(loss, inputs=inputs)
            finally:
                self._backward = False

        hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, with_kwargs=True),
        ]
        accelerator.backward = watched
        try:
            yield
        finally:
            del accelerator.backward  # the class's own method shows again
            for hook in hooks:
                hook.remove()

    def _is_watched(self, module: nn.Module) -> bool:
        return not self._backward and not type(module).__module__.startswith("distill_core.")

    def _enter(self, module: nn.Module, _args: Any) -> None:
        if self._is_watched(module):
            if not self._depth:
                self._open = []
            self._depth += 1

    def _leave(self, module: nn.Module, args: Any, options: Any, output: Any) -> None:
        if not self._is_watched(module):
            return
        self._depth -= 1
        self._open.append((module, output))
        if self._depth == 0 and any(True for _ in module.parameters()):
            self.passes.append(self._pass(module, args, options))

    def _pass(self, network: nn.Module, args: Any, options: Any) -> Pass:
        detached = tree_map_only(Tensor, lambda value: value.detach(), (args, options))
        network_pass = Pass(network, *detached)
        calls: dict[int, int] = {}
        for layer, output in self._open:
            which = calls.get(id(layer), 0)
            calls[id(layer)] = which + 1
            network_pass.inner.append((layer, which))
            for value in _tensors(output)[:1]:
                if value.requires_grad:
                    value.register_hook(self._reached(network_pass, len(network_pass.inner) - 1))
        for given, kept in zip(_tensors((args, options)), _tensors(detached), strict=True):
            if given.requires_grad:
                given.register_hook(self._left(network_pass, id(kept)))
        return network_pass

    def _reached(self, found: Pass, number: int) -> Any:
        def on_gradient(_gradient: Tensor) -> None:
            found.reached = max(found.reached, number)
            found.parameters = self._inputs

        return on_gradient

    def _left(self, found: Pass, kept: int) -> Any:
        return lambda _gradient: found.wanted.add(kept)
