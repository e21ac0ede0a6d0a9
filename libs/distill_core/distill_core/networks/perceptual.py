"""Feature maps of pictures, for perceptual distances."""

from __future__ import annotations

from torch import Tensor, nn

from distill_core.errors import ConfigError
from distill_core.losses.perceptual import structure_texture_distance, unit_feature_distance
from distill_core.networks.classifier import Classifier


class FeatureDistance(nn.Module):
    """Perceptual distance of two batches of pictures by a classifier, whose weights stay as they are.

    Raises:
        ConfigError: no classifier, or one of pictures of another shape.
    """

    def __init__(self, extractor: nn.Module | None, shape: tuple[int, int, int]) -> None:
        super().__init__()
        if not isinstance(extractor, Classifier):
            raise ConfigError(
                "a distance of features reads pictures with a classifier, e.g. extractor.recipe = 'judge_digits': "
                "set [extractor], or a distance that needs none",
                field="extractor",
            )
        if extractor.shape != tuple(shape):
            raise ConfigError(
                f"the extractor reads pictures of the shape {extractor.shape}, and these are {tuple(shape)}; "
                "train a classifier on such pictures",
                field="extractor",
            )
        self.classifier = extractor.requires_grad_(False)

    def maps(self, pictures: Tensor) -> list[Tensor]:
        """The pictures themselves, then what each stage of the classifier makes of them."""
        maps = [pictures]
        hidden = self.classifier.stem(pictures)
        for block in self.classifier.blocks:
            hidden = block(hidden)
            maps.append(hidden)
        return maps

    def forward(self, pictures: Tensor, targets: Tensor) -> Tensor:
        """Distance (scalar) of pictures (B, C, H, W) in [-1, 1]; differentiable."""
        return structure_texture_distance(self.maps(pictures), self.maps(targets))

    def items(self, pictures: Tensor, targets: Tensor) -> Tensor:
        """Distance (B,) of each picture from its target as LPIPS has it, in the classifier's maps; differentiable."""
        maps = [
            self.maps(side)[1:] for side in (pictures, targets)
        ]  # pixels of one channel have no direction
        return unit_feature_distance(*maps)
