"""Cards of manifests, as servers and listings read them. Imports no torch."""

from __future__ import annotations

from typing import Any

from distill_core.artifacts import Manifest, SceneSpec
from distill_core.errors import NotFound
from distill_core.kinds import find_card
from distill_core.kinds.denoiser.card import Card as GeneratorCard

_NO_GENERATOR = GeneratorCard()


def served_by(manifest: Manifest) -> str:
    """Way of serving a model: `generate`, `render`, `call` (by its signature), or "" where it is not served."""
    try:
        return str(find_card(manifest.kind).SERVED)
    except NotFound:  # a kind that is not installed here
        return ""


def generator_card(manifest: Manifest) -> GeneratorCard:
    """Facts of a generator; of another kind none.

    Raises:
        ConfigError: the manifest holds facts that a card of its kind does not have.
    """
    if served_by(manifest) != "generate":
        return _NO_GENERATOR
    card: GeneratorCard = manifest.card_as(find_card(manifest.kind).Card)
    return card


def scene_spec(manifest: Manifest) -> SceneSpec | None:
    """Description of a scene; None for another kind of model.

    Raises:
        ConfigError: the manifest holds facts that a card of its kind does not have.
    """
    if "scene" not in manifest.card:
        return None
    scene: SceneSpec | None = manifest.card_as(find_card(manifest.kind).Card).scene
    return scene


def facts(manifest: Manifest) -> dict[str, Any]:
    """Facts of a model for listings, in few words; {} for a kind that is not installed here."""
    try:
        module = find_card(manifest.kind)
    except NotFound:
        return {}
    values: dict[str, Any] = module.facts(manifest.card_as(module.Card))
    return {name: value for name, value in values.items() if value not in (None, "")}


def described(model: Any) -> dict[str, Any]:
    """Manifest entries of a model: kind, card and signature."""
    card = model.card()
    signature = find_card(model.kind).signature(card)
    return {"kind": model.kind, "card": card.model_dump(mode="json"), "signature": signature}
