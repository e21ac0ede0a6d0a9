"""Verdicts on a recipe's claims by the figures of its runs. Pure functions of dictionaries."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distill_core.errors import ConfigError
from distill_core.recipe.claims import CheckConfig, Claim

Figures = Mapping[str, float]
Measure = Callable[[Mapping[str, Any]], Sequence[Figures]]  # overrides -> figures, one per seed


def verdict(check: CheckConfig, measure: Measure) -> dict[str, Any]:
    """Measure a check's runs and judge every claim: that of the check itself, and under `also` the others.

    Equal settings are measured once. `passed` means that all claims hold.

    Raises:
        ConfigError: a claim names a figure that the runs did not give.
    """
    known: dict[str, Sequence[Figures]] = {}

    def figures(changes: Mapping[str, Any]) -> Sequence[Figures]:
        key = json.dumps(changes, sort_keys=True, default=str)
        if key not in known:
            known[key] = measure(changes)
        return known[key]

    first, *others = [_judged(claim, figures) for claim in (check, *check.also)]
    passed = all(judged["passed"] for judged in (first, *others))
    return {**first, "passed": passed, "also": others, "figures": dict(figures({})[0])}


def _judged(claim: Claim, figures: Callable[[Mapping[str, Any]], Sequence[Figures]]) -> dict[str, Any]:
    measured = _mean(figures({}), claim.metric)
    reference = None if claim.reference is None else _mean(figures({}), claim.reference)
    ablation = None if claim.ablation is None else _mean(figures(claim.ablation.set), claim.metric)
    return {
        "passed": _holds(claim, measured, reference, ablation),
        "metric": claim.metric,
        "measured": measured,
        "reference": reference,
        "ablation": ablation,
    }


def _holds(claim: Claim, measured: float, reference: float | None, ablation: float | None) -> bool:
    tests = []
    if claim.at_most is not None:
        tests.append(measured <= claim.at_most)
    if claim.at_least is not None:
        tests.append(measured >= claim.at_least)
    if reference is not None and claim.ratio_at_most is not None:
        tests.append(measured <= claim.ratio_at_most * reference)
    if reference is not None and claim.ratio_at_least is not None:
        tests.append(measured >= claim.ratio_at_least * reference)
    if ablation is not None and claim.ablation is not None:
        ratio, gap = claim.ablation.ratio_at_least, claim.ablation.gap_at_least
        if ratio is not None:
            tests.append(ablation >= ratio * measured)
        if gap is not None:
            tests.append(measured - ablation >= gap)
    return bool(tests) and all(tests)


def _mean(runs: Sequence[Figures], name: str) -> float:
    for figures in runs:
        if name not in figures:
            raise ConfigError(f"the check's figure {name!r} was not measured; known: {', '.join(figures)}")
    return sum(figures[name] for figures in runs) / len(runs)
