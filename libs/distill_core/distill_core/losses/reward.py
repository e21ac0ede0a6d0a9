"""Rewards: how much a picture is wanted. One score per picture, differentiable in the picture.

hinge = E[ max(0, threshold - r(picture, cond)) ]       no gradient from pictures that are good enough (Hyper-SD)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from distill_core.config import Config, Words
from distill_core.errors import ConfigError

Conditions = dict[str, Tensor]


class RewardConfig(Config):
    """Choice of the reward. All but `ink` read images with the recipe's `[extractor]`."""

    name: Literal["ink", "class_probability", "text_similarity"] = "ink"
    texts: tuple[Words, ...] = Field(())  # text_similarity: one for all pictures, or one per class


class RewardModel(Protocol):
    """Anything that scores pictures; a user's own reward is a class with this one method."""

    def score(self, picture: Tensor, cond: Conditions) -> Tensor:
        """(B,) scores of pictures (B, C, H, W) in [-1, 1]; more is better."""
        ...


class TextImageModel(Protocol):
    """A CLIP model: texts and pictures in one space."""

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """(K, D) of unit length."""
        ...

    def image_features(self, pictures: Tensor) -> Tensor:
        """(B, D) of unit length, of pictures (B, C, H, W) in [-1, 1]."""
        ...


class Ink:
    """The mean pixel, 0 (all black) to 1 (all white)."""

    def score(self, picture: Tensor, cond: Conditions) -> Tensor:
        return (picture.float().flatten(1).mean(1) + 1) / 2


class ClassProbability:
    """The probability that a classifier gives the class asked for."""

    def __init__(self, classifier: Callable[[Tensor], Tensor]) -> None:
        self.classifier = classifier

    def score(self, picture: Tensor, cond: Conditions) -> Tensor:
        probabilities = self.classifier(picture).float().softmax(1)
        return probabilities.gather(1, cond["class_label"][:, None]).squeeze(1)


class TextSimilarity:
    """Cosine between a picture and a text in a CLIP model: of its class, or of all pictures."""

    def __init__(self, clip: TextImageModel, texts: tuple[str, ...]) -> None:
        self.clip, self.text_features = clip, clip.text_features(texts)

    def score(self, picture: Tensor, cond: Conditions) -> Tensor:
        features = self.text_features.to(picture.device)
        if len(features) > 1:
            features = features[cond["class_label"]]
        return (self.clip.image_features(picture) * features).sum(1)


def build_reward(config: RewardConfig, extractor: Any, *, num_classes: int | None) -> RewardModel:
    """The reward that `config` names; `extractor` is a classifier or a CLIP model, or None.

    Raises:
        ConfigError: the extractor is missing or of the other kind, or there are not as many texts as classes.
    """
    if config.name == "ink":
        return Ink()
    is_clip = hasattr(extractor, "text_features")
    if extractor is None or is_clip != (config.name == "text_similarity"):
        extractors = (
            "a CLIP folder"
            if config.name == "text_similarity"
            else "a classifier, e.g. recipe = 'judge_digits'"
        )
        raise ConfigError(
            f"reward {config.name!r} reads pictures with {extractors}: set [extractor]", field="extractor"
        )
    if config.name == "class_probability":
        if num_classes is None:
            raise ConfigError("reward 'class_probability' needs data with labels", field="data.name")
        return ClassProbability(extractor)
    if len(config.texts) not in {1, num_classes}:
        raise ConfigError(
            f"reward.texts holds {len(config.texts)} texts; give one, or one per class ({num_classes or 'no classes'})",
            field="config.reward.texts",
        )
    return TextSimilarity(extractor, config.texts)


def hinge_loss(score: Tensor, threshold: float) -> Tensor:
    """max(0, threshold - score), mean over pictures (scalar)."""
    return F.relu(threshold - score).mean()


@torch.no_grad()
def mean_reward(
    reward: RewardModel, pictures: Tensor, cond: Conditions, *, device: torch.device, batch_size: int = 256
) -> float:
    """The mean score of many pictures (N, C, H, W), scored on `device` in parts."""
    total = 0.0
    for start in range(0, len(pictures), batch_size):
        part = slice(start, start + batch_size)
        held = {name: value[part].to(device) for name, value in cond.items()}
        total += float(reward.score(pictures[part].to(device), held).double().sum())
    return total / len(pictures)
