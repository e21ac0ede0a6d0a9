"""FKD and FerKD: crops can be shown again, labels come back from what is stored, and calibration off is FKD exactly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distill_core.data import build_source
from distill_core.data.augmentation import augment
from distill_core.data.item_set import load_item_set
from distill_core.errors import ConfigError
from distill_core.methods.recognition._soft_labels import compressed, decompressed
from distill_core.methods.recognition.ferkd import calibrated, certainties, quantile
from tests.helpers import tiny_trainer

PLAIN = {"config.drop": 0.0, "config.soften": 0.0, "config.selfmix": 0.0}


def test_the_mass_that_is_not_stored_is_spread_evenly():
    logits = torch.tensor([[2.0, 0.1, 1.0, -1.0, 0.4]])
    p = logits.softmax(1)[0]
    found = decompressed(*compressed(logits, 2), 5)[0]
    rest = float(p[1] + p[3] + p[4]) / 3
    assert found.tolist() == pytest.approx([float(p[0]), rest, float(p[2]), rest, rest], abs=1e-3)
    assert float(found.sum()) == pytest.approx(1, abs=1e-3)
    whole = decompressed(*compressed(logits, 5), 5)[0]
    assert whole.tolist() == pytest.approx(p.tolist(), abs=1e-3)


def test_what_the_teacher_says_of_a_crop_that_is_shown_again_is_what_was_stored(context, tmp_path):
    trainer = tiny_trainer("fkd_labels", context, tmp_path, **{"config.view.flip": True})
    trainer.train()
    trainer.method.published()["labels"].save(tmp_path / "set")
    held = load_item_set(tmp_path / "set")
    assert held.size == 16
    assert held.arrays["soft_values"].dtype == torch.float16
    assert held.arrays["flip"].float().mean() == pytest.approx(0.5, abs=0.2)
    for item in (0, 7):
        x0 = held.pixels.take(torch.tensor([item])).repeat(8, 1, 1, 1)
        again = augment(x0, {"crop": held.arrays["crop"][item], "flip": held.arrays["flip"][item]})
        p = trainer.method.teacher.call("predict", {"image": again})["logits"].softmax(1)
        stored = p.gather(1, held.arrays["soft_classes"][item].long())
        torch.testing.assert_close(stored, held.arrays["soft_values"][item].float(), rtol=0, atol=2e-3)


def test_crops_are_of_seed_and_item_and_not_of_the_order(context, tmp_path):
    one, other = (tiny_trainer("fkd_labels", context, tmp_path / name, seed=seed).method
                  for name, seed in (("a", 0), ("b", 1)))  # fmt: skip
    first, again = one.views(torch.tensor([4, 9])), one.views(torch.tensor([9]))
    assert torch.equal(first["crop"][8:], again["crop"])
    assert not torch.equal(other.views(torch.tensor([9]))["crop"], again["crop"])


def test_unsure_crops_count_nothing_and_less_sure_ones_have_the_true_label():
    soft = torch.tensor([[0.9, 0.1, 0.0], [0.5, 0.3, 0.2], [0.05, 0.9, 0.05], [0.2, 0.2, 0.6]])
    target, weights = calibrated(soft, torch.tensor([0, 0, 0, 2]), 0.1, 0.6, 0.3)
    assert weights.tolist() == [1, 1, 0, 1]
    assert target[0].tolist() == soft[0].tolist()
    assert target[1].tolist() == pytest.approx([0.8, 0.1, 0.1])
    assert target[3].tolist() == soft[3].tolist()


def test_quantiles_count_values():
    values = torch.tensor([0.4, 0.1, 0.3, 0.2])
    assert [quantile(values, share) for share in (0, 0.25, 0.5)] == pytest.approx([0.1, 0.2, 0.3])
    assert quantile(values, 1.0) == float("inf")


def test_without_calibration_the_step_is_that_of_raw_soft_labels(context, tmp_path):
    trainer = tiny_trainer("ferkd", context, tmp_path, **PLAIN)
    method, batch = trainer.method, trainer.batches.of(0, trainer.draw())[0]
    torch.manual_seed(5)
    x0, target, weights = method.crops(batch)
    assert weights.tolist() == [1.0] * 32
    torch.manual_seed(5)
    chosen = torch.rand(8, 8).argsort(1)[:, :4]
    for item, number in ((0, 0), (3, 2), (7, 3)):
        rows = {
            name: batch.columns[name][item, chosen[item, number]] for name in ("soft_classes", "soft_values")
        }
        raw = decompressed(rows["soft_classes"][None], rows["soft_values"][None], 10)[0]
        assert torch.equal(target[4 * item + number], raw)
    torch.manual_seed(5)
    with torch.no_grad():
        loss = next(method.updates(batch, 0)).loss
        expected = F.cross_entropy(method.student(x0), target)
    assert float(loss) == pytest.approx(float(expected), rel=1e-3)  # stored values sum to 1 up to float16


def test_a_mixture_is_of_two_crops_of_one_picture_and_its_labels_of_their_areas(context, tmp_path):
    method = tiny_trainer("ferkd", context, tmp_path, **{"config.num_crops": 2}).method
    x0 = torch.arange(6.0)[:, None, None, None].expand(6, 1, 24, 24)
    target, weights = torch.eye(6), torch.tensor([1.0, 1, 1, 0, 1, 1])
    torch.manual_seed(1)
    mixed, labels, counted = method.selfmixed(x0, target, weights)
    share = float((mixed[0] == 0).float().mean())
    assert 0.05 < share < 0.95
    assert set(mixed[2].unique().tolist()) == {2.0, 3.0}, "of the same picture"
    assert labels[0].tolist() == pytest.approx([share, 1 - share, 0, 0, 0, 0], abs=1e-5)
    assert labels[2].tolist() == pytest.approx([0, 0, 1, 0, 0, 0], abs=1e-5), (
        "what counts nothing is not its label"
    )
    assert counted.tolist() == pytest.approx([1, 1, share, 1 - share, 1, 1], abs=1e-5)


def test_thresholds_are_quantiles_of_all_stored_crops(context, tmp_path):
    trainer = tiny_trainer("ferkd", context, tmp_path)
    sure = certainties(trainer.source)
    assert float((sure < trainer.method.low).double().mean()) == pytest.approx(0.05, abs=0.02)
    assert float((sure < trainer.method.high).double().mean()) == pytest.approx(0.20, abs=0.02)


def test_cluttered_digits_hold_the_whole_digit_and_are_the_same_every_time():
    table = {"name": "cluttered_digits", "split": "test", "size": 20}
    one, two, digits = (
        build_source(table),
        build_source(table),
        build_source({"name": "digits", "split": "test"}),
    )
    assert torch.equal(one.all().x0, two.all().x0)
    canvas, digit = one.all().x0[3, 0], digits.all().x0[3, 0]
    windows = canvas.unfold(0, 8, 1).unfold(1, 8, 1)
    assert (windows == digit).flatten(2).all(2).any()
    bare = build_source({**table, "fragments": 0}).all().x0[3, 0]
    assert (canvas > -1).sum() > (bare > -1).sum() == (digit > -1).sum()


@pytest.mark.parametrize(
    ("recipe", "changes", "field", "said"),
    [
        ("ferkd", {"config.num_crops": 9}, "config.num_crops", "the data has 8 crops of each item"),
        ("ferkd", {"config.num_crops": 1}, "config", "set num_crops to 2 or more"),
        ("ferkd", {"config.drop": 0.6, "config.soften": 0.5}, "config", "together at most 1"),
        ("ferkd", {"data": {"name": "digits"}}, "data.name", "a column crop"),
        ("fkd_labels", {"config.top": 11}, "config.top", "more classes than the teacher's 10"),
        ("fkd_labels", {"config.view.shift": 2}, "config", "view.shift is not kept"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(context, tmp_path, recipe, changes, field, said):
    with pytest.raises(ConfigError, match=said) as error:
        tiny_trainer(recipe, context, tmp_path, **changes)
    assert error.value.field == field
