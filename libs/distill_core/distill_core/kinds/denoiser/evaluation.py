"""Figures of generators against real pictures and prompts: the same for every method, so that methods can be compared.

The distances compare features: of `evaluate.extractor`, else of the judge. Accuracy is the judge's. `clip_score` and
`preference_score` are 100 times the mean cosine of pictures and their prompts (Hessel et al. 2021 without its factor
2.5 and cut at 0; the values that HPSv2 prints). `Evaluator.measured_with` says what a figure rests on.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from distill_core.artifacts import SamplerSpec
from distill_core.data import Source, build_source
from distill_core.data.classes import answers_in_order, check_classes, class_names, in_order
from distill_core.diffusion.super_resolution import LOW_RESOLUTION, shrink
from distill_core.errors import ArtifactError, ConfigError, NotFound
from distill_core.kinds.base import Measured, Models
from distill_core.kinds.denoiser.card import Evaluate
from distill_core.method import Cond
from distill_core.metrics.classification import worst_class_accuracy
from distill_core.metrics.extractors import ClipScorer, VisionExtractor, load_extractor, load_scorer
from distill_core.metrics.frechet import FeatureSet, set_figures
from distill_core.metrics.image import psnr
from distill_core.metrics.judge import Judge, load_judge
from distill_core.networks.adapters import LoraDenoiser
from distill_core.networks.classifier import Classifier
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.enlarging import enlarge
from distill_core.networks.generation import default_cond, generate_x0, true_pictures
from distill_core.recipe.tables import ModelSource

log = logging.getLogger(__name__)
LIKENESS = ("psnr", "enlarged_psnr")  # of models that enlarge
SCORES = {"clip": "clip_score", "preference": "preference_score"}  # key of [evaluate] -> figure


class Evaluator:
    """Measures generators against one data source; the real pictures are read once, whatever is measured.

    Args:
        source: real pictures, prompts, or both.
        config: sample count, batch size and seed.
        judge: tells classes, and gives features if there is no extractor.
        extractor: gives the features.
        scorers: figures that compare pictures with prompts, by name.
    """

    def __init__(
        self,
        source: Source,
        config: Evaluate,
        *,
        judge: Judge | None = None,
        extractor: VisionExtractor | None = None,
        scorers: Mapping[str, ClipScorer] | None = None,
    ) -> None:
        self.source, self.config, self.judge = source, config, judge
        self.features: Judge | VisionExtractor | None = extractor or judge
        self.scorers = dict(scorers or {})

    def figures(
        self, denoiser: Denoiser, *, sampler: SamplerSpec | None = None, num_steps: int | None = None
    ) -> dict[str, float]:
        """Figures of `num_samples` pictures, and milliseconds per picture; noise is that of `config.seed`.

        Classes are balanced; prompts are the data's, those of the real pictures where it has both. A model that
        enlarges is given the real pictures, made small, and compared with them.
        """
        self._move_to(next(denoiser.parameters()).device)
        cond = (
            {} if self._prompted(denoiser) else default_cond(denoiser.cond, self.config.num_samples, denoiser)
        )
        collected: dict[str, list[Tensor]] = {}
        seconds = 0.0
        for indices in self._batches():
            prompts = self._prompts(denoiser, indices)
            truth = self._truth(denoiser, indices)
            batch_cond = denoiser.encode_prompts(prompts) if prompts else _part(cond, indices)
            if truth is not None and denoiser.cond.factor is not None:
                batch_cond = {LOW_RESOLUTION: shrink(truth, denoiser.cond.factor)}
            began = time.perf_counter()
            pictures = _pictures(denoiser, batch_cond, indices, self.config.seed, sampler, num_steps)
            seconds += time.perf_counter() - began
            seen = self._read(pictures, prompts) | _likeness(pictures, truth, batch_cond)
            for name, value in seen.items():
                collected.setdefault(name, []).append(value)
        joined = {name: torch.cat(values) for name, values in collected.items()}
        figures = self._figures(joined, self._labels(denoiser, cond))
        return {**figures, "ms_per_image": 1000 * seconds / self.config.num_samples}

    def measure(
        self,
        model: Denoiser,
        references: Mapping[str, object],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Measured:
        """Figures of a generator at each number of steps that it serves, of its teacher, and of what it began as."""
        figures = self.figures(model)
        for count in model.sampler.step_counts:  # one student that serves several numbers of steps
            by_steps = self.figures(model, num_steps=count)
            figures |= {f"steps_{count}_{name}": value for name, value in by_steps.items()}
        teacher = references.get("teacher")
        if isinstance(teacher, Denoiser) and teacher is not model:
            many = self.figures(teacher)
            once = self.figures(teacher, sampler=one_step(teacher, model.sampler))
            figures |= {f"teacher_{name}": value for name, value in many.items()}
            figures |= {f"teacher_one_step_{name}": value for name, value in once.items()}
        elif isinstance(model, LoraDenoiser):  # tuned without a teacher: what it was before
            with model.off():
                before = self.figures(model)
            figures |= {f"start_{name}": value for name, value in before.items()}
        return Measured(figures, self.measured_with(figures))

    @cached_property
    def real(self) -> FeatureSet:
        """Features of the real pictures, as many as are generated or all that there are."""
        assert self.features is not None
        parts = self.source.picked(self.config.num_samples).split(self.config.batch_size)
        pictures = (self.source.items(part).x0 for part in parts)
        return FeatureSet(torch.cat([self.features.features(x0) for x0 in pictures if x0 is not None]))

    def measured_with(self, figures: Mapping[str, float]) -> dict[str, str]:
        """Basis of these figures, in words: by figure, or `distances` for those that compare features."""
        drawn = f"{self.config.num_samples} samples, seed {self.config.seed}"
        sources = {}
        if self._compares and self.features is not None:
            real = min(self.config.num_samples, self.source.size)
            sources["distances"] = f"features of {self.features.described}; {drawn}, {real} real pictures"
        if self.judge is not None and "accuracy" in figures:
            sources["accuracy"] = f"{self.judge.described}; {drawn}"
        return sources | {name: f"{scorer.described}; {drawn}" for name, scorer in self.scorers.items()}

    @property
    def measures(self) -> bool:
        """Whether there is anything to measure with and to compare with."""
        return self._compares or self.judge is not None or bool(self.scorers)

    @property
    def _compares(self) -> bool:
        return self.features is not None and self.source.shape is not None

    def _batches(self) -> Iterator[range]:
        size, count = self.config.batch_size, self.config.num_samples
        yield from (range(start, min(start + size, count)) for start in range(0, count, size))

    def _truth(self, denoiser: Denoiser, indices: range) -> Tensor | None:
        """The real pictures (B, C, H, W) that a model which enlarges is to make; None for others."""
        if denoiser.cond.factor is None:
            return None
        return true_pictures(self.source, indices, self.config.num_samples)

    def _prompted(self, denoiser: Denoiser) -> bool:
        return denoiser.cond.kind == "prompt" and self.source.prompts is not None

    @cached_property
    def _picked(self) -> list[int]:
        return self.source.picked(self.config.num_samples).tolist()

    def _prompts(self, denoiser: Denoiser, indices: Sequence[int]) -> list[str]:
        if not self._prompted(denoiser):
            return []
        return [self.source.prompts[self._picked[i % len(self._picked)]] for i in indices]  # type: ignore[index]

    def _read(self, pictures: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Features, logits and scores of a batch of pictures, by each model that measures."""
        seen: dict[str, Tensor] = {}
        if self.judge is not None:
            seen["features"], seen["logits"] = self.judge.predict(pictures, "generated pictures")
        if self._compares and self.features is not None and self.features is not self.judge:
            seen["features"] = self.features.features(pictures)
        return seen | {name: scorer.cosines(pictures, prompts) for name, scorer in self.scorers.items()}

    def _labels(self, denoiser: Denoiser, cond: Cond) -> Tensor | None:
        """The classes asked for (N,): of the condition, or of the items that were given, if they have any."""
        if not (self._prompted(denoiser) or denoiser.cond.factor) or self.judge is None:
            return cond.get("class_label")
        if self.source.labels is None or not answers_in_order(self.judge.classifier, self.source.class_names):
            return None
        picked = self.source.labels[torch.tensor(self._picked)]
        return picked[torch.arange(self.config.num_samples) % len(picked)]

    def _figures(self, seen: Mapping[str, Tensor], labels: Tensor | None) -> dict[str, float]:
        figures = set_figures(self.real, FeatureSet(seen["features"])) if self._compares else {}
        if self.judge is not None and labels is not None:
            figures["accuracy"] = self.judge.accuracy(seen["logits"], labels)
            figures["worst_class_accuracy"] = worst_class_accuracy(seen["logits"], labels.cpu())
        figures |= {name: float(seen[name].double().mean()) for name in LIKENESS if name in seen}
        return figures | {name: 100 * float(seen[name].double().mean()) for name in self.scorers}

    def _move_to(self, device: torch.device) -> None:
        for model in (self.judge, self.features, *self.scorers.values()):
            if model is not None:
                model.to(device)


@torch.no_grad()
def _pictures(
    denoiser: Denoiser,
    cond: Cond,
    indices: range,
    seed: int,
    sampler: SamplerSpec | None,
    num_steps: int | None,
) -> Tensor:
    x0 = generate_x0(denoiser, cond, indices, seed=seed, sampler=sampler, num_steps=num_steps)
    return denoiser.decode(x0).clamp(-1, 1).float().cpu()


def _likeness(pictures: Tensor, truth: Tensor | None, cond: Cond) -> dict[str, Tensor]:
    """PSNR (B,) of enlarged pictures in [-1, 1], in dB, and of the plain enlargement of what they were made from."""
    if truth is None:
        return {}
    channels, height, width = truth.shape[1:]
    plain = enlarge(cond[LOW_RESOLUTION], (channels, height, width))
    return {"psnr": _psnr(pictures, truth), "enlarged_psnr": _psnr(plain, truth)}


def _psnr(pictures: Tensor, truth: Tensor) -> Tensor:
    pairs = (((each.permute(0, 2, 3, 1) + 1) / 2).numpy() for each in (pictures, truth))
    return torch.tensor([psnr(made, real) for made, real in zip(*pairs, strict=True)])


def _part(cond: Cond, indices: range) -> Cond:
    return {name: value[indices.start : indices.stop] for name, value in cond.items()}


def load_evaluator(config: Evaluate, denoiser: Denoiser, source: Source, models: Models) -> Evaluator | None:
    """The evaluator that `[evaluate]` describes, for `denoiser` and those like it; None if it can measure nothing.

    Raises:
        NotFound, ArtifactError: a model that is not there or cannot be used.
        ConfigError: scores of pictures against prompts, where there are no prompts.
    """
    source = source if config.data is None else build_source(config.data, folders=models)
    if denoiser.cond.kind == "class_label":
        check_classes(source, denoiser.cond, field="data" if config.data is None else "evaluate.data")
    judge, extractor, scorers = None, None, {}
    for key, model_source in config.sources.items():
        with _about(key):
            folder = models.folder(model_source)
            if key == "judge":
                judge = _fitting(_named(load_judge(folder), model_source), denoiser, source)
            elif key == "extractor":
                extractor = _named(load_extractor(folder), model_source)
            else:
                scorers[SCORES[key]] = _named(load_scorer(folder), model_source)
                _check_prompts(SCORES[key], denoiser, source)
    evaluator = Evaluator(source, config, judge=judge, extractor=extractor, scorers=scorers)
    if extractor is not None and source.shape is None:
        log.warning("evaluate.extractor has no real pictures to compare with: set evaluate.data")
    enlarges = denoiser.cond.factor is not None and source.shape is not None
    return evaluator if evaluator.measures or enlarges else None


_Model = TypeVar("_Model", Judge, VisionExtractor, ClipScorer)


def _named(model: _Model, source: ModelSource) -> _Model:
    """`model`, described by what the recipe calls it too."""
    called = source.artifact or source.recipe or Path(str(source.path)).name
    model.described = f"{called} ({model.described})"
    return model


@contextlib.contextmanager
def _about(key: str) -> Iterator[None]:
    """Errors inside name the key."""
    try:
        yield
    except (ArtifactError, NotFound) as error:
        error.field = f"evaluate.{key}"
        raise


def _check_prompts(score: str, denoiser: Denoiser, source: Source) -> None:
    if denoiser.cond.kind != "prompt" or source.prompts is None:
        raise ConfigError(
            f"{score} compares pictures with their prompts, and here are none; it needs a text-to-image model "
            "and data with prompts",
            field="evaluate",
        )


def _fitting(judge: Judge, denoiser: Denoiser, source: Source) -> Judge | None:
    """The judge, its answers in the order of the classes asked for; None, with a warning, if it reads other pictures.

    Raises:
        ConfigError: it does not know the classes that the denoiser makes.
    """
    if judge.classifier.shape == tuple(denoiser.image.picture):
        judge.classifier = _in_asked_order(judge.classifier, denoiser, source)
        return judge
    log.warning(
        "the judge reads pictures of shape %s, the model makes %s: no accuracy and none of its distances are "
        "measured; train a classifier on such pictures and set evaluate.judge",
        judge.classifier.shape,
        tuple(denoiser.image.picture),
    )
    return None


def _in_asked_order(classifier: Classifier, denoiser: Denoiser, source: Source) -> Classifier:
    """`classifier` in the order of the model's classes, or of those of the data whose prompts are given."""
    if denoiser.cond.kind == "class_label":
        names = class_names(denoiser.cond)
        return in_order(classifier, names, what="evaluate.judge", field="evaluate.judge")
    if denoiser.cond.kind in ("prompt", "low_resolution") and source.labels is not None:
        try:
            return in_order(classifier, source.class_names, what="evaluate.judge", field="evaluate.judge")
        except ConfigError as error:
            log.warning("no accuracy is measured: %s", error)
    return classifier


def one_step(denoiser: Denoiser, student: SamplerSpec) -> SamplerSpec:
    """The teacher used as if it were the one-step student: one evaluation at the student's first level."""
    return SamplerSpec(
        kind="few_step",
        sigmas=student.sigmas[:1] or (denoiser.sampler.sigma_max,),
        noise_scale=student.noise_scale,
        num_steps=1,
        max_steps=1,
    )
