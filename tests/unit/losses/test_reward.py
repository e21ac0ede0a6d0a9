"""Rewards: what they score, their gradients, and what they refuse."""

from __future__ import annotations

import json

import pytest
import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from distill_core.errors import ArtifactError, ConfigError
from distill_core.losses.reward import RewardConfig, build_reward, hinge_loss, mean_reward
from distill_core.networks.classifier import Classifier, ClassifierConfig
from distill_core.networks.clip_io import load_clip
from distill_core.networks.foreign.vision import PROCESSOR
from tests.helpers import tiny_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load_clip(tiny_clip(tmp_path_factory.mktemp("clip") / "model"))


def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(shape=(1, 8, 8), num_classes=3, width=8)).requires_grad_(False)


def test_ink_is_the_share_of_white():
    pictures = torch.stack([torch.full((1, 4, 4), value) for value in (-1.0, 0.0, 1.0)])
    reward = build_reward(RewardConfig(name="ink"), None, num_classes=None)
    assert reward.score(pictures, {}).tolist() == [0.0, 0.5, 1.0]


def test_a_class_probability_is_that_of_the_class_asked_for_and_a_step_up_its_gradient_raises_it():
    network = classifier()
    reward = build_reward(RewardConfig(name="class_probability"), network, num_classes=3)
    pictures, labels = torch.randn(4, 1, 8, 8, requires_grad=True), torch.tensor([0, 1, 2, 2])
    score = reward.score(pictures, {"class_label": labels})
    assert torch.equal(score, network(pictures).softmax(1)[torch.arange(4), labels])
    (gradient,) = torch.autograd.grad(score.sum(), pictures)
    better = pictures + 0.1 * gradient / gradient.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    assert (reward.score(better, {"class_label": labels}) > score).all()


def test_a_mean_reward_counts_every_picture_once_with_its_own_condition():
    network = classifier()
    reward = build_reward(RewardConfig(name="class_probability"), network, num_classes=3)
    pictures, labels = torch.randn(7, 1, 8, 8), torch.tensor([0, 1, 2, 2, 1, 0, 2])
    expected = network(pictures).softmax(1)[torch.arange(7), labels].mean().item()
    found = mean_reward(reward, pictures, {"class_label": labels}, device=torch.device("cpu"), batch_size=3)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_text_similarity_is_the_cosine_that_transformers_gives(clip):
    texts = ("a cat", "dog")
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    pixels = clip.preprocessed(pictures)
    tokens = clip.tokenizer(list(texts), padding=True, return_tensors="pt")
    with torch.no_grad():
        said = clip.model(**tokens, pixel_values=pixels)
    cosines = said.logits_per_image / clip.model.logit_scale.exp()
    each = build_reward(RewardConfig(name="text_similarity", texts=texts), clip, num_classes=2)
    found = each.score(pictures, {"class_label": torch.tensor([1, 0])})
    torch.testing.assert_close(found, torch.stack([cosines[0, 1], cosines[1, 0]]))
    one = build_reward(RewardConfig(name="text_similarity", texts=texts[:1]), clip, num_classes=None)
    torch.testing.assert_close(one.score(pictures, {}), cosines[:, 0])


def test_a_text_similarity_reads_grey_pictures_of_any_size_and_has_a_gradient(clip):
    reward = build_reward(RewardConfig(name="text_similarity", texts=("one",)), clip, num_classes=10)
    pictures = torch.randn(2, 1, 8, 8, requires_grad=True)
    reward.score(pictures, {}).sum().backward()
    assert pictures.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in clip.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"size": {"height": 32, "width": 32}, "do_center_crop": False, "resample": 2},
        {"do_normalize": False},
        {"rescale_factor": 1 / 128},
    ],
)
def test_pictures_are_prepared_as_the_processor_of_the_folder_does(changes, tmp_path):
    folder = tiny_clip(tmp_path / "model")
    table = json.loads((folder / PROCESSOR).read_text())
    (folder / PROCESSOR).write_text(json.dumps({**table, **changes}))
    levels = torch.randint(0, 256, (2, 3, 41, 53), generator=torch.Generator().manual_seed(3))
    theirs = CLIPImageProcessorPil.from_pretrained(folder)
    expected = theirs([picture.permute(1, 2, 0).byte().numpy() for picture in levels], return_tensors="pt")
    ours = load_clip(folder).preprocessed(levels / 127.5 - 1)
    torch.testing.assert_close(ours, expected["pixel_values"], atol=1e-5, rtol=1e-5)


def test_a_processor_that_is_not_understood_is_refused_by_its_key(tmp_path):
    folder = tiny_clip(tmp_path / "model")
    table = json.loads((folder / PROCESSOR).read_text())
    (folder / PROCESSOR).write_text(json.dumps({**table, "do_pad": True}))
    with pytest.raises(ArtifactError, match="do_pad"):
        load_clip(folder)
    (folder / PROCESSOR).write_text(json.dumps({**table, "crop_size": {"height": 24, "width": 24}}))
    with pytest.raises(ArtifactError, match="makes pictures of 24 x 24, and the model takes 32 x 32"):
        load_clip(folder)


def test_a_damaged_clip_folder_is_an_error_that_names_it(tmp_path):
    folder = tiny_clip(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match=str(folder)):
        load_clip(folder)


def test_the_hinge_pulls_only_what_is_below_its_threshold():
    score = torch.tensor([0.1, 0.3, 0.5], requires_grad=True)
    loss = hinge_loss(score, 0.3)
    loss.backward()
    assert loss.item() == pytest.approx(0.2 / 3)
    assert score.grad.tolist() == pytest.approx([-1 / 3, 0.0, 0.0])


@pytest.mark.parametrize(
    ("config", "extractor", "classes", "sentence"),
    [
        ({"name": "class_probability"}, None, 3, r"a classifier.*set \[extractor\]"),
        ({"name": "class_probability"}, classifier(), None, "needs data with labels"),
        ({"name": "text_similarity", "texts": ("a",)}, classifier(), 3, "a CLIP folder"),
    ],
)
def test_a_reward_without_what_it_needs_says_so(config, extractor, classes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build_reward(RewardConfig(**config), extractor, num_classes=classes)


def test_texts_are_one_or_one_per_class(clip):
    with pytest.raises(ConfigError, match="holds 2 texts; give one, or one per class"):
        build_reward(RewardConfig(name="text_similarity", texts=("a", "b")), clip, num_classes=3)
    with pytest.raises(ConfigError, match="holds 0 texts"):
        build_reward(RewardConfig(name="text_similarity"), clip, num_classes=3)
