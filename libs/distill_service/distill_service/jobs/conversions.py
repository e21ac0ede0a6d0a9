"""Conversions that cannot succeed are refused when they are submitted: their manifests say so."""

from __future__ import annotations

from collections.abc import Sequence

from distill_core.artifacts import ArtifactStore
from distill_core.errors import DistilleryError
from distill_core.kinds.convertible import check_convertible
from distill_service.jobs.specs import Draft, references
from distill_service.jobs.table import Kind
from distill_service.settings import Settings


def check_conversions(drafts: Sequence[Draft], settings: Settings) -> None:
    """Refuse the conversion of a published version that no target can be made of.

    Raises:
        ArtifactError: one of `drafts` asks for it.
    """
    asked = [draft for draft in drafts if draft.kind == Kind.CONVERT and not references(draft.spec)]
    store = ArtifactStore(settings.store_url) if asked else None
    for draft in asked:
        assert store is not None
        try:
            source = store.manifest(draft.spec["artifact"])
        except (
            DistilleryError,
            OSError,
        ):  # published later, or a store that only the worker sees: the job says
            continue
        check_convertible(source, draft.spec["target"])
