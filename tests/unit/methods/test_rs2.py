"""RS2: rounds are fresh, without replacement, and another order is refused."""

from __future__ import annotations

import pytest
import torch

from distill_core.data.order import Order, OrderConfig
from distill_core.errors import ConfigError
from tests.helpers import tiny_trainer


def rounds(**options) -> Order:
    labels = torch.arange(60) % 3
    return Order(OrderConfig(share=0.1, **options), 60, labels)


def test_rounds_without_replacement_use_every_item_once_before_any_again():
    drawn = rounds(kind="rounds").at(7, 0, 120)
    assert sorted(drawn[:60].tolist()) == sorted(drawn[60:].tolist()) == list(range(60))
    assert set(drawn[:6].tolist()).isdisjoint(drawn[6:12].tolist())


def test_a_static_subset_stays_and_rounds_with_replacement_change():
    static = rounds(kind="static").at(7, 0, 30).reshape(5, 6).sort().values
    assert (static == static[0]).all()
    again = rounds(kind="rounds", replacement=True).at(7, 0, 30).reshape(5, 6).sort().values
    assert len({tuple(row.tolist()) for row in again}) == 5


def test_stratified_subsets_hold_each_class_alike():
    chosen = rounds(kind="static", stratified=True).at(3, 0, 6)
    assert (chosen % 3).bincount().tolist() == [2, 2, 2]


def test_the_stream_does_not_depend_on_how_it_is_cut():
    for options in ({"kind": "rounds"}, {"kind": "static"}, {"kind": "rounds", "replacement": True}):
        order = rounds(**options)
        whole = order.at(5, 0, 35)
        parts = torch.cat([order.at(5, start, start + 7) for start in range(0, 35, 7)])
        assert torch.equal(whole, parts)
    per_class = Order(OrderConfig(kind="per_class"), 60, torch.arange(60) % 3)
    whole = per_class.at(5, 0, 35)
    assert torch.equal(whole, torch.cat([per_class.at(5, s, s + 7) for s in range(0, 35, 7)]))
    assert (per_class.at(5, 0, 9) % 3).bincount().tolist() == [3, 3, 3]
    assert sorted(per_class.at(5, 0, 60).tolist()) == list(range(60))


def test_an_endless_order_is_refused(context, tmp_path):
    with pytest.raises(ConfigError, match="needs rounds over subsets") as caught:
        tiny_trainer("rs2", context, tmp_path, **{"data.order": {"kind": "endless"}})
    assert caught.value.field == "data.order.kind"
