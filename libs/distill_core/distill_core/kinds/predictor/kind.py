"""Predictors: classifiers, encoders, whatever maps tensors to tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill_core.artifacts import Manifest
from distill_core.config import EvaluateConfig
from distill_core.data import Source, build_source
from distill_core.errors import ConfigError
from distill_core.kinds.base import Graph, Kind, Measured, Models
from distill_core.kinds.loading import config_kind
from distill_core.kinds.predictor.card import Card, Evaluate
from distill_core.metrics.classification import accuracy, calibration_error, negative_log_likelihood
from distill_core.networks.classifier import load_classifier
from distill_core.networks.clip_io import load_clip
from distill_core.networks.predictor import load_predictor
from distill_core.signature import Function, TensorSpec

LOADERS: dict[str, Callable[..., Any]] = {  # by what config.json says that the folder holds
    "predictor": load_predictor,
    "classifier": load_classifier,
    "clip": load_clip,
}
PROBED = 2  # items of a probe
PROBE_BYTES = 2**20


class PredictorKind(Kind):
    """Models that are called by the names of their functions."""

    name = "predictor"

    def recognise(self, folder: Path) -> bool:
        return config_kind(folder) in LOADERS

    def load(self, folder: Path, *, device: str = "cpu", models: Models | None = None) -> Any:
        return LOADERS[config_kind(folder)](folder, device=device)

    def evaluator(
        self, model: Any, source: Source, config: EvaluateConfig, models: Models
    ) -> ClassifierEvaluator | None:
        assert isinstance(config, Evaluate)
        card = model.card()
        if config.held_out is not None:
            source = build_source(config.held_out)
        takes_images = "image" in _inputs(card) and source.shape is not None
        if not card.class_names or not takes_images or source.labels is None:
            return None
        return ClassifierEvaluator(source, config, card)

    def probe(self, model: Any) -> Mapping[str, Mapping[str, np.ndarray]]:
        found = {}
        for name, function in model.card().functions.items():
            inputs = example_inputs(function, PROBED)
            outputs = _called(model, name, inputs)
            arrays = {f"inputs.{key}": value.numpy() for key, value in inputs.items()}
            arrays |= {f"outputs.{key}": value for key, value in outputs.items()}
            if sum(array.nbytes for array in arrays.values()) <= PROBE_BYTES:
                found[name] = arrays
        return found

    def graphs(self, model: Any, manifest: Manifest) -> list[Graph]:
        functions = model.card().functions
        return [
            Graph(
                name,
                _FunctionModule(model, name, tuple(function.inputs)).eval(),
                example_inputs(function, PROBED),
                tuple(function.outputs),
            )
            for name, function in functions.items()
        ]


class _FunctionModule(nn.Module):
    """One function as a module of positional inputs."""

    def __init__(self, model: Any, function: str, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.function, self.inputs = model, function, inputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.call(self.function, dict(zip(self.inputs, inputs))).values())


class ClassifierEvaluator:
    """Accuracy, likelihood and calibration of classifiers on labelled data."""

    def __init__(self, source: Source, config: EvaluateConfig, card: Card) -> None:
        self.source, self.config, self.card = source, config, card

    def measure(
        self,
        model: Any,
        references: Mapping[str, Any],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Measured:
        """Figures of a classifier, and of those references that answer the same question, by their names."""
        figures = self._figures(model)
        for name, other in references.items():
            if getattr(other, "kind", "") == "predictor" and _inputs(other.card()) == _inputs(self.card):
                figures |= {f"{name}_{key}": value for key, value in self._figures(other).items()}
        count = len(self.source.picked(self.config.num_samples))
        return Measured(figures, {"accuracy": f"{count} labelled items"})

    def _figures(self, model: Any) -> dict[str, float]:
        training = model.training
        model.eval()
        parts = list(self._answers(model))
        model.train(training)
        logits, labels = (torch.cat(values) for values in zip(*parts))
        return {
            "accuracy": accuracy(logits, labels),
            "negative_log_likelihood": negative_log_likelihood(logits, labels),
            "calibration_error": calibration_error(logits, labels),
            "parameters": float(model.card().parameters),
        }

    @torch.no_grad()
    def _answers(self, model: Any) -> Iterator[tuple[Tensor, Tensor]]:
        device = next(model.parameters()).device
        for indices in self.source.picked(self.config.num_samples).split(self.config.batch_size):
            batch = self.source.items(indices)
            assert batch.x0 is not None
            logits = model.call("predict", {"image": batch.x0.to(device)})["logits"]
            yield logits.float().cpu(), batch.columns["class_label"]


def example_inputs(function: Function, count: int) -> dict[str, Tensor]:
    """Inputs that the specifications allow: the same at each call, in the middle of what is allowed.

    Raises:
        ConfigError: an input that is text, of which there is no example.
    """
    generator = torch.Generator().manual_seed(1)
    return {name: _example(name, spec, count, generator) for name, spec in function.inputs.items()}


def _example(name: str, spec: TensorSpec, count: int, generator: torch.Generator) -> Tensor:
    if spec.dtype == "text":
        raise ConfigError(f"input {name} is text, of which no example is made", field=name)
    free = max(spec.multiple_of, 1)
    shape = (count, *(free if size == -1 else size for size in spec.shape))
    dtype = getattr(torch, spec.dtype)
    if dtype.is_floating_point:
        low, high = (-1.0 if spec.low is None else spec.low), (1.0 if spec.high is None else spec.high)
        return (low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)).to(dtype)
    low_int = int(spec.low or 0)
    high_int = int(spec.high) if spec.high is not None else low_int + 1
    return torch.randint(low_int, high_int + 1, shape, generator=generator).to(dtype)


@torch.no_grad()
def _called(model: Any, function: str, inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    device = next(model.parameters()).device
    outputs = model.call(function, {name: value.to(device) for name, value in inputs.items()})
    return {name: value.cpu().numpy() for name, value in outputs.items()}


def _inputs(card: Card) -> dict[str, TensorSpec]:
    function = next(iter(card.functions.values()), None)
    return {} if function is None else function.inputs


KIND = PredictorKind()
