"""Charts of classifiers: what they show is what was measured, of a run, its teacher and models beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from distill_core import api
from distill_core.charts import matrix
from distill_core.data import build_source
from distill_core.errors import ConfigError
from distill_core.kinds import find_kind
from distill_core.kinds.predictor.pictures import SELF, Answers, charts, confusion, reliability_diagram
from distill_core.metrics.classification import reliability
from tests.helpers import tiny_recipe
from tests.unit.data.test_classes import classifier, folder

CHARTS = {"confusion_matrix", "reliability", "accuracy_by_parameters", "accuracy_by_time"}


def answers(shift: float = 0.0, parameters: int = 700) -> Answers:
    torch.manual_seed(3)
    labels = torch.arange(60) % 3
    logits = torch.randn(60, 3) + shift * torch.nn.functional.one_hot(labels, 3)
    return Answers(logits, labels, {"snr": (torch.arange(60) % 4) * 6.0 - 6}, parameters, 2e-3)


def test_a_run_leaves_charts_of_what_was_measured_and_its_model_a_preview(tmp_path, context):
    changes = {"evaluate": {"data": {"name": "digits", "split": "test"}, "num_samples": 50}}
    result = api.train(tiny_recipe("kd", **changes), tmp_path, context)
    assert {path.stem for path in (tmp_path / "charts").iterdir()} == CHARTS
    sizes = [Image.open(path).size for path in (tmp_path / "charts").iterdir()]
    preview = Image.open(tmp_path / "model" / "preview.png")
    assert preview.size == (sum(width for width, _ in sizes), max(height for _, height in sizes))
    assert (tmp_path / "samples" / "000000002.png").is_file()
    assert not any("time" in name or "second" in name for name in result.figures), "figures repeat to the bit"


def test_rows_of_a_matrix_are_labels_and_the_darkest_cell_is_the_likeliest_answer():
    drawn = matrix("", np.array([[0, 7], [5, 2]]), ("a", "$b$"), "answered", "label")
    np.testing.assert_allclose(drawn.get_images()[0].get_array(), [[0, 1], [5 / 7, 2 / 7]])
    assert {text.get_text(): text.get_position() for text in drawn.texts} == {
        "7": (1, 0),
        "5": (0, 1),
        "2": (1, 1),
    }
    assert [label.get_text() for label in drawn.get_yticklabels()] == ["a", r"\$b\$"], "names are no formulas"


def test_of_very_many_classes_the_most_mistaken_are_shown_and_the_accuracy_is_that_of_all():
    torch.manual_seed(0)
    labels = torch.arange(3000) % 3000
    logits = torch.nn.functional.one_hot(labels.roll(1), 3000).float()
    picture = confusion(logits, labels, tuple(map(str, range(3000))))
    assert max(picture.size) < 1000


def test_accuracy_by_a_column_is_of_the_items_with_that_value():
    own = answers(0.7)
    right = own.logits.argmax(1) == own.labels
    expected = {value: float(right[own.columns["snr"] == value].double().mean()) for value in (-6, 0, 6, 12)}
    assert own.by("snr") == pytest.approx(expected)
    assert len(set(expected.values())) > 1
    found = charts(own, {"teacher": answers(3.0, 9000)}, ("a", "b", "c"), "snr")
    assert set(found) == CHARTS | {"accuracy_by_snr"}
    alone = charts(own, {}, ("a", "b", "c"), None)
    for name in ("reliability", "accuracy_by_parameters", "accuracy_by_time"):
        assert found[name] != alone[name]


def test_a_diagram_of_reliability_shows_each_models_bins(monkeypatch):
    drawn = []
    monkeypatch.setattr("distill_core.kinds.predictor.pictures.picture", drawn.append)
    own, teacher = answers(0.7), answers(3.0)
    reliability_diagram({SELF: own, "teacher": teacher})
    ((diagram),) = drawn
    for points, one in zip(diagram.collections, (own, teacher), strict=True):
        bins = reliability(one.logits, one.labels)
        some = bins.items > 0
        expected = torch.stack([bins.confidence[some], bins.accuracy[some]], 1)
        np.testing.assert_allclose(points.get_offsets(), expected)
    heights = [bar.get_height() for bar in diagram.patches]
    np.testing.assert_allclose(heights, reliability(own.logits, own.labels).accuracy.nan_to_num())
    assert [text.get_text().split(",")[0] for text in diagram.get_legend().texts] == [SELF, "teacher"]


def test_a_model_beside_the_result_is_measured_and_one_of_other_classes_is_refused(tmp_path):
    kind, model = find_kind("predictor"), classifier("cat", "dog")
    source = folder(tmp_path / "pictures", "cat", "dog")
    for name, other in (("alone", classifier("cat", "dog")), ("wrong", classifier("cat", "elk"))):
        other.save(tmp_path / name)

    class Models:
        folder = staticmethod(lambda source: tmp_path / source.path)

    def measured(name):
        table = kind.Evaluate.parse({"beside": {"alone": {"path": name}}})
        return kind.evaluator(model, build_source(source), table, Models()).measure(model, {})

    assert measured("alone").figures["alone_accuracy"] >= 0
    with pytest.raises(ConfigError, match="classes cat, elk, and the result's are cat, dog") as caught:
        measured("wrong")
    assert caught.value.field == "evaluate.beside.alone"


def test_a_column_that_the_data_does_not_have_is_refused_by_name(tmp_path):
    kind, model = find_kind("predictor"), classifier("cat", "dog")
    source = build_source(folder(tmp_path, "cat", "dog"))
    for table, field in (
        ({"by": "snr"}, "evaluate.by"),
        ({"ranges": {"clear": {"column": "snr", "low": 0, "high": 9}}}, "evaluate.ranges.clear.column"),
    ):
        with pytest.raises(ConfigError, match="names a column 'snr'") as caught:
            kind.evaluator(model, source, kind.Evaluate.parse(table), None)
        assert caught.value.field == field
