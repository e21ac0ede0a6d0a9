"""Charts of classifiers: what they show is what was measured, of a run, its teacher and models beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from distill_core import api
from distill_core.charts import COLOURS, Axis, Plot, matrix, short
from distill_core.data import build_source
from distill_core.errors import ConfigError
from distill_core.kinds import find_kind
from distill_core.kinds.predictor.pictures import Answers, charts, confusion
from tests.helpers import tiny_recipe
from tests.unit.data.test_classes import classifier, folder

CHARTS = {"confusion_matrix", "reliability", "accuracy_by_parameters", "accuracy_by_time"}
RED = (200, 10, 10)


def colours(picture: Image.Image) -> dict[tuple[int, ...], int]:
    return {colour: count for count, colour in picture.getcolors(1 << 24)}


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


def test_a_line_of_higher_values_lies_higher_and_equal_factors_are_equally_long():
    plot = Plot("title", Axis("x", 1, 1e4, log=True), Axis("y", -2, 7))
    across = [plot.place(value, 0)[0] for value in (1, 10, 100, 1000)]
    assert np.diff(across) == pytest.approx([across[1] - across[0]] * 3)
    assert plot.place(3, 6)[1] < plot.place(3, 5)[1]
    plot.bar(2, 2000, 5, RED)
    rows = np.argwhere((np.asarray(plot.picture) == RED).all(2))[:, 0]
    assert rows.min() == pytest.approx(plot.place(2, 5)[1], abs=1)
    assert rows.max() == pytest.approx(plot.place(2, -2)[1], abs=1)


def test_ticks_are_round_numbers_within_the_axis_and_numbers_are_short():
    assert Axis("y", 0, 1).ticks == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert Axis("y", -20, 18).ticks == pytest.approx([-20, -10, 0, 10])
    assert Axis("x", 30, 2e4, log=True).ticks == pytest.approx([100, 1000, 10000])
    assert [short(value) for value in (6186, 2.3e6, 0.0548, 0.3 - 0.1)] == ["6.19k", "2.3M", "0.0548", "0.2"]


def test_rows_of_a_matrix_are_labels_and_the_darkest_cell_is_the_likeliest_answer():
    picture = np.asarray(matrix("", np.array([[0, 7], [5, 2]]), ("a", "b"), "answered", "label")).sum(2)
    side, room = 48, 32 + 7
    corner = lambda row, column: picture[38 + side * row, room + 2 + side * column]  # noqa: E731
    assert corner(0, 1) < corner(1, 0) < corner(1, 1) < corner(0, 0)


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
    for name in ("reliability", "accuracy_by_parameters"):
        assert colours(found[name])[COLOURS[1]] > 11 * 11, "more than its square in the legend"
        assert COLOURS[1] not in colours(alone[name])


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
