"""Data sets that a method made: from the artifact store, from a recipe that makes them once, or from a folder."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from distill_core.config import ArtifactRef, DataPath, RecipeName
from distill_core.data.classes import Renaming
from distill_core.data.item_set import load_item_set
from distill_core.data.source import ArrayPixels, Folders, Source, existing
from distill_core.errors import ArtifactError, ConfigError
from distill_core.recipe.tables import ModelSource
from distill_core.signature import TensorSpec


class ArtifactData(Source):
    """Items of a published data set, with every column that it has."""

    class Config(Renaming):
        """Options of the recipe's `[data]` table."""

        name: Literal["artifact"] = "artifact"
        ref: ArtifactRef | None = None  # name@version or name@alias in the artifact store
        recipe: RecipeName | None = None  # made once, then cached under the recipe's content
        path: DataPath | None = None  # the folder of a version

        @model_validator(mode="after")
        def _exactly_one(self) -> Self:
            if sum(value is not None for value in (self.ref, self.recipe, self.path)) != 1:
                raise ValueError("give exactly one of ref, recipe, path")
            return self

    def __init__(self, config: Config) -> None:
        if config.path is None:
            given = "ref" if config.recipe is None else "recipe"
            raise ConfigError(
                f"data.{given} = {getattr(config, given)!r} is found by a run that has a store; give data.path, "
                "the folder of a version",
                field=f"data.{given}",
            )
        held = load_item_set(existing(config.path))
        super().__init__(
            config,
            size=held.size,
            pixels=held.pixels,
            labels=held.labels,
            class_names=config.renamed(held.class_names),
            prompts=held.prompts,
            arrays=held.arrays,
        )

    @classmethod
    def opened(cls, config: Config, folders: Folders | None) -> Self:  # type: ignore[override]
        """The data set, fetched or made first."""
        if config.path is not None or folders is None:
            return cls(config)
        given = "ref" if config.recipe is None else "recipe"
        found = folders.folder(ModelSource(artifact=config.ref, recipe=config.recipe))
        try:
            return cls(config.model_copy(update={"path": str(found), "ref": None, "recipe": None}))
        except ArtifactError as error:
            raise ArtifactError(
                f"data.{given} = {getattr(config, given)!r} cannot be used: {error}", field=f"data.{given}"
            ) from None

    @property
    def columns(self) -> dict[str, TensorSpec]:
        """What the items have, by name; pictures that are no bytes may leave [-1, 1]."""
        found = super().columns
        if isinstance(self.pixels, ArrayPixels):
            found["x0"] = TensorSpec(dtype="float32", shape=self.pixels.shape)
        return found


SOURCES = {"artifact": ArtifactData}
