import pytest
import torch

from distill_core.data import build_source, source_types
from distill_core.errors import ConfigError, DataError


def labels_of(batch):
    return batch.cond["class_label"]


def test_every_source_is_found_by_the_name_its_options_carry():
    known = source_types()
    assert {"digits", "images", "huggingface", "idx", "classes", "prompts"} <= known.keys()
    for name, cls in known.items():
        assert cls.Config.model_fields["name"].default == name


def test_an_unknown_source_names_the_nearest_one():
    with pytest.raises(ConfigError, match="did you mean 'digits'") as caught:
        build_source({"name": "digit"})
    assert caught.value.field == "data.name"


def test_a_missing_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match="huggingface") as caught:
        build_source({})
    assert caught.value.field == "data.name"


def test_an_unknown_option_names_its_field():
    with pytest.raises(ConfigError, match="did you mean 'split'") as caught:
        build_source({"name": "digits", "splt": "all"})
    assert caught.value.field == "data.splt"


def test_an_epoch_shows_every_item_once():
    source = build_source({"name": "classes", "num_classes": 60})
    seen = torch.cat([labels_of(source.batch(20, epoch_seed=3, position=k)) for k in range(3)])
    assert sorted(seen.tolist()) == list(range(60))


def test_the_second_epoch_has_another_order_and_batches_reach_over_the_end():
    source = build_source({"name": "classes", "num_classes": 10})
    stream = torch.cat([labels_of(source.batch(7, epoch_seed=0, position=k)) for k in range(10)])
    epochs = stream.reshape(7, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_a_batch_larger_than_the_set_repeats_it():
    source = build_source({"name": "classes", "num_classes": 4})
    assert torch.bincount(labels_of(source.batch(12, epoch_seed=0, position=0))).tolist() == [3, 3, 3, 3]


def test_a_batch_depends_on_seed_and_position_alone():
    first, again = (build_source({"name": "digits"}) for _ in range(2))
    for position in range(5):
        first.batch(64, epoch_seed=1, position=position)
    a, b = (source.batch(64, epoch_seed=1, position=5) for source in (first, again))
    assert torch.equal(a.x0, b.x0)
    assert torch.equal(labels_of(a), labels_of(b))
    assert not torch.equal(a.x0, again.batch(64, epoch_seed=2, position=5).x0)


def test_the_order_does_not_touch_the_global_random_state():
    state = torch.get_rng_state()
    build_source({"name": "digits"}).batch(8, epoch_seed=1, position=0)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("size", "position"), [(0, 0), (-1, 0), (2_000_000, 0), (8, -1)])
def test_an_impossible_batch_is_refused(size, position):
    with pytest.raises(ConfigError, match="batch of"):
        build_source({"name": "classes", "num_classes": 3}).batch(size, epoch_seed=0, position=position)


def test_a_limited_evaluation_set_is_always_the_same_mixture():
    source = build_source({"name": "digits"})
    part = source.all(400)
    assert part.size == 400
    assert torch.equal(part.x0, source.all(400).x0)
    assert torch.bincount(labels_of(part)).min() > 20
    assert source.all().size == source.all(10**6).size == 1797


def test_class_frequencies_sum_to_one_and_need_labels():
    frequencies = build_source({"name": "digits"}).class_frequencies()
    assert frequencies.shape == (10,)
    assert frequencies.sum().item() == pytest.approx(1)
    with pytest.raises(DataError, match="no labels"):
        build_source({"name": "prompts", "prompts": ["a cat"]}).class_frequencies()
