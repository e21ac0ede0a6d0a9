"""A small convolutional classifier; its penultimate layer gives the features that pictures are judged by."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill_core.config import Config, Words
from distill_core.errors import ArtifactError, ConfigError
from distill_core.files.json_tables import read_table
from distill_core.kinds.predictor.card import Card
from distill_core.networks.fake_tensors import is_faked
from distill_core.signature import Function, TensorSpec

CONFIG, WEIGHTS = "config.json", "model.safetensors"
GROUPS = 8


class ClassifierConfig(Config):
    """Shape of the network; kept beside its weights as config.json."""

    kind: Words = Field("classifier", pattern="^classifier$")
    shape: tuple[int, int, int]  # (C, H, W) of the pictures
    num_classes: int = Field(ge=2, le=1_000_000)
    class_names: tuple[Words, ...] = ()
    width: int = Field(32, ge=GROUPS, le=1024, multiple_of=GROUPS)  # channels of stage 1, doubled per stage
    num_features: int = Field(32, ge=2, le=4096)

    @model_validator(mode="after")
    def _shape_fits(self) -> ClassifierConfig:
        channels, height, width = self.shape
        if not (1 <= channels <= 16 and 4 <= height <= 512 and 4 <= width <= 512):
            raise ValueError(f"shape {self.shape} is not allowed: 1 to 16 channels and sides of 4 to 512")
        return self


class Block(nn.Module):
    """Two convolutions around a shortcut; the first may halve the picture."""

    def __init__(self, width_in: int, width_out: int, *, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
        self.first_norm = nn.GroupNorm(GROUPS, width_out)
        self.second = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.second_norm = nn.GroupNorm(GROUPS, width_out)
        self.shortcut = nn.Conv2d(width_in, width_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.first_norm(self.first(x)))
        return F.silu(self.second_norm(self.second(h)) + self.shortcut(x))


class Classifier(nn.Module):
    """Pictures (B, C, H, W) in [-1, 1] -> logits (B, K), each independent of the rest of its batch."""

    kind: ClassVar[str] = "predictor"
    Args = ClassifierConfig

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        stem_stride = 2 if min(config.shape[1:]) >= 32 else 1  # most of the cost would be at full resolution
        widths = [config.width]
        while min(config.shape[1:]) // stem_stride >> len(widths) >= 4 and len(widths) < 4:
            widths.append(2 * widths[-1])
        self.stem = nn.Conv2d(config.shape[0], config.width, 3, stem_stride, padding=1)
        pairs = zip([config.width, *widths], widths)
        self.blocks = nn.Sequential(
            *(Block(a, b, stride=1 if i == 0 else 2) for i, (a, b) in enumerate(pairs))
        )
        self.penultimate = nn.Linear(4 * widths[-1], config.num_features)
        self.last = nn.Linear(config.num_features, config.num_classes)

    @property
    def args(self) -> ClassifierConfig:
        """Arguments that the network was made of."""
        return self.config

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.config.shape

    def features(self, x: Tensor) -> Tensor:
        """(B, D) activations of the penultimate layer."""
        pooled = F.adaptive_avg_pool2d(
            self.blocks(self.stem(x)), 2
        )  # 2x2: a 6 and a 9 differ in where, not in what
        return F.silu(self.penultimate(pooled.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.features(x))
        return logits

    def reordered(self, order: Sequence[int]) -> Classifier:
        """A copy whose answer k is this one's answer `order[k]`; `order` holds each class once."""
        other, names = copy.deepcopy(self), self.config.class_names
        other.config = self.config.model_copy(update={"class_names": tuple(names[k] for k in order if names)})
        with torch.no_grad():
            other.last.weight.copy_(self.last.weight[list(order)])
            other.last.bias.copy_(self.last.bias[list(order)])
        return other

    def call(self, function: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of a function by name; there is one, `predict`: image -> logits."""
        return {"logits": self(inputs["image"])}

    def card(self) -> Card:
        """Facts that the manifest keeps."""
        image = TensorSpec(dtype="float32", shape=self.shape, low=-1, high=1)
        logits = TensorSpec(dtype="float32", shape=(self.args.num_classes,))
        return Card(
            functions={"predict": Function(inputs={"image": image}, outputs={"logits": logits})},
            class_names=self.args.class_names or tuple(map(str, range(self.args.num_classes))),
            parameters=sum(value.numel() for value in self.parameters()),
        )

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(self.config.model_dump_json(indent=1), encoding="utf-8")
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()},
            folder / WEIGHTS,
        )


def load_classifier(folder: Path, *, device: str = "cpu") -> Classifier:
    """The classifier saved in `folder`, ready to answer.

    Raises:
        ArtifactError: a file is missing or damaged, or the weights belong to another network.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ArtifactError(
                f"{folder} is not a classifier: it has no {name}; train one with the recipe judge_digits"
            )
    try:
        config = ClassifierConfig.parse(read_table(folder / CONFIG))
        classifier = Classifier(config)
        if not is_faked():
            classifier.load_state_dict(load_file(folder / WEIGHTS, device=device))
    except (ValueError, ConfigError, TypeError) as error:
        raise ArtifactError(f"{folder / CONFIG} is damaged: {error}") from None
    except SafetensorError as error:
        raise ArtifactError(f"{folder / WEIGHTS} is damaged or not safetensors: {error}") from None
    except RuntimeError:
        raise ArtifactError(
            f"{folder / WEIGHTS} holds the weights of another network than {CONFIG} describes"
        ) from None
    return classifier.to(device).eval().requires_grad_(False)


@torch.no_grad()
def predict(classifier: Classifier, x: Tensor, *, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """Features (N, D) and logits (N, K) of pictures, in batches, on the CPU."""
    device = next(classifier.parameters()).device
    features = [classifier.features(part.to(device)) for part in x.split(batch_size)]
    return torch.cat(features).cpu(), torch.cat([classifier.last(part) for part in features]).cpu()
