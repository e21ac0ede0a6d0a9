"""Fast torch on a GPU: bfloat16, channels last, recorded CUDA graphs, pinned buffers for the answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill_core.method import Cond
from distill_core.networks.diffusers_denoiser import DiffusersDenoiser

MAX_GRAPHS = 16  # recorded, of one model
TIMES = ("timestep", "t")  # names of the time that a network is told
WARM_UPS = 3  # eager calls before a recording, as torch's documentation asks for
log = logging.getLogger(__name__)


def prepare(denoiser: DiffusersDenoiser, device: str, precision: str) -> DiffusersDenoiser:
    """The same model, changed in place: its network and decoder in `precision`, laid out as the device likes."""
    codec: Any = denoiser.codec
    networks = [network for network in (denoiser.network, codec) if network is not None]
    if precision == "bf16":
        for network in networks:
            nn.Module.to(network, torch.bfloat16)  # diffusers' own warns
        denoiser.network.register_forward_pre_hook(_in_bf16, with_kwargs=True)
    if device.startswith("cuda"):
        for network in networks:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-arg]
        levels = denoiser.schedule.log_sigmas
        if levels is not None:  # a copy from the host could not be recorded
            denoiser.schedule.log_sigmas = levels.to(device)
    return denoiser


def _in_bf16(
    _network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """All but the time, which the network embeds in float32 by itself."""
    first, *rest = args
    return (_cast(first), *rest), {k: v if k in TIMES else _cast(v) for k, v in kwargs.items()}


def _cast(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _cast(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_cast(item) for item in value]
    return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value


Guided = Callable[..., Tensor]  # (x_sigma, sigma, cond, guidance), and a time where levels have one -> x0


class Replayed:
    """A `guided` call that is recorded once for each shape of its inputs, and replayed. One thread only.

    Only the scales in `usual` are recorded: any other number is part of a recording too.
    """

    def __init__(
        self, guided: Guided, usual: Iterable[float], record: Callable[..., Any] | None = None
    ) -> None:
        self._guided, self._usual, self._record = guided, frozenset(usual), record or record_graph
        self._recordings: dict[Hashable, tuple[Any, list[Tensor], Tensor]] = {}

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond, guidance: float, *told: Tensor) -> Tensor:
        names, tensors = list(cond), [x, sigma, *cond.values(), *told]

        def call(*inputs: Tensor) -> Tensor:
            values, time = inputs[2 : 2 + len(names)], inputs[2 + len(names) :]
            return self._guided(inputs[0], inputs[1], dict(zip(names, values, strict=True)), guidance, *time)

        named = ("x", "sigma", *names, *("time" for _ in told))
        key = (
            guidance,
            *zip(named, ((value.shape, value.dtype) for value in tensors), strict=True),
        )
        if key not in self._recordings:
            if guidance not in self._usual or len(self._recordings) >= MAX_GRAPHS:
                return call(*tensors)
            try:
                self._recordings[key] = self._record(call, tensors)
            except RuntimeError as error:
                reason = (str(error).splitlines() or ["no reason given"])[0]
                log.warning("a network cannot be recorded as a CUDA graph, so it runs without: %s", reason)
                self._usual = frozenset()
                return call(*tensors)
        graph, inputs, output = self._recordings[key]
        for own, value in zip(inputs, tensors, strict=True):
            own.copy_(value)
        graph.replay()
        return output.clone()


def record_graph(call: Callable[..., Tensor], given: list[Tensor]) -> tuple[Any, list[Tensor], Tensor]:
    """A CUDA graph of `call`, the tensors it reads, and the one it writes."""
    inputs = [value.clone() for value in given]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UPS):
            call(*inputs)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # Other threads load models meanwhile: only this one's calls may not allocate
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = call(*inputs)
    return graph, inputs, output


class HostBuffers:
    """Float32 copies of device tensors on the host, through pinned memory that is kept per shape. One thread only."""

    def __init__(self) -> None:
        self._pinned: dict[torch.Size, Tensor] = {}

    def __call__(self, value: Tensor) -> np.ndarray:
        """A copy on the host."""
        if not value.is_cuda:
            return value.float().numpy()
        if value.shape not in self._pinned:
            if len(self._pinned) >= MAX_GRAPHS:
                self._pinned.clear()
            self._pinned[value.shape] = torch.empty(value.shape, dtype=torch.float32, pin_memory=True)
        buffer = self._pinned[value.shape]
        buffer.copy_(value, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return buffer.numpy().copy()
