"""Card of a radiance field, and of every other kind that is looked at through a camera. Imports no torch."""

from __future__ import annotations

from typing import Any

from distill_core.artifacts import SceneSpec
from distill_core.config import Config, DataPath
from distill_core.recipe.tables import EvaluateConfig
from distill_core.signature import Signature

SERVED = "render"


class Card(Config):
    """Facts of a scene that a server needs without its weights."""

    scene: SceneSpec | None = None


class Evaluate(EvaluateConfig):
    """Metrics of renderings beside PSNR and SSIM."""

    lpips: DataPath | None = None  # a folder with LPIPS weights (metrics/lpips.py); unset: not measured


def signature(card: Card) -> Signature:
    """No function that is called by its tensors: scenes are served by Render."""
    return Signature()


def facts(card: Card) -> dict[str, Any]:
    """Facts of a scene for listings, in few words."""
    return {"field": card.scene.field, "bound": card.scene.bound} if card.scene else {}


def why_not_exported(card: Card) -> str:
    """Why no graph is made of such a scene; "" where there is one."""
    return ""
