"""TensorRT: a denoiser's `trt-*` export, on the kind of GPU that it was built for."""

from __future__ import annotations

import tempfile
from pathlib import Path

from distill_core.artifacts import Manifest
from distill_core.tensorrt.building import fitting
from distill_core.tensorrt.engines import open_engine, this_host
from distillery_sampler.backends.base import Generator
from distillery_sampler.backends.fixed import OneThread
from distillery_sampler.backends.graph_generator import GraphGenerator

PLAN = ".plan"


def open_tensorrt(model: Path, folder: Path, manifest: Manifest, cache: Path | None) -> Generator:
    """The engines in `folder`, in a thread of their own: an execution context is no two threads' at once.

    Those of another GPU or TensorRT version are built again into `cache`, from the ONNX files beside them.

    Raises:
        ArtifactError: they fit no more and cannot be built, or are damaged; it says how to rebuild.
        Unavailable: no GPU or no TensorRT here.
    """
    here = this_host()
    plans = fitting(folder, here, cache or Path(tempfile.gettempdir()) / "distillery-models")
    return OneThread(
        lambda: GraphGenerator(
            model,
            plans,
            manifest,
            lambda path: open_engine(plans, path.stem, here),
            name="tensorrt",
            suffix=PLAN,
            on_gpu=True,
            target=folder.name,
        )
    )
