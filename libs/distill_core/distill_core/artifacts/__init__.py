"""Models on disk: what is known of a version (`manifest`), and the store of all versions (`store`)."""

from distill_core.artifacts.files import FORBIDDEN_SUFFIXES, verify
from distill_core.artifacts.manifest import (
    MANIFEST,
    AliasMove,
    ExportReport,
    FileEntry,
    FrechetReport,
    GraphReport,
    Manifest,
)
from distill_core.artifacts.specs import CondSpec, ImageSpec, SceneSpec
from distill_core.artifacts.store import ArtifactStore
from distill_core.diffusion.sampling import SamplerSpec

__all__ = [
    "FORBIDDEN_SUFFIXES",
    "MANIFEST",
    "AliasMove",
    "ArtifactStore",
    "CondSpec",
    "ExportReport",
    "FileEntry",
    "FrechetReport",
    "GraphReport",
    "ImageSpec",
    "Manifest",
    "SamplerSpec",
    "SceneSpec",
    "verify",
]
