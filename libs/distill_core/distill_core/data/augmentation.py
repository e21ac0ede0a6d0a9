"""Views of items: random crops and mirror images that can be replayed, drawn from (seed, position) alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from distill_core.config import Config
from distill_core.errors import ConfigError, nearest

_STREAM = 0x76696577  # sets a view's random numbers apart from those of the order
MAX_SHIFT = 64
_STORED = {  # types and shape of one item's view, by name
    "crop": (("torch.float32", "torch.float16"), (4,)),
    "shift": (("torch.int64", "torch.int8"), (2,)),
    "flip": (("torch.bool",), ()),
}


class ViewConfig(Config):
    """Augmentation of the pictures, the same for all methods; all off by default."""

    shift: int = Field(
        0, ge=0, le=MAX_SHIFT
    )  # pixels, random translation to each side; the border is repeated
    crop_scale: float = Field(1.0, gt=0, le=1)  # least share of the area that a random crop keeps
    flip: bool = False  # random mirror image: right for photographs, wrong for digits

    @property
    def is_off(self) -> bool:
        """Whether every item is seen as it is."""
        return self == ViewConfig()


def draw_views(config: ViewConfig, seed: int, start: int, stop: int) -> dict[str, Tensor]:
    """Views of the items at these positions of the stream.

    `crop` (B, 4) are top, left, height and width as shares of the picture, `shift` (B, 2) pixels, `flip` (B,) bool.
    """
    rows = [np.random.Generator(np.random.Philox([seed, _STREAM, at])).random(6) for at in range(start, stop)]
    draws = torch.from_numpy(np.stack(rows))
    view: dict[str, Tensor] = {}
    if config.crop_scale < 1:
        side = (config.crop_scale + (1 - config.crop_scale) * draws[:, 0]).sqrt()
        corner = draws[:, 1:3] * (1 - side[:, None])
        view["crop"] = torch.cat([corner, side[:, None], side[:, None]], 1).float()
    if config.shift:
        view["shift"] = (draws[:, 3:5] * (2 * config.shift + 1)).floor().long() - config.shift
    if config.flip:
        view["flip"] = draws[:, 5] < 0.5
    return view


def check_view(view: Mapping[str, Tensor]) -> None:
    """Refuse a stored view that pictures cannot be seen by.

    Raises:
        ConfigError: an unknown name, another type or shape, a crop outside the picture, or too long a shift.
    """
    for name, value in view.items():
        if name not in _STORED:
            raise ConfigError(f"its view has no part {name!r}{nearest(name, _STORED)}")
        types, shape = _STORED[name]
        if tuple(value.shape[1:]) != shape or str(value.dtype) not in types:
            given = f"{value.dtype} {tuple(value.shape[1:])}"
            raise ConfigError(f"its view's {name} is {given} for each row, and should be {types[0]} {shape}")
    if "crop" in view:
        crop = view["crop"].float()
        inside = (
            (crop >= 0).all(1) & (crop[:, 2:] > 0).all(1) & (crop[:, :2] + crop[:, 2:] <= 1 + 1e-3).all(1)
        )
        if not inside.all():
            raise ConfigError(f"the crop of its row {int(inside.int().argmin())} leaves the picture")
    if "shift" in view and int(view["shift"].abs().max()) > MAX_SHIFT:
        raise ConfigError(f"its view is shifted by more than {MAX_SHIFT} pixels")


def augment(x0: Tensor, view: Mapping[str, Tensor]) -> Tensor:
    """Pictures (B, C, H, W) as `view` says: cropped and scaled back, then moved, then mirrored."""
    if "crop" in view:
        x0 = _cropped(x0, view["crop"].to(x0))
    if "shift" in view:
        x0 = _moved(x0, view["shift"].to(x0.device))
    if "flip" in view:
        x0 = torch.where(view["flip"].to(x0.device)[:, None, None, None], x0.flip(3), x0)
    return x0


def _cropped(x0: Tensor, crop: Tensor) -> Tensor:
    top, left, height, width = crop.unbind(1)
    theta = x0.new_zeros(len(x0), 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = width, 2 * left + width - 1
    theta[:, 1, 1], theta[:, 1, 2] = height, 2 * top + height - 1
    grid = F.affine_grid(theta, list(x0.shape), align_corners=False)
    cropped = F.grid_sample(x0, grid, mode="bilinear", padding_mode="border", align_corners=False)
    whole = (height == 1) & (width == 1)  # where rounding of the grid would change the last bits
    return torch.where(whole[:, None, None, None], x0, cropped)


def _moved(x0: Tensor, shift: Tensor) -> Tensor:
    """Each picture moved by its own (rows, columns), the border repeated."""
    b, _, h, w = x0.shape
    rows = (torch.arange(h, device=x0.device) - shift[:, :1]).clamp(0, h - 1)
    columns = (torch.arange(w, device=x0.device) - shift[:, 1:]).clamp(0, w - 1)
    item = torch.arange(b, device=x0.device)[:, None, None]
    return x0[item, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
