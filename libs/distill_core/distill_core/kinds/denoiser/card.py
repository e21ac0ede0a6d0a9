"""Card of a denoiser: what it makes, what it is conditioned on, and how it is sampled. Imports no torch."""

from __future__ import annotations

from typing import Any

from distill_core.artifacts import CondSpec, ImageSpec, SamplerSpec
from distill_core.config import Config
from distill_core.diffusion.routing import PartitionSpec
from distill_core.recipe.tables import EvaluateConfig, ModelSource
from distill_core.signature import Signature

SERVED = "generate"
MEASURING = ("judge", "extractor", "clip", "preference")


class Card(Config):
    """Facts of a generator that a server needs without its weights."""

    parameterisation: str = ""
    sampler: SamplerSpec | None = None
    image: ImageSpec | None = None
    cond: CondSpec | None = None
    partition: PartitionSpec | None = None  # of a model of several experts
    base: str = ""  # of a LoRA student: the model it adapts, as name@version, where that is in the store


class Evaluate(EvaluateConfig):
    """Models that measure generated pictures; without a judge, extractor or clip there are hardly any figures."""

    judge: ModelSource | None = None  # a classifier: accuracy, and features where there is no extractor
    extractor: ModelSource | None = None  # a transformers vision folder, whose features the distances use
    clip: ModelSource | None = None  # a CLIP folder: clip_score = 100 x mean cosine of picture and prompt
    preference: ModelSource | None = None  # a CLIP folder tuned on choices (HPSv2): preference_score

    @property
    def sources(self) -> dict[str, ModelSource]:
        """The models that measure, by key."""
        named = {key: getattr(self, key) for key in MEASURING}
        return {key: source for key, source in named.items() if source is not None}


def signature(card: Card) -> Signature:
    """No function that is called by its tensors: generators are served by Generate."""
    return Signature()


def facts(card: Card) -> dict[str, Any]:
    """Facts of a generator for listings, in few words."""
    made = "x".join(map(str, card.image.picture)) if card.image else ""
    steps = card.sampler.num_steps if card.sampler else None
    return {"makes": made, "conditions": card.cond.kind if card.cond else "", "steps": steps}


def why_not_exported(card: Card) -> str:
    """Why no graph is made of such a model; "" where there is one."""
    if card.sampler is not None and card.sampler.guidance_range is not None:
        return "students that are told their guidance have no graph yet that takes it; serve them with torch"
    return ""


def why_no_engine(card: Card) -> str:
    """Why TensorRT has no engines of such a model; "" where it has."""
    cond = card.cond
    if cond is None or cond.kind != "prompt" or (cond.pooled_dim is None and not cond.masked):
        return ""
    given = "a mask" if cond.masked else "a pooled prompt"
    return f"its prompts are encoded to {given} too, and an engine has one output; choose an onnx target"
