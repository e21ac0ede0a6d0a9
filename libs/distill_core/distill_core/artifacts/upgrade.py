"""Manifests of earlier releases, read as those of today."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OF_A_CARD = ("parameterisation", "sampler", "image", "cond", "partition", "base", "scene")
_RENAMED = {"classifier": "predictor"}
_BY_METHOD = {"prd": "relightable", "ed_nerf": "latent_field"}  # both were of the kind "model"


def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a manifest in the schema of today; those of version 1 kept each fact beside the others."""
    if values.get("schema_version", 1) != 1:
        return dict(values)
    kept = {key: value for key, value in values.items() if key not in _OF_A_CARD}
    card = {key: values[key] for key in _OF_A_CARD if values.get(key) not in (None, "")}
    kind = str(values.get("kind", ""))
    kind = _RENAMED.get(
        kind, _BY_METHOD.get(str(values.get("method", "")), kind) if kind == "model" else kind
    )
    if kind == "predictor":  # its picture is an input now, and its classes were never written down
        card = {}
    return {**kept, "schema_version": 2, "kind": kind, "card": card}
