"""Fake tensors: models with shapes and without weights. Nothing is read or held, and all that runs, runs as usual.

Inside `fake_tensors()` tensors are torch's fake ones. What a plan needs for real, a noise schedule or a batch of data,
is made inside `real_tensors()`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_inside: ContextVar[bool] = ContextVar("inside fake_tensors", default=False)


class _ZeroScalars(TorchDispatchMode):
    """Reads 0, or True, as the value of a tensor that has none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch._subclasses.fake_tensor import FakeTensor

        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return True if args[0].dtype == torch.bool else args[0].dtype.is_floating_point * 0.0
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    """Copies tensors that have no data as what they are: torch would copy the bytes behind them, and there are none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch._subclasses.fake_tensor import FakeTensor

        if func is not Tensor.__deepcopy__ or not isinstance(args[0], FakeTensor):
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            copied = tensor.detach().clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied
        return memo[id(tensor)]


@contextlib.contextmanager
def _unmoved() -> Iterator[None]:
    """Modules stay on the device and of the type that they were made with: torch cannot move fake ones."""
    apply = nn.Module._apply
    nn.Module._apply = lambda module, fn, recurse=True: module  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = apply  # type: ignore[method-assign]


@contextlib.contextmanager
def _unfilled() -> Iterator[None]:
    """Weights of a truncated normal are left as they are: torch draws until all values fit, and fake ones never do."""
    draw = nn.init._no_grad_trunc_normal_
    nn.init._no_grad_trunc_normal_ = lambda tensor, *args, **options: tensor
    try:
        yield
    finally:
        nn.init._no_grad_trunc_normal_ = draw


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors made inside have a shape, a type and a device, and take no memory."""
    import torch._functorch.config as settings
    from torch._subclasses.fake_tensor import FakeTensorMode  # seconds, and nobody else needs it

    token = _inside.set(True)
    try:
        with settings.patch(fake_tensor_allow_unsafe_data_ptr_access=False):  # an error, not a stray write
            fake = FakeTensorMode(allow_non_fake_inputs=True)
        with _unmoved(), _unfilled(), fake, _ZeroScalars(), _Copies():  # type: ignore[no-untyped-call]
            yield
    finally:
        _inside.reset(token)


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Ordinary tensors, also inside `fake_tensors()`."""
    if not _inside.get():
        yield
        return
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    token = _inside.set(False)
    try:
        with unset_fake_temporarily():
            yield
    finally:
        _inside.reset(token)


def is_faked() -> bool:
    """Whether models are to be made without reading their weights."""
    return _inside.get()
