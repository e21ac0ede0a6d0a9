"""ONNX files as TensorRT engines, by the API of TensorRT 10 and 11: strongly typed, as the ONNX says.

An engine runs only on the kind of GPU and with the TensorRT version it was built for: `engine.json` beside it
says which, and `open_engine` refuses all others. Nothing here imports tensorrt before it is needed.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill_core.config import Config
from distill_core.errors import ArtifactError, ConfigError, Unavailable, missing_package
from distillery_converter.graphs import EXAMPLE_BATCH, Arrays, Graph

ENGINE = "engine.json"
MAX_BATCH = 32  # largest batch of the optimisation profile
BEST_BATCH = 8  # the batch that kernels are chosen for
WORKSPACE_BYTES = 4 * 2**30
OPTIMISATION_LEVEL = 3  # TensorRT's own default, of 0 to 5

log = logging.getLogger(__name__)
Profile = dict[
    str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
]  # input -> smallest, best, largest shape


class Host(Config):
    """What an engine depends on."""

    tensorrt: str
    gpu: str
    compute_capability: str

    def __str__(self) -> str:
        return f"TensorRT {self.tensorrt} on {self.gpu} (compute capability {self.compute_capability})"


class EngineFile(Config):
    plan: str  # file name
    onnx_sha256: str  # of the graph it was built from
    profile: dict[str, tuple[tuple[int, ...], ...]]


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
            "TensorRT targets need an NVIDIA GPU and a CUDA build of torch, and there is none here; run the "
            "converter on a machine that has one, or choose onnx-fp32",
            field="target",
        )
    major, minor = torch.cuda.get_device_capability()
    return Host(
        tensorrt=_trt().__version__, gpu=torch.cuda.get_device_name(), compute_capability=f"{major}.{minor}"
    )


def tool_versions() -> dict[str, str]:
    """What decides an engine's content beside the ONNX tools; see `this_host`."""
    return this_host().model_dump()


def build(
    sources: list[Path], graphs: list[Graph], folder: Path, *, target: str, cache: Path
) -> list[Callable[[Arrays], np.ndarray]]:
    """Build `<graph>.plan` for each ONNX file into `folder` with `engine.json`; the engines as functions.

    `cache` keeps kernel timings per GPU and TensorRT version: the next build on this machine is much faster.

    Raises:
        Unavailable: no GPU or no TensorRT here. ArtifactError: TensorRT refuses a graph; it says why.
    """
    host = this_host()
    folder.mkdir(parents=True, exist_ok=True)
    engines = []
    for source, graph in zip(sources, graphs, strict=True):
        profile = profile_of(graph)
        plan = folder / f"{graph.name}.plan"
        plan.write_bytes(build_plan(source, profile, timings=_timing_file(cache, host)))
        engines.append(EngineFile(plan=plan.name, onnx_sha256=_sha256(source), profile=profile))
    info = EngineInfo(target=target, host=host, engines=tuple(engines))
    (folder / ENGINE).write_text(info.model_dump_json(indent=1), encoding="utf-8")
    return [open_engine(folder, graph.name) for graph in graphs]


def profile_of(graph: Graph) -> Profile:
    """Batches 1 to `MAX_BATCH`, kernels chosen for `BEST_BATCH`; all other axes are fixed."""
    shapes = {name: array.shape[1:] for name, array in graph.inputs(EXAMPLE_BATCH).items()}
    return {name: ((1, *shape), (BEST_BATCH, *shape), (MAX_BATCH, *shape)) for name, shape in shapes.items()}


def build_plan(source: Path, profile: Profile, *, timings: Path) -> bytes:
    """The serialised engine of one ONNX file."""
    trt = _trt()
    logger = _logger(trt)
    builder = trt.Builder(logger)
    # Needed on TensorRT 10, where weak typing is the default; accepted and without effect on 11.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, logger, source)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    config.builder_optimization_level = OPTIMISATION_LEVEL
    _add_profile(builder, config, profile)
    _read_timings(config, timings)
    plan = builder.build_serialized_network(network, config)
    if plan is None:  # TensorRT's way to say that it failed; the reason is in its log
        raise ArtifactError(f"TensorRT {trt.__version__} could not build {source.name}: {logger.last_error}")
    _write_timings(config, timings)
    return bytes(plan)


def open_engine(folder: Path, name: str) -> Callable[[Arrays], np.ndarray]:
    """The engine `<name>.plan` of `folder`, as a function of its named inputs.

    Raises:
        ArtifactError: built for another GPU or TensorRT version, or damaged; it says how to rebuild.
    """
    info = require_host(folder, this_host())
    trt = _trt()
    engine = trt.Runtime(_logger(trt)).deserialize_cuda_engine((folder / f"{name}.plan").read_bytes())
    if engine is None:
        raise ArtifactError(f"{name}.plan is damaged; {_rebuild(info)}")
    context = engine.create_execution_context()
    return lambda inputs: _execute(trt, engine, context, inputs)


def require_host(folder: Path, here: Host) -> EngineInfo:
    """The folder's `engine.json`, if its engines can run `here`."""
    try:
        info = EngineInfo.model_validate_json((folder / ENGINE).read_bytes())
    except (OSError, ValueError, ConfigError) as error:
        raise ArtifactError(f"{ENGINE} in {folder.name} cannot be read; convert the model again") from error
    if info.host != here:
        raise ArtifactError(f"this engine was built by {info.host}, and here is {here}; {_rebuild(info)}")
    return info


def _rebuild(info: EngineInfo) -> str:
    return f"rebuild it on this machine: distillery convert MODEL --target {info.target}"


def _trt() -> Any:
    try:
        import tensorrt
    except ImportError:
        raise missing_package("TensorRT", "trt") from None
    return tensorrt


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # TensorRT's messages go where ours go
        last_error = "see the log"

        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # super() does not reach the constructor of a bound C++ class

        def log(self, severity: Any, message: str) -> None:
            severe = severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)
            if severe:
                self.last_error = message.strip()
            log.log(logging.ERROR if severe else logging.DEBUG, "tensorrt: %s", message)

    return Logger()


def _parse(trt: Any, network: Any, logger: Any, source: Path) -> None:
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(source)):  # from the file, so that weights in a side file are found
        reasons = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise ArtifactError(f"TensorRT {trt.__version__} cannot read {source.name}: {reasons}")


def _add_profile(builder: Any, config: Any, profile: Profile) -> None:
    optimisation = builder.create_optimization_profile()
    for name, (smallest, best, largest) in profile.items():
        optimisation.set_shape(name, smallest, best, largest)
    if config.add_optimization_profile(optimisation) < 0:
        raise ArtifactError(f"TensorRT refuses the shapes {profile}")


def _timing_file(cache: Path, host: Host) -> Path:
    name = re.sub(r"[^a-z0-9.]+", "-", f"{host.gpu}-{host.compute_capability}-{host.tensorrt}".lower())
    return cache / "tensorrt" / f"{name}.timings"


def _read_timings(config: Any, path: Path) -> None:
    known = path.read_bytes() if path.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False):
        log.warning("timing cache %s is of another TensorRT, starting a new one", path.name)
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _write_timings(config: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_bytes(bytes(config.get_timing_cache().serialize()))
    temporary.replace(path)


def _execute(trt: Any, engine: Any, context: Any, inputs: Arrays) -> np.ndarray:
    """One evaluation with torch tensors as buffers."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        held = {name: torch.from_numpy(array).cuda().contiguous() for name, array in inputs.items()}
        for name, tensor in held.items():
            context.set_input_shape(name, tuple(tensor.shape))
        output = next(
            name
            for name in map(engine.get_tensor_name, range(engine.num_io_tensors))
            if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT
        )
        held[output] = torch.empty(
            tuple(context.get_tensor_shape(output)), dtype=torch.float32, device="cuda"
        )
        for name, tensor in held.items():
            context.set_tensor_address(name, tensor.data_ptr())
        if not context.execute_async_v3(stream.cuda_stream):
            raise ArtifactError(f"TensorRT could not evaluate a batch of {len(next(iter(inputs.values())))}")
    stream.synchronize()
    return held[output].cpu().numpy()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
