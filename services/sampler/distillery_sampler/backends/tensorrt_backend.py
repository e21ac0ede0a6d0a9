"""TensorRT: a denoiser's `trt-*` export, on the kind of GPU that it was built for."""

from __future__ import annotations

from pathlib import Path

from distill_core.artifacts import Manifest
from distill_core.networks.engines import open_engine, require_host, this_host
from distillery_sampler.backends.base import Generator
from distillery_sampler.backends.fixed import OneThread
from distillery_sampler.backends.graph_generator import GraphGenerator

PLAN = ".plan"


def open_tensorrt(model: Path, folder: Path, manifest: Manifest) -> Generator:
    """The engines in `folder`, in a thread of their own: an execution context is no two threads' at once.

    Raises:
        ArtifactError: built for another GPU or TensorRT version, or damaged; it says how to rebuild.
        Unavailable: no GPU or no TensorRT here.
    """
    here = this_host()
    require_host(folder, here)
    return OneThread(
        lambda: GraphGenerator(
            model,
            folder,
            manifest,
            lambda path: open_engine(folder, path.stem, here),
            name="tensorrt",
            suffix=PLAN,
            on_gpu=True,
        )
    )
