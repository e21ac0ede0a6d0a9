"""TensorRT engines beside their `engine.json`: what they were built by, and running them here. By TensorRT 10 and 11.

An engine runs only on the kind of GPU and with the TensorRT version it was built for: `engine.json` beside it
says which, and `open_engine` refuses all others. Nothing here imports tensorrt before it is needed.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from distill_core.config import Config
from distill_core.errors import ArtifactError, ConfigError, Unavailable, missing_package

ENGINE = "engine.json"
Arrays = dict[str, np.ndarray]
Profile = dict[str, tuple[tuple[int, ...], ...]]  # input -> smallest, best, largest shape

log = logging.getLogger(__name__)


class Host(Config):
    """Machine that an engine depends on."""

    tensorrt: str
    gpu: str
    compute_capability: str

    def __str__(self) -> str:
        return f"TensorRT {self.tensorrt} on {self.gpu} (compute capability {self.compute_capability})"


class EngineFile(Config):
    plan: str  # file name
    onnx_sha256: str  # of the graph it was built from
    profile: Profile


class EngineInfo(Config):
    """Content of `engine.json`."""

    target: str
    host: Host
    engines: tuple[EngineFile, ...]


def this_host() -> Host:
    """This machine's TensorRT and GPU.

    Raises:
        Unavailable: there is no NVIDIA GPU, or TensorRT is not installed.
    """
    if not torch.cuda.is_available():
        raise Unavailable(
            "TensorRT targets need an NVIDIA GPU and a CUDA build of torch, and there is none here; use a "
            "machine that has one, or choose onnx-fp32",
            field="target",
        )
    major, minor = torch.cuda.get_device_capability()
    version = import_tensorrt().__version__
    return Host(tensorrt=version, gpu=torch.cuda.get_device_name(), compute_capability=f"{major}.{minor}")


def read_info(folder: Path) -> EngineInfo:
    """The folder's `engine.json`.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    try:
        return EngineInfo.model_validate_json((folder / ENGINE).read_bytes())
    except (OSError, ValueError, ConfigError) as error:
        raise ArtifactError(f"{ENGINE} in {folder.name} cannot be read; convert the model again") from error


def require_host(folder: Path, host: Host) -> EngineInfo:
    """The folder's `engine.json`, if its engines can run `host`.

    Raises:
        ArtifactError: they cannot; it says how to rebuild them.
    """
    info = read_info(folder)
    if info.host != host:
        raise ArtifactError(f"this engine was built by {info.host}, and here is {host}; {_rebuild(info)}")
    return info


def open_engine(folder: Path, name: str, host: Host) -> Engine:
    """The engine `<name>.plan` of `folder`, on this machine, which is `host`.

    Raises:
        ArtifactError: built for another GPU or TensorRT version, or damaged; it says how to rebuild.
    """
    info = require_host(folder, host)
    trt, path = import_tensorrt(), folder / f"{name}.plan"
    try:
        plan = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path.name} cannot be read: {error.strerror}; {_rebuild(info)}") from None
    opened = trt.Runtime(trt_logger(trt)).deserialize_cuda_engine(plan)
    if opened is None:
        raise ArtifactError(f"{path.name} is damaged; {_rebuild(info)}")
    profiles = {file.plan: file.profile for file in info.engines}
    return Engine(trt, opened, profiles.get(path.name, {}))


class _Buffers(NamedTuple):
    inputs: dict[str, torch.Tensor]
    output: torch.Tensor
    host: torch.Tensor  # pinned


class Engine:
    """One engine as a function of its named inputs. An execution context belongs to one thread at a time.

    Buffers are kept per shape of the inputs, so that a repeated batch size allocates nothing.
    """

    def __init__(self, trt: Any, engine: Any, profile: Profile) -> None:
        self._trt, self._engine, self._profile = trt, engine, profile
        self._context = engine.create_execution_context()
        self._stream = torch.cuda.Stream()
        self.inputs = self._names(trt.TensorIOMode.INPUT)
        (self._output,) = self._names(trt.TensorIOMode.OUTPUT)
        self._buffers: dict[tuple[tuple[str, tuple[int, ...]], ...], _Buffers] = {}

    def __call__(self, inputs: Arrays) -> np.ndarray:
        """One evaluation; every input has the batch first.

        Raises:
            ArtifactError: TensorRT refuses, e.g. a batch outside the engine's profile.
        """
        with torch.cuda.stream(self._stream):
            held = self._prepared(inputs)
            for name, array in inputs.items():
                held.inputs[name].copy_(torch.from_numpy(np.ascontiguousarray(array)), non_blocking=True)
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                batch = len(next(iter(inputs.values())))
                raise ArtifactError(f"TensorRT could not evaluate a batch of {batch}")
            held.host.copy_(held.output, non_blocking=True)
        self._stream.synchronize()
        return held.host.numpy().copy()

    def named(self, inputs: Arrays) -> Arrays:
        """Its one output by name."""
        return {self._output: self(inputs)}

    def _prepared(self, inputs: Arrays) -> _Buffers:
        """The buffers for inputs of these shapes, told to the context."""
        shapes = tuple((name, array.shape) for name, array in inputs.items())
        for name, shape in shapes:
            if not self._context.set_input_shape(name, shape):
                raise ArtifactError(
                    f"this engine takes no {name} of shape {shape}; its profile is {self._profile.get(name)}"
                )
        if shapes not in self._buffers:
            self._buffers[shapes] = self._allocated(inputs)
        held = self._buffers[shapes]
        for name, tensor in (*held.inputs.items(), (self._output, held.output)):
            self._context.set_tensor_address(name, tensor.data_ptr())
        return held

    def _allocated(self, inputs: Arrays) -> _Buffers:
        buffers = {name: torch.from_numpy(np.array(array)).cuda() for name, array in inputs.items()}
        shape = tuple(self._context.get_tensor_shape(self._output))
        output = torch.empty(shape, dtype=torch.float32, device="cuda")
        return _Buffers(buffers, output, torch.empty(shape, dtype=torch.float32, pin_memory=True))

    def _names(self, mode: Any) -> tuple[str, ...]:
        names = map(self._engine.get_tensor_name, range(self._engine.num_io_tensors))
        return tuple(name for name in names if self._engine.get_tensor_mode(name) == mode)


def import_tensorrt() -> Any:
    """The package.

    Raises:
        Unavailable: it is not installed.
    """
    try:
        import tensorrt
    except ImportError:
        raise missing_package("TensorRT", "trt") from None
    return tensorrt


def trt_logger(trt: Any) -> Any:
    """A logger of TensorRT's kind; `last_error` is what it said last of that severity."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # TensorRT's messages go where ours go
        last_error = "see the log"

        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # super() does not reach the constructor of a bound C++ class

        def log(self, severity: Any, message: str) -> None:
            severe = severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)
            if severe:
                self.last_error = message.strip()
            log.log(logging.ERROR if severe else logging.DEBUG, "tensorrt: %s", message)

    return Logger()


def _rebuild(info: EngineInfo) -> str:
    return f"rebuild it on this machine: distillery convert MODEL --target {info.target}"
