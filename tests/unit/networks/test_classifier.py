import json

import pytest
import torch

from distill_core.artifacts import Manifest
from distill_core.errors import ArtifactError, ConfigError
from distill_core.kinds.cards import described
from distill_core.networks.classifier import Classifier, ClassifierConfig, load_classifier, predict


def build(shape=(1, 8, 8), **options):
    torch.manual_seed(0)
    return Classifier(ClassifierConfig.parse({"shape": shape, "num_classes": 10, "width": 8, **options}))


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 8, 8), (3, 28, 28), (3, 32, 32), (3, 33, 65)])
def test_any_shape_gives_logits_and_32_features(shape):
    classifier = build(shape)
    x = torch.randn(5, *shape)
    assert classifier(x).shape == (5, 10)
    assert classifier.features(x).shape == (5, 32)
    assert torch.equal(classifier.last(classifier.features(x)), classifier(x))


def test_an_answer_does_not_depend_on_the_rest_of_the_batch():
    classifier, x = build(), torch.randn(9, 1, 8, 8)
    assert torch.allclose(classifier(x)[4], classifier(x[4:5])[0], atol=1e-5)


def test_features_tell_where_a_stroke_is():
    classifier = build()
    x = torch.full((1, 1, 8, 8), -1.0)
    x[..., :3, :3] = 1
    assert not torch.allclose(classifier.features(x), classifier.features(x.flip(2)), atol=1e-3)


def test_answers_come_in_batches_without_gradient():
    classifier, x = build(), torch.randn(11, 1, 8, 8)
    features, logits = predict(classifier, x, batch_size=4)
    assert torch.allclose(features, classifier.features(x), atol=1e-5)
    assert torch.allclose(logits, classifier(x), atol=1e-5)
    assert not logits.requires_grad


def test_saving_and_loading_changes_no_bit(tmp_path):
    classifier, x = build(class_names=list("0123456789")), torch.randn(3, 1, 8, 8)
    classifier.save(tmp_path)
    loaded = load_classifier(tmp_path)
    assert loaded.config == classifier.config
    assert torch.equal(loaded(x), classifier(x))


def test_the_manifest_accepts_what_the_network_says_of_itself():
    manifest = Manifest.parse({"name": "judge", **described(build())})
    assert (manifest.kind, manifest.card["functions"]["predict"]["inputs"]["image"]["shape"]) == (
        "predictor",
        [1, 8, 8],
    )


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path, missing):
    build().save(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ArtifactError, match=missing):
        load_classifier(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", bytes(100)])
def test_damaged_weights_and_pickles_are_named(tmp_path, content):
    build().save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.safetensors is damaged or not safetensors"):
        load_classifier(tmp_path)


def test_truncated_weights_are_named(tmp_path):
    build().save(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"model\.safetensors is damaged"):
        load_classifier(tmp_path)


def test_the_weights_of_another_network_are_refused(tmp_path):
    build().save(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "width": 16}))
    with pytest.raises(ArtifactError, match="another network"):
        load_classifier(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "3", '{"shape": [1, 8, 8]}', '{"kind": "unet"}'])
def test_a_damaged_configuration_is_named(tmp_path, text):
    build().save(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"config\.json is damaged"):
        load_classifier(tmp_path)


@pytest.mark.parametrize("values", [{"shape": (1, 2, 2)}, {"shape": (0, 8, 8)}, {"width": 12}, {"width": -8}])
def test_an_impossible_network_is_refused(values):
    with pytest.raises(ConfigError):
        build(**values)
