"""Trained networks of which each process of a job holds a share: `sharding = "fsdp"`.

FSDP2 (`fully_shard`) keeps of every trained weight one slice a process; optimiser state, EMA and gradients are of the
slice. It gathers a block's weights before the block's passes and frees them after, and averages gradients as it slices
them. A method notices nothing, as long as it reads the weights of a role by calling that role.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import warnings
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from distill_core.errors import ConfigError
from distill_core.method import Method
from distill_core.training.layout import Parts, Replicated, trained

_SMALLEST_UNIT = 1 / 256  # of a network's trained weights; a smaller block is gathered with what holds it
_ADVICE = "leave sharding out, or use a method that shards"


class Sharded(Replicated):
    """Every process holds a share of each trained weight.

    Raises:
        ConfigError: a network that FSDP2 cannot follow; the sentence says why.
    """

    def __init__(self, method: Method, accelerator: Accelerator) -> None:
        self._networks = {role: getattr(method, role) for role in method.roles}
        self._skins: dict[nn.Module, _Skin] = {}
        # Of a network that returns a view, in case somebody changes that in place: the backward pass would say so.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for role, network in self._networks.items():
            self._shard(role, network, mesh)
        super().__init__(method, accelerator)
        self.leaves = {role: self._gathered_leaves(role) for role in self._networks}

    def _shard(self, role: str, network: nn.Module, mesh: DeviceMesh) -> None:
        _check(role, network)
        before = {module: _Skin.of(module) for module in network.modules()}
        originals = {name: weakref.ref(p) for name, p in network.named_parameters() if p.requires_grad}
        frozen = {p for p in network.parameters() if not p.requires_grad}
        for unit in [*_units(network), network]:
            fully_shard(unit, mesh=mesh, ignored_params=frozen)
        assert isinstance(network, FSDPModule)
        # Which weights a pass uses may differ between processes, and what they send must not.
        network.set_reduce_scatter_unused_params(True)
        for name in _entries(type(network)):
            register_fsdp_forward_method(network, name)
        gc.collect()
        held = [name for name, original in originals.items() if original() is not None]
        if held:
            raise ConfigError(
                f"sharding = 'fsdp' cannot follow {role}: {held[0]} is also used from outside of it, as low-rank "
                f"adapters and shared weights are; {_ADVICE}",
                field="sharding",
            )
        self._skins |= {module: skin.worn_under(module) for module, skin in before.items()}

    def _gathered_leaves(self, role: str) -> list[nn.Parameter]:
        """The whole weights that passes see, the same ones every time; their gradients become those of the shares."""
        units = self._units(role)
        for unit in units:
            unit.unshard()
        leaves = trained(self._networks[role])
        for unit in units:
            unit.reshard()
        return leaves

    def _units(self, role: str) -> list[FSDPModule]:
        return [module for module in self._networks[role].modules() if isinstance(module, FSDPModule)]

    def average(self, role: str) -> None:
        """Gradients are averaged already; those that no process has are zeros, as without sharding."""
        for other in self._networks:
            for unit in self._units(other):
                unit.reshard()  # what a pass without gradients left gathered would miss the step that follows
        reached = any(parameter.grad is not None for parameter in self.parameters[role])
        if not reached or any(leaf.grad is not None for leaf in self.leaves[role]):
            what = "not all weights" if reached else "no weight"
            raise ConfigError(
                f"sharding = 'fsdp' cannot follow this method: its loss reaches {what} of {role} through tensors "
                f"that a call of {role} returned; {_ADVICE}",
                field="sharding",
            )
        for parameter in self.parameters[role]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
            said = (str(error).splitlines() or [""])[0].rstrip(".")
            if not any(word in str(error) for word in ("DTensor", "FSDP", "storage")):
                raise
            raise ConfigError(
                f"sharding = 'fsdp' cannot follow this method: it uses a network's weights outside of a call of the "
                f"network ({said}); {_ADVICE}",
                field="sharding",
            ) from error

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            gathered: dict[Tensor, nn.Parameter] = {}
            for role in self._networks:
                for unit in self._units(role):
                    unit.reshard()
            for module, skin in self._skins.items():
                parameters = {name: self._whole(p, gathered) for name, p in module._parameters.items()}
                if self.keeps:
                    stack.enter_context(skin.on(module, parameters))
            yield

    def _whole(
        self, parameter: nn.Parameter | None, gathered: dict[Tensor, nn.Parameter]
    ) -> nn.Parameter | None:
        if not isinstance(parameter, DTensor):
            return parameter
        if parameter not in gathered:
            full = parameter.detach().full_tensor()
            gathered[parameter] = nn.Parameter(full if self.keeps else full.new_empty(0))
        return gathered[parameter]

    def gathered(self, tensors: Parts) -> Parts:
        whole = {
            part: {name: self._full(value) for name, value in values.items()}
            for part, values in tensors.items()
        }
        return whole if self.keeps else {}

    def _full(self, value: Tensor) -> Tensor:
        if not isinstance(value, DTensor):
            return value
        share = value.detach()
        assert isinstance(share, DTensor)
        full: Tensor = share.full_tensor()
        return full.cpu() if self.keeps else full.new_empty(0)  # one at a time: they need not fit together


class _Skin(NamedTuple):
    """What `fully_shard` changes of a module beside its parameters: its class, its hooks, and entries that it adds."""

    cls: type
    hooks: dict[str, Any]
    names: frozenset[str]  # of all entries; of those that it added, once worn

    @classmethod
    def of(cls, module: nn.Module) -> _Skin:
        hooks = {name: copy.copy(value) for name, value in vars(module).items() if "_hooks" in name}
        return cls(type(module), hooks, frozenset(vars(module)))

    def worn_under(self, module: nn.Module) -> _Skin:
        return self._replace(names=frozenset(vars(module)) - self.names)

    @contextlib.contextmanager
    def on(self, module: nn.Module, parameters: dict[str, nn.Parameter | None]) -> Iterator[None]:
        """The module as it was, with these parameters, for the duration."""
        changed = {name: vars(module)[name] for name in (*self.hooks, *self.names, "_parameters")}
        worn = type(module)
        for name in self.names:
            del vars(module)[name]
        vars(module).update(self.hooks, _parameters=parameters)
        module.__class__ = self.cls
        try:
            yield
        finally:
            module.__class__ = worn
            vars(module).update(changed)


def _check(role: str, network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        if isinstance(parameter, DTensor):
            raise ConfigError(
                f"sharding = 'fsdp' cannot follow {role}: it shares {name} with another role; {_ADVICE}",
                field="sharding",
            )
        if parameter.requires_grad and parameter.ndim == 0:
            raise ConfigError(
                f"sharding = 'fsdp' cannot divide {role}.{name}, a single number; {_ADVICE}", field="sharding"
            )


def _units(network: nn.Module) -> list[nn.Module]:
    """What is gathered and freed by itself, inner modules first: blocks of some size, and what is called apart."""
    smallest = _SMALLEST_UNIT * _size(network)
    wanted: set[nn.Module] = set()
    found: list[nn.Module] = []
    for module in _always_run(network):
        if isinstance(module, nn.ModuleList):
            wanted |= {block for block in module if block is not None and _size(block) > smallest}
        wanted |= set(getattr(module, "called_apart", ()))
        if module in wanted and not isinstance(module, nn.ModuleList):
            found.append(module)
    return found[::-1]  # a module came before what it holds


def _size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in trained(network))


def _always_run(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that every process runs in every pass: it takes all of them to gather one."""
    yield module
    if not getattr(module, "runs_in_part", False):
        for child in module.children():
            yield from _always_run(child)


def _entries(network: type) -> list[str]:
    """Names of the methods beside `forward` that a caller may use weights through."""
    return [
        name
        for name in dir(network)
        if not name.startswith("_")
        and not hasattr(nn.Module, name)
        and not hasattr(FSDPModule, name)
        and inspect.isfunction(inspect.getattr_static(network, name))
    ]
