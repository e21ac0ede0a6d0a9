"""A stand-in for NVIDIA's package, which no index but NVIDIA's own carries.

It has the calls of TensorRT 11 and none that 11 removed, builds "plans" and refuses to run any.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest

from distill_core.tensorrt.engines import Host

HOST = Host(tensorrt="11.4.0", gpu="NVIDIA L4", compute_capability="8.9")


class Network:
    pass


class Builder:
    plan: bytes | None = b"a plan"

    def __init__(self, logger):
        self.logger, self.profile = logger, SimpleNamespace(shapes={})
        self.profile.set_shape = lambda name, *shapes: self.profile.shapes.update({name: shapes})

    def create_network(self, flags):
        assert flags == 1 << 1  # STRONGLY_TYPED
        return Network()

    def create_builder_config(self):
        return Config()

    def create_optimization_profile(self):
        return self.profile

    def build_serialized_network(self, network, config):
        if self.plan is None:
            self.logger.log("ERROR", "no kernel for this layer")
        return self.plan


class Config:
    def __init__(self):
        self.timings, self.profiles = b"", []

    def set_memory_pool_limit(self, pool, size):
        assert (pool, size > 2**20) == ("WORKSPACE", True)

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, content):
        return content

    def set_timing_cache(self, cache, ignore_mismatch):
        assert ignore_mismatch is False
        self.timings = cache
        return cache != b"of another version"

    def get_timing_cache(self):
        return SimpleNamespace(serialize=lambda: self.timings + b"+timed")


class Parser:
    errors: tuple[str, ...] = ()
    num_errors = property(lambda self: len(self.errors))

    def __init__(self, network, logger):
        assert isinstance(network, Network)

    def parse_from_file(self, path):
        return Path(path).is_file() and not self.errors

    def get_error(self, index):
        return SimpleNamespace(desc=lambda: self.errors[index])


class ILogger:
    Severity = SimpleNamespace(INTERNAL_ERROR="INTERNAL_ERROR", ERROR="ERROR")


def install(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Make it what `import tensorrt` finds; `built` and `opened` are what it was asked to build and to run."""
    built: list[str] = []
    opened: list[bytes] = []

    class OwnParser(Parser):
        def parse_from_file(self, path):
            built.append(Path(path).name)
            return super().parse_from_file(path)

    module = SimpleNamespace(
        __spec__=ModuleSpec("tensorrt", None),
        __version__=HOST.tensorrt,
        Builder=type("Builder", (Builder,), {}),
        OnnxParser=OwnParser,
        ILogger=ILogger,
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
        MemoryPoolType=SimpleNamespace(WORKSPACE="WORKSPACE"),
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=opened.append),
        built=built,
        opened=opened,
    )
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module
