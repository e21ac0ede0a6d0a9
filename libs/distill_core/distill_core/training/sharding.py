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
from distill_core.training.strategy import Parts, Replicated, trained

_SMALLEST_UNIT = 1 / 256  # of a network's trained weights; a smaller block is gathered with what holds it
_ADVICE = "leave sharding out, or use a method that shards"


class Sharded(Replicated):
    """Every process holds a share of each trained weight.

    Raises:
        ConfigError: a network that FSDP2 cannot follow; the sentence says why.
    """

    def __init__(self, method: Method, accelerator: Accelerator) -> None:
        self._networks = {role: getattr(method, role) for role in method.roles}
        self._unsharded: dict[nn.Module, _Unsharded] = {}
        # Of a network that returns a view, in case somebody changes that in place: the backward pass would say so.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for role, network in self._networks.items():
            self._shard(role, network, mesh)
        super().__init__(method, accelerator)
        self.leaves = {role: self._gathered_leaves(role) for role in self._networks}

    def _shard(self, role: str, network: nn.Module, mesh: DeviceMesh) -> None:
        _check(role, network)
        before = {module: _Unsharded.of(module) for module in network.modules()}
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
        self._unsharded |= {module: state.after_sharding(module) for module, state in before.items()}

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
            reason = (str(error).splitlines() or [""])[0].rstrip(".")
            if not any(word in str(error) for word in ("DTensor", "FSDP", "storage")):
                raise
            raise ConfigError(
                f"sharding = 'fsdp' cannot follow this method: it uses a network's weights outside of a call of the "
                f"network ({reason}); {_ADVICE}",
                field="sharding",
            ) from error

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            gathered: dict[Tensor, nn.Parameter] = {}
            for role in self._networks:
                for unit in self._units(role):
                    unit.reshard()
            for module, state in self._unsharded.items():
                parameters = {name: self._whole(p, gathered) for name, p in module._parameters.items()}
                if self.keeps:
                    stack.enter_context(state.restored(module, parameters))
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


class _Unsharded(NamedTuple):
    """State of a module that `fully_shard` changes beside parameters: its class, hooks, and entries that it adds."""

    cls: type
    hooks: dict[str, Any]
    names: frozenset[str]  # of all entries; once sharded, of those that it added

    @classmethod
    def of(cls, module: nn.Module) -> _Unsharded:
        hooks = {name: copy.copy(value) for name, value in vars(module).items() if "_hooks" in name}
        return cls(type(module), hooks, frozenset(vars(module)))

    def after_sharding(self, module: nn.Module) -> _Unsharded:
        return self._replace(names=frozenset(vars(module)) - self.names)

    @contextlib.contextmanager
    def restored(self, module: nn.Module, parameters: dict[str, nn.Parameter | None]) -> Iterator[None]:
        """The module as it was, with these parameters, for the duration."""
        changed = {name: vars(module)[name] for name in (*self.hooks, *self.names, "_parameters")}
        sharded = type(module)
        for name in self.names:
            del vars(module)[name]
        vars(module).update(self.hooks, _parameters=parameters)
        module.__class__ = self.cls
        try:
            yield
        finally:
            module.__class__ = sharded
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
    """Modules that are gathered and freed on their own, inner ones first: large blocks, and those called apart."""
    smallest = _SMALLEST_UNIT * _size(network)
    chosen: set[nn.Module] = set()
    units: list[nn.Module] = []
    for module in _always_run(network):
        if isinstance(module, nn.ModuleList):
            chosen |= {block for block in module if block is not None and _size(block) > smallest}
        chosen |= set(getattr(module, "called_apart", ()))
        if module in chosen and not isinstance(module, nn.ModuleList):
            units.append(module)
    return units[::-1]  # a module came before what it holds


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
