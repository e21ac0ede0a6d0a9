"""Networks of timm, as `timm:NAME`, where it can be imported: it needs a torchvision of the build that torch is of."""

from __future__ import annotations

from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor, nn

from distill_core.errors import ConfigError, Unavailable, missing_package, nearest
from distill_core.networks.preprocessing import Preprocessed
from distill_core.networks.vision import ClassifierArgs, Rate, reason_of


class TimmArgs(ClassifierArgs):
    """What decides the shape of a network of timm beside its name."""

    drop_rate: Rate = 0.0  # dropout before the last layer
    drop_path_rate: Rate | None = None  # unset: the model's own
    sized: bool = False  # True: made for pictures of this size, as its transformers have to be


class TimmNetwork(nn.Module):
    """A network of timm, by its name there: pictures (B, C, H, W) in [-1, 1] -> logits (B, K)."""

    Args = TimmArgs
    timm_name: ClassVar[str]

    @classmethod
    def named(cls, name: str, field: str) -> type[TimmNetwork]:
        """The class of timm's model of that name.

        Raises:
            ConfigError: timm has none. Unavailable: timm cannot be imported.
        """
        timm = _timm()
        if not timm.is_model(name):
            raise ConfigError(f"timm has no model {name!r}{nearest(name, timm.list_models())}", field=field)
        return type(f"timm:{name}", (cls,), {"timm_name": name})

    def __init__(self, args: TimmArgs) -> None:
        super().__init__()
        self.args = args
        self.preprocess = Preprocessed(args.preprocessing)
        options: dict[str, object] = {"drop_rate": args.drop_rate, "num_classes": args.num_classes}
        if args.drop_path_rate is not None:
            options["drop_path_rate"] = args.drop_path_rate
        if args.sized:
            options["img_size"] = args.size
        try:
            self.model = _timm().create_model(
                self.timm_name, pretrained=False, in_chans=args.shape[0], **options
            )
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"network.args are refused by timm:{self.timm_name}: {reason_of(error)}", field="network.args"
            ) from None

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.model(self.preprocess(image))
        return out


def _timm() -> ModuleType:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise missing_package(str(error.name), "timm") from None
    except Exception as error:  # a torchvision of another build fails while it registers its operators
        raise Unavailable(
            f"timm is installed and cannot be imported: {reason_of(error)}; it needs the torchvision that belongs to "
            f"torch {torch.__version__}, from the index that torch came from"
        ) from None
    return timm  # type: ignore[no-any-return]


FAMILIES = {"timm": TimmNetwork}
