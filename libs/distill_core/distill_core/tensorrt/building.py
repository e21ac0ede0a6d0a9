"""ONNX files as TensorRT engines, by the API of TensorRT 10 and 11: strongly typed, as the ONNX says.

An engine runs only on the kind of GPU and with the TensorRT version it was built for: see `engines`. The ONNX files
that it was built from lie beside it, so that other machines build their own. Nothing here imports tensorrt before it
is needed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from distill_core.errors import ArtifactError, Unavailable
from distill_core.tensorrt.engines import (
    ENGINE,
    EngineFile,
    EngineInfo,
    Host,
    Profile,
    import_tensorrt,
    read_info,
    require_host,
    trt_logger,
)

SOURCES = "onnx"  # folder beside the plans: the files that they were built from
WORKSPACE_BYTES = 4 * 2**30
DIGEST_BYTES = 32
OPTIMISATION_LEVEL = 3  # TensorRT's own default, of 0 to 5

log = logging.getLogger(__name__)


def build(
    sources: list[Path], profiles: list[Profile], folder: Path, *, target: str, host: Host, cache: Path
) -> None:
    """Build `<graph>.plan` for each `<graph>.onnx` into `folder`, and `engine.json`, which is written last.

    `cache` keeps plans by graph, machine and profile, which are never built twice on one machine, and kernel timings,
    with which other graphs are built much faster.

    Raises:
        Unavailable: no TensorRT here. ArtifactError: TensorRT refuses a graph; it says why.
    """
    engines = []
    for source, profile in zip(sources, profiles, strict=True):
        sha256 = _sha256(source)
        kept = cache / "tensorrt" / "plans" / _plan_key(sha256, profile, host)
        plan = _read_plan(kept)
        if plan is None:
            plan = build_plan(source, profile, timings=_timing_file(cache, host))
            _write(kept, hashlib.sha256(plan).digest() + plan)
        else:
            log.info("%s was built on this machine before, its engine is used again", source.name)
        _write(folder / f"{source.stem}.plan", plan)
        engines.append(EngineFile(plan=f"{source.stem}.plan", onnx_sha256=sha256, profile=profile))
    info = EngineInfo(target=target, host=host, engines=tuple(engines))
    _write(folder / ENGINE, info.model_dump_json(indent=1).encode())


def fitting(folder: Path, host: Host, cache: Path) -> Path:
    """`folder`, if its engines can run `host`; else a folder in `cache` with engines that are built for this machine.

    Raises:
        ArtifactError: the ONNX files that they were built from are not there, or TensorRT refuses one.
        Unavailable: the disk is full.
    """
    info = read_info(folder)
    if info.host == host:
        return folder
    sources = [folder / SOURCES / f"{Path(file.plan).stem}.onnx" for file in info.engines]
    if not sources or not all(source.is_file() for source in sources):
        require_host(folder, host)  # raises, and says how to rebuild
    made_of = [info.target, host.model_dump(), [file.model_dump() for file in info.engines]]
    built = cache / "tensorrt" / "engines" / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    log.warning(
        "engines of %s were built by %s, and here is %s, so this machine builds its own, if it has not already",
        *(info.target, info.host, host),
    )
    profiles = [file.profile for file in info.engines]
    try:
        build(sources, profiles, built, target=info.target, host=host, cache=cache)
    except OSError as error:
        raise Unavailable(
            f"engines cannot be kept in {cache}: {error.strerror or error}; see to the disk"
        ) from None
    return built


def build_plan(source: Path, profile: Profile, *, timings: Path) -> bytes:
    """The serialised engine of one ONNX file."""
    trt = import_tensorrt()
    logger = trt_logger(trt)
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
    _write(path, bytes(config.get_timing_cache().serialize()))


def _plan_key(onnx_sha256: str, profile: Profile, host: Host) -> str:
    """File name of an engine, by all that it depends on."""
    built = [onnx_sha256, profile, host.model_dump(), OPTIMISATION_LEVEL, WORKSPACE_BYTES]
    return f"{hashlib.sha256(json.dumps(built, sort_keys=True).encode()).hexdigest()}.plan"


def _read_plan(path: Path) -> bytes | None:
    """A kept plan, behind its own checksum; None where there is none or it was damaged since."""
    kept = path.read_bytes() if path.is_file() else b""
    digest, plan = kept[:DIGEST_BYTES], kept[DIGEST_BYTES:]
    return plan if plan and hashlib.sha256(plan).digest() == digest else None


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:  # a full disk, which what is left there would keep full
        os.unlink(temporary)
        raise


def _sha256(path: Path) -> str:
    """Checksum of an ONNX file together with its side file."""
    digest = hashlib.sha256()
    for file in (path, path.with_name(f"{path.name}.data")):
        if file.exists():
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
