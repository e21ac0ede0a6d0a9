"""Card of this kind: that of a scene, which no server shows yet. Imports no torch."""

from distill_core.kinds.field.card import Card, Evaluate, facts, signature

__all__ = ["SERVED", "Card", "Evaluate", "facts", "signature"]

SERVED = ""


def why_not_exported(card: Card) -> str:
    """Why no graph is made of such a scene."""
    return "such a scene is no function of tensors; `distillery export-scene` writes it for viewers"
