"""Check by its manifest alone that a model can be converted: before a job is queued, and before one loads anything."""

from __future__ import annotations

from distill_core.artifacts import Manifest
from distill_core.errors import ArtifactError
from distill_core.kinds import find_card


def check_convertible(source: Manifest, target: str = "") -> None:
    """Refuse a version that no target can be made of, or not the one that is asked for.

    Raises:
        ArtifactError: its kind has no graphs, or not for such a model. NotFound: a kind that is not installed.
    """
    module = find_card(source.kind)
    card = source.card_as(module.Card)
    reason = module.why_not_exported(card)
    if not reason and target.startswith("trt-") and hasattr(module, "why_no_engine"):
        reason = module.why_no_engine(card)
    if reason:
        raise ArtifactError(f"{source.ref} cannot be converted: {reason}", field="artifact")
