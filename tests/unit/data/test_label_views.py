"""Long tails and noisy labels of any labelled data: which items and labels there are, and what is refused."""

from __future__ import annotations

import pytest
import torch

from distill_core.data import build_source
from distill_core.data.label_views import noisy
from distill_core.errors import ConfigError, DataError
from tests.unit.data.test_classes import folder

DIGITS = {"name": "digits", "split": "train"}


def counts(source):
    return torch.bincount(source.labels, minlength=len(source.class_names)).tolist()


def test_a_long_tail_keeps_the_first_class_and_the_stated_share_of_the_last():
    whole, tail = counts(build_source(DIGITS)), counts(build_source({**DIGITS, "imbalance": 20}))
    assert tail == [round(n * 20 ** (-k / 9)) for k, n in enumerate(whole)]
    assert tail[0] == whole[0]
    assert tail[9] == round(whole[9] / 20)


def test_kept_items_are_whole_items_and_are_numbered_anew():
    whole = build_source(DIGITS).all()
    tail = build_source({**DIGITS, "imbalance": 20, "order": {"kind": "per_class"}})
    items = tail.all()
    matches = (items.x0[:, None] == whole.x0[None]).flatten(2).all(2)
    assert matches.any(1).all()
    first = matches.int().argmax(1)
    assert torch.equal(whole.columns["class_label"][first], items.columns["class_label"])
    assert items.index.tolist() == list(range(tail.size))
    assert int(tail.batch(30, epoch_seed=3, position=2).index.max()) < tail.size


def test_pictures_of_files_are_left_out_alike(tmp_path):
    table = folder(tmp_path, "ant", "cat", "fox")
    whole, tail = build_source(table), build_source({**table, "imbalance": 4})
    assert counts(whole) == [4, 4, 4] or len(set(counts(whole))) == 1
    assert counts(tail)[0] == counts(whole)[0] > counts(tail)[2]
    assert tail.all().x0.shape[0] == tail.size == sum(counts(tail))
    assert tail.fingerprint != whole.fingerprint


def test_a_fifth_of_the_labels_is_wrong_and_the_wrong_ones_are_spread_over_the_other_classes():
    clean, wrong = build_source(DIGITS), build_source({**DIGITS, "label_noise": 0.2})
    differ = clean.labels != wrong.labels
    assert int(differ.sum()) == round(0.2 * clean.size)
    steps = (wrong.labels - clean.labels)[differ] % 10
    assert sorted(set(steps.tolist())) == list(range(1, 10))
    assert clean.fingerprint == wrong.fingerprint, "what is stored by item belongs to both"


def test_the_seed_decides_which_and_nothing_else_does():
    options = {**DIGITS, "imbalance": 7, "label_noise": 0.3}
    one, two, other = (build_source({**options, "draw_seed": seed}) for seed in (5, 5, 6))
    assert torch.equal(one.labels, two.labels)
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert torch.equal(noisy(torch.arange(6), 6, 0.0, 1), torch.arange(6))


def test_options_that_are_off_change_nothing():
    plain, off = build_source(DIGITS), build_source({**DIGITS, "imbalance": 1, "label_noise": 0})
    assert torch.equal(plain.labels, off.labels)
    assert plain.fingerprint == off.fingerprint


@pytest.mark.parametrize("options", [{"imbalance": 9}, {"label_noise": 0.3}])
def test_data_without_labels_is_refused_by_the_option(options):
    with pytest.raises(DataError, match="choose labelled data") as error:
        build_source({"name": "digits", "labelled": False, **options})
    assert error.value.field == f"data.{next(iter(options))}"


def test_a_class_without_an_item_has_no_tail():
    with pytest.raises(DataError, match="class '0' has no item"):
        build_source({"name": "digits", "only": [3, 7], "imbalance": 9})


@pytest.mark.parametrize(("key", "value"), [("imbalance", 0.5), ("label_noise", 1.0), ("label_noise", -0.1)])
def test_values_out_of_range_are_named(key, value):
    with pytest.raises(ConfigError, match=f"data.{key}") as error:
        build_source({**DIGITS, key: value})
    assert error.value.field == f"data.{key}"
