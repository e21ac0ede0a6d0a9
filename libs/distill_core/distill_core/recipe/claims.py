"""Claims of a recipe: the figure, the bound, the runs it is taken over, and the ablation beside it."""

from __future__ import annotations

from typing import Self

from pydantic import (
    Field,
    model_validator,
)

from distill_core.config import (
    Changes,
    Config,
    Seed,
    Words,
)


class CheckAblation(Config):
    """The same recipe with the method's key part off, which must be worse by a factor or an amount."""

    set: Changes
    ratio_at_least: float | None = None  # ablation / method, for metrics where less is better
    gap_at_least: float | None = None  # method - ablation, for metrics where more is better


class Claim(Config):
    """A figure's bounds, alone or against another figure of the same run, and what switching the key part off does."""

    metric: Words
    reference: Words | None = None  # another figure of the same run, e.g. teacher_frechet_distance
    ratio_at_most: float | None = None  # metric / reference
    ratio_at_least: float | None = None
    at_most: float | None = None
    at_least: float | None = None
    ablation: CheckAblation | None = None

    @model_validator(mode="after")
    def _against_something(self) -> Self:
        ratios = self.ratio_at_most is not None or self.ratio_at_least is not None
        if ratios != (self.reference is not None):
            raise ValueError("a ratio needs a reference, and a reference a ratio_at_most or ratio_at_least")
        return self


class CheckConfig(Claim):
    """The recipe's claim, and others on the same runs."""

    set: Changes = {}  # overrides for the check's size
    seeds: list[Seed] = Field([0], min_length=1)  # figures are means over these
    also: list[Claim] = []
