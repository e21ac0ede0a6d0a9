"""Published models that recipes have settings for; the models themselves are the user's, and none is fetched."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from distill_core.errors import ConfigError

PublishedModel = Literal["sd15", "sd21", "sdxl", "pixart", "flux"]


class ModelFacts(NamedTuple):
    """What tells a published model from others."""

    title: str  # as its authors call it
    network: str  # its class in diffusers
    pooled: bool  # whether it reads a pooled prompt too


PUBLISHED: dict[PublishedModel, ModelFacts] = {
    "sd15": ModelFacts("Stable Diffusion 1.5", "UNet2DConditionModel", pooled=False),
    "sd21": ModelFacts("Stable Diffusion 2.1", "UNet2DConditionModel", pooled=False),
    "sdxl": ModelFacts("Stable Diffusion XL", "UNet2DConditionModel", pooled=True),
    "pixart": ModelFacts("PixArt-alpha", "PixArtTransformer2DModel", pooled=False),
    "flux": ModelFacts("FLUX.1 dev", "FluxTransformer2DModel", pooled=True),
}


def check_teacher_named(recipe: Any) -> None:
    """Refuse a recipe for a published model that names no teacher.

    Raises:
        ConfigError: it does not.
    """
    if recipe.for_model is None or recipe.teacher is not None:
        return
    title = PUBLISHED[recipe.for_model].title
    raise ConfigError(
        f"these settings are for {title}, and the model is yours to give: import it (distillery import FOLDER "
        f"--name my-{recipe.for_model}) and set teacher.artifact=my-{recipe.for_model}@1",
        field="teacher",
    )


def check_teacher_fits(for_model: PublishedModel, network: str, *, pooled: bool) -> None:
    """Refuse a teacher of another class than a recipe's settings are for.

    Raises:
        ConfigError: it is of another class.
    """
    facts = PUBLISHED[for_model]
    if (network, pooled) != (facts.network, facts.pooled):
        reads = "with" if pooled else "without"
        raise ConfigError(
            f"these settings are for {facts.title}, and the teacher is a {network} {reads} pooled prompts; choose a "
            "recipe for its class, or write one with settings of your own",
            field="teacher",
        )
