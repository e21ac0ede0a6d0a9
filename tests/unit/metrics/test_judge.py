import pytest
import torch

from distill_core.data import build_source
from distill_core.errors import ArtifactError, DataError
from distill_core.method import Batch
from distill_core.metrics.judge import Judge, load_judge
from distill_core.networks.classifier import Classifier, ClassifierConfig


@pytest.fixture
def judge():
    torch.manual_seed(0)
    return Judge(Classifier(ClassifierConfig(shape=(1, 8, 8), num_classes=10, width=8)), batch_size=100)


@pytest.fixture(scope="module")
def real():
    return build_source({"name": "digits"}).all(300)


def test_real_pictures_are_at_no_distance_and_noise_is_far(judge, real):
    same = judge.figures(real.x0, None, real)
    noise = judge.figures(torch.randn(300, 1, 8, 8).clamp(-1, 1), None, real)
    assert same["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert [same[name] for name in ("precision", "recall", "coverage")] == [1.0, 1.0, 1.0]
    assert noise["frechet_distance"] > same["frechet_distance"] + 1e-3
    assert noise["coverage"] < 0.5


def test_accuracy_is_the_share_of_labels_that_the_judge_sees(judge, real):
    seen = judge.classifier(real.x0).argmax(1)
    half = torch.where(torch.arange(300) < 150, seen, (seen + 1) % 10)
    assert judge.figures(real.x0, seen, real)["accuracy"] == 1
    assert judge.figures(real.x0, half, real)["accuracy"] == 0.5


def test_the_batch_size_does_not_change_the_figures(judge, real):
    whole = judge.figures(real.x0, None, Batch.of(300, real.x0.flip(3)))
    judge.batch_size = 7
    assert judge.figures(real.x0, None, Batch.of(300, real.x0.flip(3))) == pytest.approx(whole, rel=1e-4)


def test_a_saved_judge_gives_the_same_figures(judge, real, tmp_path):
    judge.classifier.save(tmp_path)
    flipped = Batch.of(300, real.x0.flip(3))
    loaded = load_judge(tmp_path)
    assert loaded.figures(real.x0, None, flipped) == pytest.approx(judge.figures(real.x0, None, flipped))
    assert not any(parameter.requires_grad for parameter in loaded.classifier.parameters())


@pytest.mark.parametrize("shape", [(20, 1, 16, 16), (20, 3, 8, 8)])
def test_pictures_of_another_shape_are_refused(judge, real, shape):
    with pytest.raises(DataError, match=r"this judge reads \(1, 8, 8\)") as caught:
        judge.figures(torch.zeros(shape), None, real)
    assert caught.value.field == "evaluate.judge"


def test_pictures_that_are_not_finite_are_refused(judge, real):
    with pytest.raises(DataError, match="generated pictures hold NaN"):
        judge.figures(torch.full((20, 1, 8, 8), float("nan")), None, real)


def test_labels_that_do_not_fit_are_refused(judge, real):
    with pytest.raises(DataError, match="do not fit"):
        judge.figures(real.x0, torch.full((300,), 10), real)


def test_data_without_pictures_cannot_be_compared_with(judge, real):
    with pytest.raises(DataError, match="has no pictures"):
        judge.figures(real.x0, None, Batch.of(300))


def test_a_folder_without_a_judge_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="is not a classifier"):
        load_judge(tmp_path)
