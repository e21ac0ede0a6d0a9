import pytest
import torch

from distill_core.data import build_source
from distill_core.errors import ConfigError


def shapes(**options):
    return build_source({"name": "shapes", **options})


def test_each_picture_shows_its_label_and_its_prompt_says_no_more_than_that():
    source = shapes(count=900, shapes=["circle", "square", "triangle", "cross"], colours=["red", "yellow"])
    batch = source.all()
    assert batch.x0.shape == (900, 3, 16, 16)
    assert -1 <= batch.x0.min() < -0.99
    assert 0.9 < batch.x0.max() <= 1
    seen = source.recognise(batch.x0)
    assert (seen == batch.cond["class_label"]).float().mean() > 0.995
    for label, prompt in zip(source.labels.tolist(), source.prompts):
        assert set(prompt.split()) <= set(source.class_names[label].split())


def test_recognition_survives_noise_and_tells_all_shapes_and_colours_apart():
    source = shapes(
        count=480,
        shapes=["circle", "square", "triangle", "cross"],
        colours=["red", "green", "blue", "yellow"],
    )
    torch.manual_seed(0)
    x0 = source.all().x0
    assert (source.recognise(x0 + 0.1 * torch.randn_like(x0)) == source.labels).float().mean() > 0.97


def test_an_item_depends_on_the_seed_and_its_index_alone():
    few, many = shapes(count=20), shapes(count=200)
    assert torch.equal(few.all().x0, many.items(torch.arange(20)).x0)
    assert few.prompts == many.prompts[:20]
    assert not torch.equal(few.all().x0, shapes(count=20, seed=1).all().x0)


def test_classes_are_balanced_and_no_two_pictures_of_one_are_alike():
    source = shapes(count=90)
    assert source.class_frequencies().tolist() == pytest.approx([1 / 9] * 9)
    same = source.all().x0[source.labels == 0].flatten(1)
    assert torch.cdist(same, same)[~torch.eye(len(same), dtype=bool)].min() > 0.1


def test_the_shares_of_shorter_prompts_are_kept():
    source = shapes(count=4000, no_colour=0.3, no_shape=0.2)
    words = [set(prompt.split()) for prompt in source.prompts]
    assert sum(w <= set(source.config.shapes) for w in words) / 4000 == pytest.approx(0.3, abs=0.03)
    assert sum(w <= set(source.config.colours) for w in words) / 4000 == pytest.approx(0.2, abs=0.03)
    assert all(len(prompt.split()) == 2 for prompt in shapes(no_colour=0, no_shape=0).prompts)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"colours": ["red", "red"]}, "each once"),
        ({"shapes": []}, "at least one"),
        ({"shapes": ["star"]}, "star"),
        ({"no_colour": 0.7, "no_shape": 0.7}, "together at most 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        shapes(**options)
