"""Figures of predictors: of items that were kept from training, whose classes are matched by name, or none."""

from __future__ import annotations

import pytest
import torch

from distill_core import api
from distill_core.data import build_source
from distill_core.errors import ConfigError
from distill_core.kinds import find_kind
from distill_core.metrics.classification import accuracy
from distill_core.networks.classifier import load_classifier
from distill_core.recipe.tables import EvaluateConfig
from tests.helpers import tiny_clip, tiny_recipe
from tests.unit.data.test_classes import classifier, folder

THREES_AND_SEVENS = {"name": "digits", "split": "test", "only": [3, 7]}


def held_out_accuracy(model, data) -> float:
    items = build_source(data).all()
    with torch.no_grad():
        return accuracy(model(items.x0), items.cond["class_label"])


def test_the_accuracy_of_a_judge_is_that_of_the_digits_it_never_saw(tmp_path, context):
    changes = {"steps": 40, "batch_size": 16, "evaluate": {}}
    found = api.train(tiny_recipe("judge_digits", **changes), tmp_path, context)
    model = load_classifier(tmp_path / "model")
    expected = held_out_accuracy(model, {"name": "digits", "split": "test"})
    seen = held_out_accuracy(model, {"name": "digits", "split": "train"})
    assert found.figures["accuracy"] == pytest.approx(expected, abs=1e-9) != pytest.approx(seen, abs=1e-3)
    assert found.figures["train_accuracy"] == pytest.approx(seen, abs=1e-9)


@pytest.mark.slow
def test_a_predictor_s_figures_are_of_the_data_that_evaluate_names_and_none_without(tmp_path, context):
    changes = {"steps": 40, "batch_size": 16, "evaluate": {}}
    none = api.train(tiny_recipe("rs2", **changes), tmp_path / "none", context)
    assert none.figures.keys() == {"items", "items_a_round"}
    changes["evaluate"] = {"data": THREES_AND_SEVENS}
    found = api.train(tiny_recipe("rs2", **changes), tmp_path / "some", context)
    model = find_kind("predictor").load(tmp_path / "some" / "model")
    predict = lambda x: model.call("predict", {"image": x})["logits"]  # noqa: E731
    assert found.figures["accuracy"] == pytest.approx(held_out_accuracy(predict, THREES_AND_SEVENS), abs=1e-9)
    assert found.figures["accuracy"] > 0.3
    count = sum(
        label in (3, 7) for label in build_source({"name": "digits", "split": "test"}).labels.tolist()
    )
    assert found.measured_with == {"accuracy": f"{count} labelled items"}


def test_labels_of_data_in_another_order_are_translated_before_they_are_compared(tmp_path):
    kind = find_kind("predictor")
    known, other = classifier("cat", "dog", "fox"), build_source(folder(tmp_path, "ant", "cat", "fox"))
    other.class_names = ("dog", "cat", "fox")  # label 0 is the model's 1, and 1 its 0
    x0, labels = other.all().x0, torch.tensor([1, 0, 2])[other.all().cond["class_label"]]
    expected = accuracy(known(x0), labels)
    found = kind.evaluator(known, other, EvaluateConfig(), None).measure(known, {})
    assert found.figures["accuracy"] == pytest.approx(expected, abs=1e-9)
    assert other.labels.tolist() == labels.tolist()


def test_data_with_a_class_that_the_model_does_not_know_is_refused_by_name(tmp_path):
    table = EvaluateConfig(data=folder(tmp_path, "cat", "elk"))
    with pytest.raises(ConfigError, match="a class 'elk', and the model has no such class") as caught:
        find_kind("predictor").evaluator(
            classifier("cat", "dog"), build_source(THREES_AND_SEVENS), table, None
        )
    assert caught.value.field == "evaluate.data"


def test_a_folder_that_only_measures_other_models_is_not_measured(tmp_path, context):
    with pytest.raises(ConfigError, match="it measures other models"):
        api.evaluate(str(tiny_clip(tmp_path / "clip")), {}, THREES_AND_SEVENS, context)


def test_groups_of_classes_are_measured_apart_and_by_name(tmp_path):
    kind = find_kind("predictor")
    model = classifier("cat", "dog", "fox")
    data = folder(tmp_path, "ant", "cat", "fox")
    source = build_source({**data, "rename_classes": {"ant": "dog"}})
    table = kind.Evaluate.parse({"groups": {"pets": ["dog", "cat"], "wild": ["fox"]}})
    items = build_source({**data, "rename_classes": {"ant": "dog"}}).all()
    labels = torch.tensor([1, 0, 2])[items.cond["class_label"]]
    right = (model(items.x0).argmax(1) == labels).double()
    found = kind.evaluator(model, source, table, None).measure(model, {}).figures
    assert found["pets_accuracy"] == pytest.approx(float(right[labels != 2].mean()))
    assert found["wild_accuracy"] == pytest.approx(float(right[labels == 2].mean()))
    table = kind.Evaluate.parse({"groups": {"wild": ["foxes"]}})
    with pytest.raises(ConfigError, match="names a class 'foxes'.*did you mean 'fox'"):
        kind.evaluator(model, source, table, None)
