import pytest
import torch

from distill_core.data import build_source
from distill_core.errors import ConfigError, DataError
from distill_core.methods.pretrain.classifier import (
    ClassifierTraining,
    Config,
    classification_loss,
    shifted,
)
from distill_core.networks.classifier import load_classifier
from distill_core.recipe import load_recipe
from distill_core.recipe.tables import EvaluateConfig, NetworkConfig


def build(data=None, network=None, **config):
    torch.manual_seed(0)
    data = data or build_source({"name": "digits", "split": "train"})
    return ClassifierTraining(Config.parse(config, where="config"), network=network, data=data)


def train(method, recipe, steps):
    optim = recipe.optim["classifier"]
    optimizer = torch.optim.AdamW(
        method.classifier.parameters(), lr=optim.lr, weight_decay=optim.weight_decay
    )
    for step in range(steps):
        batch = method.data.batch(recipe.batch_size, epoch_seed=recipe.seed, position=step)
        for update in method.updates(batch, step):
            optimizer.zero_grad()
            update.loss.backward()
            optimizer.step()


@pytest.mark.slow
def test_the_digits_recipe_learns_unseen_digits_within_a_third_of_its_steps():
    recipe = load_recipe("judge_digits")
    method = build(build_source(recipe.data), recipe.network, **recipe.config)
    before = method.figures(EvaluateConfig())["accuracy"]
    train(method, recipe, steps=150)
    figures = method.figures(EvaluateConfig())
    assert before < 0.3
    assert figures["accuracy"] > 0.93
    assert figures.keys() == {"accuracy", "train_accuracy", "negative_log_likelihood", "calibration_error"}


def test_the_cifar10_recipe_is_complete_but_for_the_folder():
    recipe = load_recipe("judge_cifar10", {"data.path": "/some/folder"})
    assert Config.parse(recipe.config).held_out == {"split": "test"}
    assert recipe.data["path"] == "/some/folder"


def test_the_loss_is_cross_entropy_with_smoothed_labels():
    logits, labels, s = torch.randn(6, 4), torch.arange(6) % 4, 0.2
    q = (1 - s) * torch.eye(4)[labels] + s / 4
    assert torch.allclose(classification_loss(logits, labels, s), -(q * logits.log_softmax(1)).sum(1).mean())


def test_shifting_moves_each_picture_by_whole_pixels_and_nothing_else():
    torch.manual_seed(0)
    x = torch.zeros(200, 2, 9, 12)
    x[:, 0, 4, 6], x[:, 1, 4, 6] = 1, 2
    y = shifted(x, 2)
    places = {tuple(place.nonzero()[0].tolist()) for place in y[:, 0]}
    assert len(places) == 25
    assert {row for row, _ in places} == {2, 3, 4, 5, 6}
    assert {column for _, column in places} == {4, 5, 6, 7, 8}
    assert torch.equal(y[:, 1], 2 * y[:, 0])
    assert torch.equal(shifted(x, 0), x)


def test_augmentation_is_off_by_default_and_mirrors_when_asked():
    x = torch.randn(64, 1, 8, 8)
    assert torch.equal(build().augmented(x), x)
    flipped = build(flip=True).augmented(x)
    same, mirrored = ((flipped == y).flatten(1).all(1) for y in (x, x.flip(3)))
    assert (same | mirrored).all()
    assert same.any()
    assert mirrored.any()


def test_the_result_is_saved_and_loads_again(tmp_path):
    method = build()
    method.main.save(tmp_path)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(load_classifier(tmp_path)(x), method.classifier(x))
    assert method.main.kind == "predictor"


def test_without_held_out_data_only_the_training_accuracy_is_measured():
    assert build().figures(EvaluateConfig(num_samples=50)).keys() == {"train_accuracy"}


@pytest.mark.parametrize(
    "values", [{"name": "prompts", "prompts": ["a"]}, {"name": "classes", "num_classes": 3}]
)
def test_data_without_labelled_pictures_is_refused(values):
    with pytest.raises(DataError, match="pictures with labels"):
        build(build_source(values))


def test_held_out_data_of_another_kind_is_refused():
    with pytest.raises(DataError, match="held-out pictures are None in 3 classes"):
        build(held_out={"name": "classes", "num_classes": 3})


@pytest.mark.parametrize(
    ("network", "field"),
    [
        (NetworkConfig(name="clasifier"), "network.name"),
        (NetworkConfig(name="classifier", args={"widht": 8}), "network.args.widht"),
        (NetworkConfig(name="classifier", args={"num_classes": 3}), "network.args.num_classes"),
    ],
)
def test_a_wrong_network_names_its_field(network, field):
    with pytest.raises(ConfigError) as caught:
        build(network=network)
    assert caught.value.field == field
