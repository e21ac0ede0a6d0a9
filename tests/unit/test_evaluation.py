"""Evaluation: what is compared with what, by which model, and how often the real pictures are read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from distill_core import api
from distill_core.artifacts import CondSpec, ImageSpec, SamplerSpec
from distill_core.data import build_source
from distill_core.diffusion.schedule import NoiseSchedule
from distill_core.errors import ArtifactError, ConfigError, NotFound
from distill_core.kinds.base import image_probe_of
from distill_core.kinds.denoiser.card import Evaluate
from distill_core.kinds.denoiser.evaluation import Evaluator, load_evaluator
from distill_core.metrics.frechet import set_figures
from distill_core.metrics.judge import Judge
from distill_core.networks.classifier import Classifier, ClassifierConfig
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.generation import generate
from distill_core.recipe import load_recipe
from tests.helpers import tiny_clip, tiny_text_to_image, tiny_trainer

COUNT = 40


class Playback(Denoiser):
    """A generator that answers class k with picture k of a set, whatever the noise."""

    def __init__(self, pictures: torch.Tensor) -> None:
        super().__init__()
        self.pictures = torch.nn.Parameter(pictures)
        channels, height, width = self.pictures.shape[1:]
        self.image = ImageSpec(
            channels=channels, height=height, width=width, picture=(channels, height, width)
        )
        self.cond = CondSpec(kind="class_label", num_classes=len(pictures))
        self.sampler = SamplerSpec.few_step((1.0,), noise_scale=1.0)
        self.schedule = NoiseSchedule("edm")

    def forward(self, x_sigma, sigma, cond=None):
        return self.pictures[cond["class_label"]]

    def with_features(self, x_sigma, sigma, cond=None):
        raise NotImplementedError

    def null_cond(self, batch):
        return {}


@pytest.fixture
def judge():
    torch.manual_seed(0)
    return Judge(Classifier(ClassifierConfig(shape=(1, 8, 8), num_classes=COUNT, width=8)))


@pytest.fixture(scope="module")
def digits():
    return build_source({"name": "digits"})


def evaluator(digits, judge, **options) -> Evaluator:
    return Evaluator(digits, Evaluate(num_samples=COUNT, batch_size=16), judge=judge, **options)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_text_to_image(tmp_path_factory.mktemp("text") / "pipeline")


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioned")
    draws = np.random.default_rng(0)
    for index in range(12):
        Image.fromarray(draws.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(f"picture {'abcdefghijkl'[index]}")
    return {"name": "images", "path": str(folder)}


def test_a_generator_that_gives_the_real_pictures_back_is_perfect(digits, judge):
    found = evaluator(digits, judge).figures(Playback(digits.all(COUNT).x0))
    assert found["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)
    assert found["ms_per_image"] > 0


def test_accuracy_is_that_of_the_labels_asked_for(digits, judge):
    real = digits.all(COUNT).x0
    seen = judge.classifier(real).argmax(1)
    wanted = (seen == torch.arange(COUNT)).double().mean()
    assert evaluator(digits, judge).figures(Playback(real))["accuracy"] == pytest.approx(float(wanted))


def test_the_real_pictures_are_read_once_however_much_is_measured(digits, judge, monkeypatch):
    read = []
    taken = digits.pixels.take
    monkeypatch.setattr(digits.pixels, "take", lambda indices: read.append(len(indices)) or taken(indices))
    measured = evaluator(digits, judge)
    for shift in (0.0, 0.1, 0.2):
        measured.figures(Playback(digits.pixels.values[:COUNT] * (1 - shift)))
    assert sum(read) == COUNT
    assert max(read) <= 16  # in batches: a set of large pictures does not fit into memory


def test_an_extractor_takes_the_distances_and_leaves_accuracy_to_the_judge(digits, judge, clip):
    from distill_core.metrics.extractors import load_extractor

    extractor, real = load_extractor(clip), digits.all(COUNT).x0
    made = Playback(real.flip(3))
    alone, both = evaluator(digits, judge), evaluator(digits, judge, extractor=extractor)
    found = both.figures(made)
    wanted = set_figures(extractor.features(real), extractor.features(real.flip(3)))
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    assert found["accuracy"] == alone.figures(made)["accuracy"]
    assert found["frechet_distance"] != pytest.approx(alone.figures(made)["frechet_distance"], rel=0.01)


def test_every_figure_says_what_it_rests_on(digits, clip, pipeline, captioned, tmp_path):
    where = api.context(tmp_path / "store", tmp_path / "cache")
    config = Evaluate(
        extractor={"path": str(clip)}, clip={"path": str(clip)}, data=captioned, num_samples=8, seed=3
    )
    measured = load_evaluator(config, load_denoiser(pipeline), digits, where)
    said = measured.measured_with({})
    assert said.keys() == {"distances", "clip_score"}
    assert said["distances"].startswith("features of model (CLIPModel, sha256 ")
    assert said["distances"].endswith("8 samples, seed 3, 8 real pictures")


def test_text_models_are_compared_with_pictures_and_their_prompts(
    digits, clip, pipeline, captioned, tmp_path
):
    from distill_core.metrics.extractors import load_extractor, load_scorer

    where = api.context(tmp_path / "store", tmp_path / "cache")
    config = Evaluate(
        extractor={"path": str(clip)},
        clip={"path": str(clip)},
        preference={"path": str(clip)},
        data=captioned,
        num_samples=12,
        batch_size=5,
    )
    denoiser, source = load_denoiser(pipeline), build_source(captioned)
    measured = load_evaluator(config, denoiser, digits, where)
    found = measured.figures(denoiser, num_steps=1)
    made = generate(denoiser, denoiser.encode_prompts(source.prompts), 12, num_steps=1)
    cosines = load_scorer(clip).cosines(made, source.prompts)
    assert found["clip_score"] == pytest.approx(
        100 * float(cosines.mean()), abs=1e-3
    )  # of cosines in [-100, 100]
    assert found["preference_score"] == found["clip_score"]
    extractor = load_extractor(clip)
    wanted = set_figures(extractor.features(source.all().x0), extractor.features(made))
    assert found["frechet_distance"] == pytest.approx(wanted["frechet_distance"], rel=1e-3)


def test_prompts_go_round_where_more_pictures_are_wanted(clip, pipeline, tmp_path):
    where = api.context(tmp_path / "store", tmp_path / "cache")
    source = build_source({"name": "prompts", "prompts": ["a cat", "a dog"]})
    denoiser = load_denoiser(pipeline)
    scores = {}
    for count in (2, 4):
        config = Evaluate(clip={"path": str(clip)}, num_samples=count, batch_size=3)
        measured = load_evaluator(config, denoiser, source, where)
        scores[count] = measured.figures(denoiser, num_steps=1)
    assert scores[4].keys() == {"clip_score", "ms_per_image"}
    assert [measured._prompts(denoiser, range(4))] == [["a cat", "a dog", "a cat", "a dog"]]


@pytest.mark.parametrize(
    ("tables", "error", "field", "sentence"),
    [
        ({"extractor": {"path": "/nonexistent"}}, NotFound, "evaluate.extractor", "does not exist"),
        ({"clip": {"path": "{clip}"}}, ConfigError, "evaluate", "here are none"),
        (
            {"extractor": {"path": "{empty}"}},
            ArtifactError,
            "evaluate.extractor",
            "not a transformers folder",
        ),
        ({"judge": {"path": "{empty}"}}, ArtifactError, "evaluate.judge", "not a classifier"),
    ],
)
def test_models_that_cannot_measure_are_refused_before_the_training(
    tables, error, field, sentence, digits, clip, tmp_path
):
    (tmp_path / "empty").mkdir()
    places = {"clip": str(clip), "empty": str(tmp_path / "empty")}
    config = Evaluate.parse({key: {"path": given["path"].format(**places)} for key, given in tables.items()})
    where = api.context(tmp_path / "store", tmp_path / "cache")
    with pytest.raises(error, match=sentence) as caught:
        load_evaluator(config, Playback(digits.all(4).x0), digits, where)
    assert caught.value.field == field


def test_a_judge_of_other_pictures_measures_nothing_and_says_so(digits, judge, tmp_path, caplog):
    judge.classifier.save(tmp_path / "judge")
    where = api.context(tmp_path / "store", tmp_path / "cache")
    config = Evaluate(judge={"path": str(tmp_path / "judge")})
    assert load_evaluator(config, Playback(torch.zeros(2, 3, 16, 16)), digits, where) is None
    assert "the judge reads pictures of shape" in caplog.text


@pytest.mark.slow
def test_a_published_model_is_evaluated_and_its_training_says_what_measured_it(context, tmp_path):
    recipe = load_recipe("edm_digits", {"steps": 1, "batch_size": 8, "evaluate.num_samples": 12})
    where = api.context(tmp_path / "store", tmp_path / "cache")
    trainer = tiny_trainer("judge_digits", context, tmp_path / "judge")
    trainer.method.main.save(tmp_path / "judge" / "model")
    recipe = recipe.override({"evaluate.judge.path": str(tmp_path / "judge" / "model"), "ema": {}})
    result = api.train(recipe, tmp_path / "run", where, job="job")
    assert result.figures["frechet_distance"] > 0
    assert result.measured_with["accuracy"].endswith("12 samples, seed 0")
    assert result.manifest.metrics["accuracy"] == result.figures["accuracy"]
    assert result.manifest.metrics["measured_with.accuracy"] == result.measured_with["accuracy"]
    figures, said = api.evaluate("edm-digits", recipe.evaluate, {"name": "digits"}, where)
    close = {name: value for name, value in result.figures.items() if not name.startswith("ms_")}
    assert {name: figures[name] for name in close} == pytest.approx(close, rel=1e-3)
    assert said == result.measured_with
    answered, published = image_probe_of(api.load("edm-digits", where)), result.manifest.parity
    np.testing.assert_allclose(answered.means, published.means, atol=1e-3)  # what it will be compared with


@pytest.mark.parametrize(
    ("tables", "data", "sentence"),
    [
        ({}, {"name": "digits"}, "nothing can be measured of"),
        ({"judge": {"recipe": "judge_digits"}}, None, "needs data to compare with"),
    ],
)
def test_an_evaluation_without_measure_or_data_is_refused(tables, data, sentence, tmp_path):
    where = api.context(tmp_path / "store", tmp_path / "cache")
    tiny_text_to_image(tmp_path / "model")
    with pytest.raises(ConfigError, match=sentence):
        api.evaluate(str(tmp_path / "model"), tables, data, where)
