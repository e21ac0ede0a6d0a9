"""Manifests of the first release (tests/fixtures/upgrade): each kind with its facts, in the schema of today."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.artifacts.upgrade import upgraded
from distill_core.errors import ArtifactError
from distill_core.kinds import find_card
from distill_core.kinds.cards import facts, generator_card, scene_spec, served_by
from tests.helpers import REPOSITORY

LEFT = REPOSITORY / "tests" / "fixtures" / "upgrade" / "0.1.0" / "store"
DENOISER, FIELD = (
    LEFT / name / "versions" / "1" / "manifest.json" for name in ("edm-digits", "procedural-scene")
)
OWN = {"name", "version", "created", "method", "paper", "title", "licence", "job", "recipe_sha256", "step"}


def written(file: Path, **changes: Any) -> dict[str, Any]:
    """A manifest as the first release wrote it, with other values."""
    values = json.loads(file.read_text()) | changes
    assert values["schema_version"] == 1
    return values


def read(values: dict[str, Any]) -> Manifest:
    manifest = Manifest.parse(upgraded(values))
    assert manifest.schema_version == 2
    for name in OWN | {"metrics", "files"}:
        assert manifest.model_dump(mode="json")[name] == values[name], name
    return manifest


def test_a_generator_keeps_what_it_makes_and_how_it_is_sampled():
    values = written(DENOISER)
    manifest = read(values)
    card = generator_card(manifest)
    assert (manifest.kind, served_by(manifest)) == ("denoiser", "generate")
    assert card.parameterisation == values["parameterisation"] == "edm"
    for name in ("sampler", "image", "cond"):
        held = getattr(card, name).model_dump(mode="json")  # has keys that came later too
        assert {key: held[key] for key in values[name]} == values[name], name
    assert (card.partition, card.base) == (None, "")
    assert facts(manifest) == {"makes": "1x8x8", "conditions": "class_label", "steps": 32}


def test_a_student_keeps_its_base_and_a_routed_one_its_partition():
    partition = {"kind": "class_label", "parts": 2, "of_class": [0, 1, 1, 0, 1, 0, 0, 0, 1, 1]}
    manifest = read(written(DENOISER, base="base@3", partition=partition))
    card = generator_card(manifest)
    assert card.base == "base@3"
    assert card.partition is not None
    assert card.partition.of_class == (0, 1, 1, 0, 1, 0, 0, 0, 1, 1)


@pytest.mark.parametrize(
    ("kind", "method", "now", "served"),
    [
        ("field", "radiance_field", "field", "render"),
        ("field", "pvd", "field", "render"),
        ("gaussians", "field_to_gaussians", "gaussians", ""),
        ("model", "prd", "relightable", ""),
        ("model", "ed_nerf", "latent_field", ""),
    ],
)
def test_a_scene_keeps_its_box_and_has_the_kind_that_its_method_says(kind, method, now, served):
    transform = [2.0, 0, 0, 0.1, 0, 2, 0, 0.2, 0, 0, 2, 0.3, 0, 0, 0, 1]
    values = written(FIELD, kind=kind, method=method)
    values["scene"] |= {"bound": 1.7, "transform": transform}
    manifest = read(values)
    scene = scene_spec(manifest)
    assert (manifest.kind, served_by(manifest)) == (now, served)
    assert scene is not None
    assert scene.model_dump(mode="json") == values["scene"]
    assert facts(manifest) == {"field": "mlp", "bound": 1.7}


def test_a_classifier_is_a_predictor_whose_functions_were_never_written_down():
    picture = {"channels": 1, "height": 8, "width": 12, "picture": [1, 8, 12], "tileable": False}
    none = {"parameterisation": "", "sampler": None, "cond": None}
    manifest = read(written(DENOISER, kind="classifier", method="classifier", image=picture, **none))
    assert (manifest.kind, manifest.card, served_by(manifest)) == ("predictor", {}, "call")
    card = manifest.card_as(find_card("predictor").Card)
    assert (card.functions, card.class_names) == ({}, ())
    assert "train and publish it again" in find_card("predictor").why_not_exported(card)


def test_what_the_converter_measured_and_a_sampled_answer_stay():
    report = {
        "target": "onnx-fp32",
        "files": ["exports/onnx-fp32/denoiser.onnx"],
        "opset": 18,
        "max_abs_difference": 3e-6,
        "rel_l2": 1e-6,
        "tolerance": 1e-3,
        "batches": [1, 3, 16],
        "seconds": 4.5,
    }
    parity = {"shape": [1, 1, 2], "means": [0.25, -0.75], "spreads": [0.125, 0.375], "class_label": 3}
    manifest = read(written(DENOISER, exports={"onnx-fp32": report}, parity=parity))
    assert manifest.exports["onnx-fp32"].batches == (1, 3, 16)
    assert manifest.parity is not None
    assert (manifest.parity.means, manifest.parity.class_label) == ((0.25, -0.75), 3)


def test_a_manifest_without_a_version_is_of_the_first_and_one_of_today_is_not_touched():
    values = written(FIELD)
    first = upgraded(values)
    del values["schema_version"]
    assert upgraded(values) == first
    assert upgraded(first) == first
    again = {"schema_version": 2, "kind": "model", "method": "prd", "card": {"scene": None}, "name": "x"}
    assert upgraded(again) == again


def test_a_kind_of_a_method_that_nobody_knows_is_listed_and_not_served():
    manifest = read(written(FIELD, kind="model", method="elsewhere"))
    assert (manifest.kind, served_by(manifest), facts(manifest)) == ("model", "", {})
    assert manifest.card["scene"]["field"] == "mlp"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"schema_version": 3}, "schema_version = 3 is not allowed"),
        ({"smapler": {}}, "unknown key smapler"),
        ({"kind": "No Kind"}, "kind = 'No Kind' is not allowed"),
    ],
)
def test_a_manifest_that_cannot_be_read_says_which_key(changes, sentence, tmp_path):
    store = shutil.copytree(LEFT, tmp_path / "store")
    file = store / DENOISER.relative_to(LEFT)
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ArtifactError, match=f"manifest of edm-digits@1 cannot be read: {sentence}"):
        ArtifactStore(store).manifest("edm-digits@1")
