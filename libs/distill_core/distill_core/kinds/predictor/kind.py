"""Predictors: classifiers, encoders, whatever maps tensors to tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill_core.artifacts import Manifest
from distill_core.data import Source, build_source
from distill_core.data.classes import use_class_names
from distill_core.errors import ConfigError
from distill_core.kinds.base import PRECISIONS, Graph, Kind, Models
from distill_core.kinds.loading import config_kind, load_model
from distill_core.kinds.predictor.evaluation import (
    ClassifierEvaluator,
    answers_of,
    asked_of,
    check_fits,
    fits,
    parts_of,
)
from distill_core.kinds.predictor.pictures import as_tensor, confusion
from distill_core.networks.classifier import Classifier, load_classifier
from distill_core.networks.clip_io import load_clip
from distill_core.networks.predictor import Predictor, load_predictor
from distill_core.networks.vision_io import is_transformers_folder, load_vision
from distill_core.recipe.tables import EvaluateConfig
from distill_core.signature import Function, TensorSpec

LOADERS: dict[str, Callable[..., Any]] = {  # by what config.json says that the folder holds
    "predictor": load_predictor,
    "classifier": load_classifier,
    "clip": load_clip,
}
PROBED = 2  # items of a probe
SHOWN = 256  # items of a preview
EXAMPLES = 16  # items that a graph is traced, calibrated and compared with


class PredictorKind(Kind):
    """Models that are called by the names of their functions."""

    name = "predictor"
    needs_held_out = True

    def recognise(self, folder: Path) -> bool:
        return config_kind(folder) in LOADERS or is_transformers_folder(folder)

    def load(self, folder: Path, *, device: str = "cpu", models: Models | None = None) -> Any:
        load = LOADERS.get(config_kind(folder), load_vision)
        return load(folder, device=device)

    def evaluator(
        self, model: Any, source: Source, config: EvaluateConfig, models: Models
    ) -> ClassifierEvaluator | None:
        card = model.card()
        field = "data" if config.data is None else "evaluate.data"
        source = source if config.data is None else build_source(config.data, folders=models)
        if asked_of(card, source) is None:
            return None
        check_fits(card, source, "the model", field=field)
        use_class_names(source, card.class_names, owner="the model", field=field)
        beside = {
            key.removeprefix("beside."): load_model(models.folder(one), models=models)
            for key, one in config.sources.items()
        }
        return ClassifierEvaluator(source, config, card, parts_of(config, card, source), beside)

    def preview(self, model: Any, source: Source, seed: int, references: Mapping[str, Any]) -> Tensor | None:
        """Which classes of the data are taken for which; None for what is no classifier of this data."""
        card = model.card()
        if not fits(card, source) or source.class_names != card.class_names:
            return None
        answers = answers_of(model, source, source.picked(SHOWN), batch_size=SHOWN, timed=False)
        return as_tensor(confusion(answers.logits, answers.labels, card.class_names, "training "))

    def probe(self, model: Any) -> Mapping[str, Mapping[str, np.ndarray]]:
        found = {}
        for name, function in model.card().functions.items():
            if any(spec.dtype == "text" for spec in function.inputs.values()):
                continue  # of which there is no example
            inputs = example_inputs(function, PROBED)
            outputs = _called(model, name, inputs)
            found[name] = {f"inputs.{key}": value.numpy() for key, value in inputs.items()}
            found[name] |= {f"outputs.{key}": value for key, value in outputs.items()}
        return found

    def graphs(self, model: Any, manifest: Manifest) -> list[Graph]:
        functions = manifest.signature.functions or model.card().functions
        classes = "logits" if model.card().class_names else ""
        return [_graph(model, name, function, classes) for name, function in functions.items()]


class _FunctionModule(nn.Module):
    """One function as a module of positional inputs and outputs, in the order of its description."""

    def __init__(self, model: Predictor | Classifier, name: str, function: Function) -> None:
        super().__init__()
        self.model, self.name = model, name
        self.inputs, self.outputs = tuple(function.inputs), tuple(function.outputs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = self.model.call(self.name, dict(zip(self.inputs, inputs)))
        return tuple(found[name] for name in self.outputs)


def _graph(model: Predictor | Classifier, name: str, function: Function, classes: str) -> Graph:
    held = [*model.parameters(), *model.buffers()]
    specs = [*function.inputs.values(), *function.outputs.values()]
    double = any(value.dtype == torch.float64 for value in held) or any(
        spec.dtype == "float64" for spec in specs
    )
    sizes = {key: _free_axes(spec) for key, spec in function.inputs.items()}
    return Graph(
        name,
        _FunctionModule(model, name, function).eval(),
        example_inputs(function, EXAMPLES),
        tuple(function.outputs),
        precisions=("fp32",) if double else PRECISIONS,
        frees={key: axes for key, axes in sizes.items() if axes},
        others=lambda seed: example_inputs(function, EXAMPLES, seed=seed),
        classes=classes if classes in function.outputs else "",
    )


def _free_axes(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(axis for axis, size in enumerate(spec.shape, start=1) if size == -1)


def example_inputs(function: Function, count: int, *, seed: int = 1) -> dict[str, Tensor]:
    """Inputs that the specifications allow: the same for the same seed; free axes are of two to five units.

    Raises:
        ConfigError: an input that is text, of which there is no example.
    """
    generator = torch.Generator().manual_seed(seed)
    units = 2 + seed % 4
    return {
        name: _example(name, spec, (count, *_sizes(spec, units)), generator)
        for name, spec in function.inputs.items()
    }


def _sizes(spec: TensorSpec, units: int) -> tuple[int, ...]:
    """The shape with `units` times `multiple_of` along free axes, or what is allowed at most."""
    bounds = spec.max_shape or spec.shape
    step = spec.multiple_of
    return tuple(
        size if size != -1 else step * max(1, min(units, bound // step))
        for size, bound in zip(spec.shape, bounds)
    )


def _example(name: str, spec: TensorSpec, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if spec.dtype == "text":
        raise ConfigError(f"input {name} is text, of which no example is made", field=name)
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


KIND = PredictorKind()
