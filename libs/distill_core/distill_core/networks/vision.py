"""Vision models of transformers as networks: built from typed arguments, pictures in [-1, 1] in, one tensor out.

transformers is imported where a network is built, so that to know the classes costs nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from distill_core.config import Config
from distill_core.errors import ConfigError
from distill_core.networks.preprocessing import Preprocessed, Preprocessing
from distill_core.signature import TensorSpec

Activation = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu6", "silu"]
Width = Annotated[int, Field(ge=1, le=8192)]
Count = Annotated[int, Field(ge=1, le=256)]
Size = Annotated[int, Field(ge=1, le=64)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, le=64)]
STAGES = Field(min_length=1, max_length=8)
Widths = Annotated[tuple[Width, ...], STAGES]
Counts = Annotated[tuple[Count, ...], STAGES]
Sizes = Annotated[tuple[Size, ...], STAGES]
Ratios = Annotated[tuple[Positive, ...], STAGES]
BACKBONE = frozenset(
    {"out_features", "out_indices", "stage_names"}
)  # keys of a class that detectors build on too


class VisionArgs(Config):
    """What all of these networks are made of."""

    shape: tuple[int, int, int]  # (C, H, W) of the pictures
    preprocessing: Preprocessing = Preprocessing()

    @model_validator(mode="after")
    def _shape_fits(self) -> Self:
        channels, height, width = self.shape
        if not (1 <= channels <= 16 and 4 <= height <= 1024 and 4 <= width <= 1024):
            raise ValueError(f"shape {self.shape} is not allowed: 1 to 16 channels and sides of 4 to 1024")
        if not self.preprocessing.fits(channels):
            raise ValueError(f"preprocessing has mean or std of other than {channels} channels")
        crop = self.preprocessing.crop
        if self.preprocessing.resize is None and crop and (crop[0] > height or crop[1] > width):
            raise ValueError(f"crop = {crop} is larger than pictures of {width} x {height} pixels")
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        stages = {name: len(v) for name in self.staged() if isinstance(v := getattr(self, name), tuple)}
        other = next((name for name, count in stages.items() if count != stages["depths"]), None)
        if other:
            raise ValueError(
                f"{other} has {stages[other]} entries and depths {stages['depths']}; give one a stage"
            )
        return self

    @classmethod
    def staged(cls) -> tuple[str, ...]:
        """The arguments that have an entry for each stage."""
        apart = {"shape", "preprocessing"}
        return tuple(
            name
            for name, field in cls.model_fields.items()
            if "depths" in cls.model_fields and name not in apart and isinstance(field.default, tuple)
        )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) that the network sees."""
        return self.preprocessing.size(*self.shape[1:])

    def divides(self, what: str, side: int) -> None:
        """Refuse pictures that parts of `side` pixels do not fill.

        Raises:
            ValueError: such pictures.
        """
        if any(pixels % side for pixels in self.size):
            height, width = self.size
            raise ValueError(f"pictures of {width} x {height} pixels do not divide into {what} of {side}")


def check_heads(widths: Iterable[int], heads: Iterable[int]) -> None:
    """Refuse widths that do not divide into their attention heads.

    Raises:
        ValueError: one does not.
    """
    for width, count in zip(widths, heads):
        if width % count:
            raise ValueError(f"a width of {width} does not divide into {count} attention heads")


class ClassifierArgs(VisionArgs):
    """What a network is made of that tells classes apart."""

    num_classes: int = Field(ge=2, le=1_000_000)


class VisionNetwork(nn.Module):
    """Base of the networks: a model of transformers behind its preprocessing.

    The class is called as it is there; a folder's config.json names it so.
    """

    Args: ClassVar[type[VisionArgs]]
    model_type: ClassVar[str]  # of the folders that transformers writes
    idle: ClassVar[frozenset[str]] = frozenset()  # keys of their config.json that no answer depends on
    sized: ClassVar[bool] = False  # whether its weights are of one size of pictures

    def __init__(self, args: VisionArgs) -> None:
        super().__init__()
        self.args = args
        self.preprocess = Preprocessed(args.preprocessing)
        cls = type(self).library_class()
        try:
            self.model: Any = cls(cls.config_class(**self.config(args)))
        except Exception as error:  # the configs of transformers raise their own kinds
            raise ConfigError(
                f"network.args are refused by {type(self).__name__}: {reason_of(error)}", field="network.args"
            ) from None

    @classmethod
    def library_class(cls) -> Any:
        """The class of transformers."""
        return getattr(importlib.import_module("transformers"), cls.__name__)

    @classmethod
    def config(cls, args: VisionArgs) -> dict[str, Any]:
        """What transformers' config of the class takes for `args`."""
        own = args.model_dump(mode="json", exclude={"shape", "num_classes", "preprocessing"})
        height, width = args.size
        own |= {"num_channels": args.shape[0], "image_size": height if height == width else (height, width)}
        if isinstance(args, ClassifierArgs):
            own["num_labels"] = args.num_classes
        return own

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.model(pixel_values=self.preprocess(image)).logits
        return out

    def outputs(self) -> dict[str, TensorSpec]:
        """What `forward` gives, by name."""
        assert isinstance(self.args, ClassifierArgs)
        return {"logits": TensorSpec(dtype="float32", shape=(self.args.num_classes,))}


def reason_of(error: Exception) -> str:
    """What an error of another library says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:200]
