"""LPIPS: distance of two pictures in the features of a network (Zhang et al. 2018, arXiv 1801.03924, version 0.1).

    d(x, y) = sum_l mean_hw sum_c w_lc (f_lc(x) - f_lc(y))^2,     f_l: features of layer l, of unit length at each place

The weights are not part of this library. A folder holds, as safetensors, the backbone by torchvision's names and the
linear heads by the lpips package's: alexnet.safetensors and lpips_alex.safetensors, or vgg16 and lpips_vgg.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from distill_core.errors import DataError, NotFound

VERSION = "0.1"
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pictures in [-1, 1]
MIN_SIDE = 32  # pixels: below it, the last features vanish
EPS = 1e-10

# Each layer: pooling before it (kernel, stride); convolutions (index in torchvision's `features`, stride, padding).
Layers = tuple[tuple[tuple[int, int] | None, tuple[tuple[int, int, int], ...]], ...]
ALEX: Layers = (
    (None, ((0, 4, 2),)),
    ((3, 2), ((3, 1, 2),)),
    ((3, 2), ((6, 1, 1),)),
    (None, ((8, 1, 1),)),
    (None, ((10, 1, 1),)),
)
VGG: Layers = (
    (None, ((0, 1, 1), (2, 1, 1))),
    ((2, 2), ((5, 1, 1), (7, 1, 1))),
    ((2, 2), ((10, 1, 1), (12, 1, 1), (14, 1, 1))),
    ((2, 2), ((17, 1, 1), (19, 1, 1), (21, 1, 1))),
    ((2, 2), ((24, 1, 1), (26, 1, 1), (28, 1, 1))),
)
NETS: dict[str, tuple[str, Layers]] = {"alex": ("alexnet", ALEX), "vgg": ("vgg16", VGG)}


class LPIPS:
    """`net` is alex or vgg, the one whose files `folder` holds; alex if both.

    Raises:
        NotFound: neither. DataError: a file is damaged or lacks a tensor.
    """

    def __init__(self, folder: Path) -> None:
        nets = [net for net in NETS if all((folder / file).is_file() for file in _files(net))]
        if not nets:
            files = " or ".join(" with ".join(_files(net)) for net in NETS)
            raise NotFound(f"{folder} holds no LPIPS weights; it must hold {files}", field="evaluate.lpips")
        self.net = nets[0]
        self.layers = NETS[self.net][1]
        self.backbone, self.heads = (_read(folder / file) for file in _files(self.net))
        convolutions = [index for _, layer in self.layers for index, _, _ in layer]
        weight_names = [f"features.{index}.{part}" for index in convolutions for part in ("weight", "bias")]
        for tensors, names, file in (
            (self.backbone, weight_names, _files(self.net)[0]),
            (self.heads, [_head(index) for index in range(len(self.layers))], _files(self.net)[1]),
        ):
            missing = [name for name in names if name not in tensors]
            if missing:
                raise DataError(f"{folder / file} lacks {missing[0]}", field="evaluate.lpips")

    @property
    def name(self) -> str:
        """Name of the figure: lpips_alex or lpips_vgg."""
        return f"lpips_{self.net}"

    @torch.no_grad()
    def __call__(self, prediction: Tensor, target: Tensor) -> float:
        """Distance of two pictures (H, W, 3) in [0, 1]; 0 if equal.

        Raises:
            DataError: shapes that differ, or pictures too small.
        """
        if prediction.shape != target.shape or min(target.shape[:2]) < MIN_SIDE or target.shape[2:] != (3,):
            raise DataError(
                f"LPIPS compares two pictures (H, W, 3) of at least {MIN_SIDE} pixels per side, not "
                f"{tuple(prediction.shape)} and {tuple(target.shape)}"
            )
        both = torch.stack([prediction, target]).clamp(0, 1).permute(0, 3, 1, 2).float() * 2 - 1
        shift, scale = (torch.tensor(values)[:, None, None].to(both) for values in (SHIFT, SCALE))
        total = 0.0
        for index, features in enumerate(self._features((both - shift) / scale)):
            unit = features / (features.square().sum(1, keepdim=True).sqrt() + EPS)
            head = self.heads[_head(index)].to(unit)
            total += float(F.conv2d((unit[:1] - unit[1:]).square(), head).mean())
        return total

    def _features(self, x: Tensor) -> list[Tensor]:
        out = []
        for pooling, convolutions in self.layers:
            x = x if pooling is None else F.max_pool2d(x, *pooling)
            for index, stride, padding in convolutions:
                weight, bias = (
                    self.backbone[f"features.{index}.{part}"].to(x) for part in ("weight", "bias")
                )
                x = F.conv2d(x, weight, bias, stride=stride, padding=padding).relu()
            out.append(x)
        return out


def _files(net: str) -> tuple[str, str]:
    return f"{NETS[net][0]}.safetensors", f"lpips_{net}.safetensors"


def _head(index: int) -> str:
    return f"lin{index}.model.1.weight"


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is damaged: {error}", field="evaluate.lpips") from None
