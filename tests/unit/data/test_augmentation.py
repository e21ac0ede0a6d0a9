"""Views of items: what each does to a picture that is wider than high, and that any of them can be shown again."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from distill_core.config import Config
from distill_core.data import Source, build_source
from distill_core.data.augmentation import ViewConfig, augment, draw_views
from distill_core.data.order import OrderConfig
from distill_core.data.source import ArrayPixels
from distill_core.errors import ConfigError
from distill_core.method import Batch

EVERYTHING = ViewConfig(shift=2, crop_scale=0.4, flip=True)
SMALL = torch.arange(24.0).reshape(2, 1, 3, 4)  # two pictures of three rows and four columns


def pictures(count: int = 3, height: int = 7, width: int = 11) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(5)) * 2 - 1


def stream(view: ViewConfig = EVERYTHING) -> Source:
    values = (pictures(count=13) * 127 + 128).to(torch.uint8)
    source = Source(Config(), size=13, pixels=ArrayPixels(values))
    source.arrange(OrderConfig(), view)
    return source


def bilinear(image: torch.Tensor, row: float, column: float) -> float:
    """The value of a picture (H, W) at a place in pixels, the border repeated."""
    height, width = image.shape
    row, column = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
    top, left = min(math.floor(row), height - 2), min(math.floor(column), width - 2)
    down, right = row - top, column - left
    above = (1 - right) * image[top, left] + right * image[top, left + 1]
    below = (1 - right) * image[top + 1, left] + right * image[top + 1, left + 1]
    return float((1 - down) * above + down * below)


# -- one view


@pytest.mark.parametrize(("height", "width"), [(7, 11), (28, 32), (33, 49)])
def test_a_crop_of_the_whole_picture_changes_no_bit(height, width):
    x0 = pictures(2, height, width)
    crop = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.1, 0.2, 0.7, 0.7]])
    seen = augment(x0, {"crop": crop})
    assert torch.equal(seen[0], x0[0])
    assert not torch.equal(seen[1], x0[1])


def test_a_crop_shows_what_lies_between_its_corners():
    """Pixel (i, j) of the crop lies at top + (i + 1/2) height / H of the picture's height, and so across."""
    x0, (top, left, height, width) = pictures(2), (0.3, 0.05, 0.4, 0.65)
    seen = augment(x0, {"crop": torch.tensor([[0.0, 0.0, 0.9, 0.9], [top, left, height, width]])})
    _, rows, columns = x0.shape[1:]
    expected = [
        [
            bilinear(
                x0[1, 2], top * rows + (i + 0.5) * height - 0.5, left * columns + (j + 0.5) * width - 0.5
            )
            for j in range(columns)
        ]
        for i in range(rows)
    ]
    assert torch.allclose(seen[1, 2], torch.tensor(expected), atol=1e-5)


def test_a_shift_moves_rows_and_columns_and_repeats_the_border():
    seen = augment(SMALL, {"shift": torch.tensor([[1, 0], [-1, 2]])})
    assert seen[0, 0].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7]]
    assert seen[1, 0].tolist() == [[16, 16, 16, 17], [20, 20, 20, 21], [20, 20, 20, 21]]


def test_a_flip_mirrors_left_and_right_of_its_own_item_alone():
    seen = augment(SMALL, {"flip": torch.tensor([False, True])})
    assert torch.equal(seen[0], SMALL[0])
    assert seen[1, 0].tolist() == [[15, 14, 13, 12], [19, 18, 17, 16], [23, 22, 21, 20]]


def test_a_picture_is_cropped_then_moved_then_mirrored():
    view = {
        "crop": torch.tensor([[0.0, 0.0, 0.8, 0.8], [0.1, 0.15, 0.8, 0.8]]),
        "shift": torch.tensor([[0, 1], [-1, 1]]),
        "flip": torch.tensor([True, True]),
    }
    one_by_one = SMALL
    for name, values in view.items():
        one_by_one = augment(one_by_one, {name: values})
    assert torch.equal(augment(SMALL, view), one_by_one)
    other_order = augment(augment(SMALL, {"flip": view["flip"]}), {"shift": view["shift"]})
    assert not torch.equal(augment(SMALL, {k: view[k] for k in ("shift", "flip")}), other_order)


# -- drawing


def test_views_are_within_what_the_config_allows_and_use_all_of_it():
    view = draw_views(EVERYTHING, 3, 0, 2000)
    top, left, height, width = view["crop"].unbind(1)
    area = height * width
    assert torch.equal(height, width)
    assert 0.4 <= area.min() < 0.42
    assert 0.98 < area.max() <= 1
    for corner in (top, left):
        assert corner.min() >= 0
        assert (corner + height).max() <= 1 + 1e-6
    assert sorted(set(view["shift"].flatten().tolist())) == [-2, -1, 0, 1, 2]
    assert 900 < int(view["flip"].sum()) < 1100
    assert not torch.equal(view["shift"][:, 0], view["shift"][:, 1])


def test_only_what_is_asked_for_is_drawn_and_does_not_change_with_the_rest():
    every = draw_views(EVERYTHING, 3, 5, 9)
    for name, config in {
        "crop": ViewConfig(crop_scale=0.4),
        "shift": ViewConfig(shift=2),
        "flip": ViewConfig(flip=True),
    }.items():
        own = draw_views(config, 3, 5, 9)
        assert list(own) == [name]
        assert torch.equal(own[name], every[name])
        assert not config.is_off
    assert ViewConfig().is_off


def test_a_view_is_a_function_of_seed_and_position_and_not_of_the_batch():
    whole = draw_views(EVERYTHING, 3, 0, 12)
    for start, stop in ((0, 4), (4, 5), (5, 12)):
        for name, values in draw_views(EVERYTHING, 3, start, stop).items():
            assert torch.equal(values, whole[name][start:stop]), name
    other = draw_views(EVERYTHING, 4, 0, 12)
    assert all(not torch.equal(other[name], whole[name]) for name in whole)


# -- in the stream


def test_a_stream_in_batches_of_another_size_has_the_same_pictures_to_the_bit():
    source = stream()
    wide = [source.batch(6, epoch_seed=2, position=k) for k in range(2)]
    narrow = [source.batch(4, epoch_seed=2, position=k) for k in range(3)]
    for read in (lambda batch: batch.x0, lambda batch: batch.index, lambda batch: batch.view["crop"]):
        assert torch.equal(torch.cat([read(b) for b in wide]), torch.cat([read(b) for b in narrow]))


def test_a_view_of_an_earlier_batch_is_shown_again_to_the_bit_by_another_source():
    earlier = stream().batch(5, epoch_seed=2, position=3)
    kept = {name: value.clone() for name, value in earlier.view.items()}
    later = stream(ViewConfig())
    later.batch(5, epoch_seed=2, position=4)
    again: Batch = later.viewed(earlier.index, kept)
    assert torch.equal(again.x0, earlier.x0)
    assert torch.equal(again.index, earlier.index)
    assert all(torch.equal(again.view[name], kept[name]) for name in ("crop", "shift", "flip"))
    assert not torch.equal(later.items(earlier.index).x0, earlier.x0)


def test_items_of_a_view_are_replayed_one_by_one_and_in_any_order():
    earlier = stream().batch(5, epoch_seed=2, position=3)
    chosen = torch.tensor([3, 0, 4])
    view = {name: values[chosen] for name, values in earlier.view.items()}
    again = stream().viewed(earlier.index[chosen], view)
    assert torch.equal(again.x0, earlier.x0[chosen])


def test_a_recipe_s_data_are_seen_as_its_table_says(tmp_path):
    for number in range(3):
        Image.new("RGB", (6, 4), (60 * number, 10, 200)).save(tmp_path / f"{number}.png")
    source = build_source({"name": "images", "path": str(tmp_path), "view": {"shift": 1}})
    batch = source.batch(3, epoch_seed=0, position=0)
    assert list(batch.view) == ["shift"]
    assert torch.equal(batch.x0, augment(source.items(batch.index).x0, batch.view))


def test_a_view_of_data_without_pictures_is_refused():
    with pytest.raises(ConfigError, match=r"data.view changes pictures, and this data has none") as caught:
        build_source({"name": "classes", "num_classes": 3, "view": {"flip": True}})
    assert caught.value.field == "data.view"


@pytest.mark.parametrize(
    ("table", "key"),
    [({"shift": -1}, "shift"), ({"crop_scale": 0}, "crop_scale"), ({"crop_scale": 1.2}, "crop_scale")],
)
def test_a_view_that_cannot_be_is_refused_by_the_name_of_its_key(table, key):
    with pytest.raises(ConfigError, match=key) as caught:
        build_source({"name": "digits", "view": table})
    assert caught.value.field == f"data.view.{key}"
