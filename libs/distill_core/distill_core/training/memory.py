"""Memory that a training run needs, measured without having it: one step of the real loop on fake tensors.

    at the peak = weights + optimiser state + EMA + the most that is alive at once in a step

The last term holds activations, gradients and temporaries; they are counted tensor by tensor as the step makes and
frees them, so gradient checkpointing, autocast's copies and graphs that live side by side are in it. What an
allocator adds (rounding, fragments, library workspaces) is not: leave a tenth for it.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from distill_core.data.source import Source
from distill_core.errors import ConfigError
from distill_core.method import Batch, Method
from distill_core.networks.fake_tensors import real_tensors
from distill_core.recipe import Recipe
from distill_core.training.batches import Batches, Draw
from distill_core.training.loop import Trainer
from distill_core.training.run_folder import Run


@dataclass(frozen=True)
class Part:
    """One network of a method; counts are of its own tensors, those shared with an earlier part left out."""

    name: str
    role: bool  # whether it is trained
    parameters: int
    trained: int  # of these
    weights: int  # bytes, buffers included
    shared: int  # bytes of weights that it uses and an earlier part holds
    gradients: int  # bytes, only while its role is stepped
    optimizer: int  # bytes of state
    ema: int  # bytes


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that one process needs."""

    parts: tuple[Part, ...]
    activations: int  # the most that is alive, gradients aside, when a backward pass begins
    step: int  # the most that is alive in a step beyond the parts' weights, optimiser state and EMA
    processes: int = 1  # among which what is trained is divided

    @property
    def standing(self) -> int:
        """Weights, optimiser state and EMA."""
        return sum(part.weights + part.optimizer + part.ema for part in self.parts)

    @property
    def total(self) -> int:
        """At the peak of a step."""
        return self.standing + self.step

    def sharded(self, processes: int) -> MemoryPlan:
        """What each of several processes needs where they divide what is trained among them (`sharding = "fsdp"`).

        The step has room for one whole network, as if all its blocks were gathered at once.
        """
        gathered = max(part.gradients for part in self.parts)
        divided = tuple(_divided(part, processes) for part in self.parts)
        return MemoryPlan(divided, self.activations, self.step + gathered, processes)

    def processes_for(self, memory: int) -> int | None:
        """The fewest processes, 2 to 64, that hold it sharded in `memory` bytes each; None if none do, or it is."""
        if self.processes > 1:
            return None
        return next((count for count in SHARDS if self.sharded(count).total <= memory), None)


SHARDS = (2, 4, 8, 16, 32, 64)  # numbers of processes that are looked at


class Unplannable(ConfigError):
    """A method whose step depends on the values of its tensors, which a plan does not have."""


class Device(NamedTuple):
    """The device that trains here, and its memory in bytes."""

    name: str
    memory: int
    is_gpu: bool


def training_device() -> Device:
    """The first GPU, or this machine."""
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        return Device(gpu.name, gpu.total_memory, is_gpu=True)
    return Device("this machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), is_gpu=False)


def too_large(plan: MemoryPlan, device: Device) -> str | None:
    """A sentence for a plan that the device cannot hold; None for one that it can."""
    if plan.total <= device.memory:
        return None
    if plan.standing > device.memory:
        return _no_batch_fits(plan, device)
    return (
        f"training needs {plan.total / 2**30:.1f} GiB and {device.name} has {device.memory / 2**30:.1f}; lower "
        "batch_size, raise accumulate, set student.gradient_checkpointing = true, precision = 'bf16' or student.lora"
    )


def _no_batch_fits(plan: MemoryPlan, device: Device) -> str:
    count = plan.processes_for(device.memory)
    shared = (
        "" if count is None else f"processes = {count} with sharding = 'fsdp' (as many devices like it), or "
    )
    return (
        f"training needs {plan.total / 2**30:.1f} GiB, {plan.standing / 2**30:.1f} of them for weights, optimiser and "
        f"EMA whatever the batch, and {device.name} has {device.memory / 2**30:.1f}; set {shared}student.lora"
    )


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside and not freed yet: `now`, and `peak` so far."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {
            _storage(value)._cdata for value in _tensors((args, kwargs))
        }  # what works in place makes nothing
        result = func(*args, **(kwargs or {}))
        for value in (
            () if func.is_view else _tensors(result)
        ):  # a fake tensor's view may have a storage of its own
            storage = _storage(value)
            if storage._cdata not in known and storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def plan_memory(method: Method, source: Source, recipe: Recipe) -> MemoryPlan:
    """The memory that training `method` as `recipe` says needs; under `fake_tensors()` it costs seconds and no memory.

    Takes a step of the method, so its weights change where there are any. Of several processes each has its share of
    the batch, and where networks are sharded, its share of them.

    Raises:
        Unplannable: the method decides by the values of tensors, which fake ones do not have.
    """
    if recipe.precision == "fp16":
        recipe = recipe.model_copy(update={"precision": "bf16"})  # of the same size, and a CPU has no fp16
    processes = recipe.processes or 1
    recipe = recipe.model_copy(update={"batch_size": recipe.batch_size // processes})
    with tempfile.TemporaryDirectory(prefix="distillery-plan-") as folder:
        trainer = Trainer(method, source, recipe, Run(Path(folder)), cpu=True)
        trainer.batches = _FakedBatches(source, recipe, rank=0, world=1)
        _make_optimizer_state(trainer)
        held: list[int] = []
        with (
            refusing_values(recipe.method),
            LiveBytes() as live,
            _before_backward(trainer, lambda: held.append(live.now - _gradients(trainer))),
        ):
            trainer.train_step()
    planned = MemoryPlan(tuple(_parts(trainer)), max(held, default=0), live.peak)
    return planned if recipe.sharding is None else planned.sharded(processes)


def _divided(part: Part, processes: int) -> Part:
    """The share of a part that one of several processes holds; they divide all that is trained."""
    others = part.gradients - part.gradients // processes  # bytes of trained weights
    return replace(
        part,
        weights=part.weights - others,
        gradients=part.gradients - others,
        optimizer=part.optimizer // processes,
        ema=part.ema - others if part.ema else 0,
    )


@contextmanager
def refusing_values(method: str) -> Iterator[None]:
    """Turns what torch says where a program asks fake tensors for more than shapes into `Unplannable`."""
    try:
        yield
    except (NotImplementedError, RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise Unplannable(
            f"the memory of method {method} cannot be planned, since it decides by values that a plan "
            f"does not have ({reason}); train a few steps and watch the device",
            field="method",
        ) from error


class _FakedBatches(Batches):
    """Batches read as real ones, whatever the mode, since sources look values up; then tensors of the mode."""

    def of(self, step: int, draw: Draw) -> list[Batch]:
        with real_tensors():
            batches = super().of(step, draw)
        return [_faked(batch) for batch in batches]


def _faked(batch: Batch) -> Batch:
    """The same batch as tensors of the mode that is on."""

    def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.empty_like(value).copy_(value) for name, value in tensors.items()}

    also = {name: _faked(other) for name, other in batch.also.items()}
    return Batch(batch.index, copied(batch.columns), copied(batch.cond), copied(batch.view), also)


def _make_optimizer_state(trainer: Trainer) -> None:
    """Make the optimisers allocate what they do at their first step."""
    for role, optimizer in trainer.optimizers.items():
        for parameter in trainer.parameters[role]:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for parameter in trainer.parameters[role]:
            parameter.grad = None


def _gradients(trainer: Trainer) -> int:
    return sum(_bytes(p.grad) for values in trainer.parameters.values() for p in values if p.grad is not None)


@contextmanager
def _before_backward(trainer: Trainer, note: Callable[[], None]) -> Iterator[None]:
    backward = trainer.accelerator.backward

    def noted(*args: Any, **options: Any) -> None:
        note()
        backward(*args, **options)

    trainer.accelerator.backward = noted
    try:
        yield
    finally:
        del trainer.accelerator.backward  # the class's own method shows again


def _parts(trainer: Trainer) -> Iterator[Part]:
    seen: set[int] = set()
    children = dict(trainer.method.named_children())
    frozen = [name for name in children if name not in trainer.method.roles]
    for name in (*frozen, *trainer.method.roles):
        yield _part(name, children[name], trainer, seen)
        for companion, module in _companions(children[name]):
            if any(_storage(value)._cdata not in seen for value in module.parameters()):
                yield _part(f"{name}'s {companion}", module, trainer, seen)


def _part(name: str, module: nn.Module, trainer: Trainer, seen: set[int]) -> Part:
    """The part of `module` beyond what was `seen`, which it is added to."""
    trees = [module, *_adapted(module)]
    parameters = _unseen((value for tree in trees for value in tree.parameters()), seen)
    buffers = _unseen((value for tree in trees for value in tree.buffers()), seen)
    used = {_storage(v)._cdata: _bytes(v) for tree in trees for v in (*tree.parameters(), *tree.buffers())}
    trained = trainer.parameters.get(name, [])
    state = trainer.optimizers[name].state.values() if name in trainer.optimizers else ()
    own = sum(map(_bytes, (*parameters, *buffers)))
    seen.update(used)
    return Part(
        name=name,
        role=name in trainer.method.roles,
        parameters=sum(value.numel() for value in parameters),
        trained=sum(value.numel() for value in trained),
        weights=own,
        shared=sum(used.values()) - own,
        gradients=sum(map(_bytes, trained)),
        optimizer=sum(_bytes(value) for held in state for value in _tensors(held)),
        ema=sum(map(_bytes, trainer.emas[name].weights.values())) if name in trainer.emas else 0,
    )


def _adapted(module: nn.Module) -> list[nn.Module]:
    """The base networks under low-rank adapters, which are outside of the module tree."""
    return [
        tree for part in module.modules() if isinstance(tree := getattr(part, "adapted", None), nn.Module)
    ]


def _companions(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Frozen text encoders and picture decoders, which are outside of the module tree."""
    for part in [deep for tree in (module, *_adapted(module)) for deep in tree.modules()]:
        if isinstance(codec := getattr(part, "codec", None), nn.Module):
            yield "picture decoder", codec
        for model in getattr(getattr(part, "text", None), "models", ()):
            yield "text encoder", model


def _unseen(values: Iterable[Tensor], seen: set[int]) -> list[Tensor]:
    return list(
        {_storage(value)._cdata: value for value in values if _storage(value)._cdata not in seen}.values()
    )


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def _storage(value: Tensor) -> torch.UntypedStorage:
    return value.untyped_storage()


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()
