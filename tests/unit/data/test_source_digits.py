import torch

from distill_core.data import build_source


def test_digits_are_pictures_in_unit_range_with_their_class():
    source = build_source({"name": "digits"})
    batch = source.batch(32, epoch_seed=0, position=0)
    assert (source.shape, source.num_classes, source.size) == ((1, 8, 8), 10, 1797)
    assert source.class_names == tuple("0123456789")
    assert batch.x0.shape == (32, 1, 8, 8)
    assert batch.x0.dtype == torch.float32
    assert batch.cond["class_label"].dtype == torch.int64
    everything = source.all().x0
    assert (everything.min().item(), everything.max().item()) == (-1.0, 1.0)


def test_the_held_out_digits_are_a_fifth_of_every_class_and_no_training_digit():
    whole, train, test = (
        build_source({"name": "digits", "split": split}) for split in ("all", "train", "test")
    )
    assert train.size + test.size == whole.size
    counts = [torch.bincount(source.labels, minlength=10) for source in (whole, test)]
    assert ((counts[1] / counts[0] - 0.2).abs() < 0.005).all()
    together = torch.cat([train.all().x0, test.all().x0]).flatten(1)
    key = together.sum(1).sort().values
    assert torch.equal(key, whole.all().x0.flatten(1).sum(1).sort().values)


def test_a_part_of_the_digits_keeps_their_labels_and_unlabelled_ones_have_none():
    some = build_source({"name": "digits", "only": [0, 3]})
    assert set(some.labels.tolist()) == {0, 3}
    assert some.num_classes == 10
    bare = build_source({"name": "digits", "labelled": False})
    assert bare.num_classes is None
    assert bare.batch(4, epoch_seed=0, position=0).cond == {}
