"""What can be converted, by its manifest alone: asked before a job is queued, and before one loads anything."""

from __future__ import annotations

from distill_core.artifacts.manifest import Manifest
from distill_core.errors import ArtifactError


def check_convertible(source: Manifest) -> None:
    """Refuse a version that no target can be made of.

    Raises:
        ArtifactError: it is neither a denoiser nor a field, or of a kind whose graph is not written yet.
    """
    if source.kind not in ("denoiser", "field"):
        raise ArtifactError(
            f"{source.ref} is of kind {source.kind}, and only denoisers and fields can be converted; "
            "`distillery models` shows the kinds",
            field="artifact",
        )
    if source.cond is not None and source.cond.pooled_dim is not None:
        raise ArtifactError(
            f"{source.ref} is of the SDXL kind, which is not converted yet: its graph needs pooled prompts; "
            "serve it with torch",
            field="artifact",
        )
