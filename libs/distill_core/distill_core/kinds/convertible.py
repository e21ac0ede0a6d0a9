"""Check by its manifest alone that a model can be converted: before a job is queued, and before one loads anything."""

from __future__ import annotations

from distill_core.artifacts import Manifest
from distill_core.errors import ArtifactError
from distill_core.kinds import find_card


def check_convertible(source: Manifest) -> None:
    """Refuse a version that no target can be made of.

    Raises:
        ArtifactError: its kind has no graphs, or not for such a model. NotFound: a kind that is not installed.
    """
    module = find_card(source.kind)
    reason = module.why_not_exported(source.card_as(module.Card))
    if reason:
        raise ArtifactError(f"{source.ref} cannot be converted: {reason}", field="artifact")
