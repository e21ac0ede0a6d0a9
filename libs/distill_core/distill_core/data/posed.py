"""Posed images in memory: views with their cameras, and the pixels of them that count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill_core import pictures
from distill_core.artifacts import SceneSpec
from distill_core.config import Config as SourceConfig
from distill_core.data.source import Source
from distill_core.errors import DataError
from distill_core.method import Batch
from distill_core.radiance.cameras.camera import Camera, Rays, pixel_rays
from distill_core.radiance.rendering.quadrature import over

MAX_PIXELS = 2**27  # of all views together, 2 GiB in memory


class Judged(NamedTuple):
    """A picture (H, W, 3), what it should be, and the pixels (H, W) that count; None: all."""

    picture: np.ndarray
    truth: np.ndarray
    known: np.ndarray | None


@dataclass(frozen=True, eq=False)
class PosedImages:
    """Views of one size, each with its camera."""

    images: Tensor  # (N, H, W, 4), in [0, 1], colour multiplied by opacity
    c2w: Tensor  # (N, 4, 4)
    intrinsics: Tensor  # (N, 4): fx, fy, cx, cy in pixels
    distortion: Tensor | None = None  # (N, 6): k1 k2 k3 k4 p1 p2 of each lens; None: pinholes
    fisheye: bool = False
    distance: Tensor | None = (
        None  # (N, H, W), scene units, of what pixels' centres show, 0 for nothing; None: unknown
    )
    known: Tensor | None = (
        None  # (N, H, W) bool, False where a mask says to ignore the pixel: never drawn, nor judged; None: all count
    )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def transparent(self) -> bool:
        """Whether any pixel that counts lets the background through."""
        clear = self.images[..., 3] < 1
        return bool((clear if self.known is None else clear & self.known).any())

    def camera(self, index: int) -> Camera:
        """The camera of view `index`."""
        height, width = self.images.shape[1:3]
        fx, fy, cx, cy = self.intrinsics[index].tolist()
        lens = () if self.distortion is None else tuple(self.distortion[index].tolist())
        return Camera(self.c2w[index], fx, fy, cx, cy, width, height, lens, self.fisheye)

    def foreground(self) -> Tensor:
        """Flat indices (P,) of the pixels, over all views, that show something and are not ignored."""
        shown = self.images[..., 3] > 0
        return (shown if self.known is None else shown & self.known).reshape(-1).nonzero().squeeze(-1)

    @cached_property
    def _drawable(self) -> Tensor | None:
        return None if self.known is None else self.known.reshape(-1).nonzero().squeeze(-1)

    def draw(self, count: int) -> Tensor:
        """Flat indices (count,) of random pixels over all views, none of them ignored."""
        if self._drawable is None:
            return torch.randint(self.images.shape[:3].numel(), (count,))
        return self._drawable[torch.randint(len(self._drawable), (count,))]

    def counts(self, pixels: Tensor) -> Tensor:
        """Mask (R,) bool of the pixels with flat indices (R,) that are not ignored."""
        if self.known is None:
            return torch.ones_like(pixels, dtype=torch.bool)
        return self.known.reshape(-1)[pixels]

    def truth(self, background: Sequence[float] | Tensor) -> Tensor:
        """The views (N, H, W, 3) laid over `background`."""
        return over(self.images[..., :3], self.images[..., 3:], torch.as_tensor(background))

    def judged(self, pictures: Sequence[Tensor], background: Sequence[float]) -> list[Judged]:
        """Pictures (H, W, 3) of the views beside the truth, which is as the picture where a pixel is ignored."""
        judged = []
        for index, (picture, truth) in enumerate(zip(pictures, self.truth(background), strict=True)):
            known = None if self.known is None else self.known[index]
            seen = picture.cpu()
            if known is not None:
                truth = torch.where(known[..., None], truth, seen)
            judged.append(Judged(seen.numpy(), truth.numpy(), None if known is None else known.numpy()))
        return judged

    def take(self, pixels: Tensor) -> tuple[Rays, Tensor]:
        """Rays and RGBA (R, 4) of the pixels with flat indices (R,) over all views."""
        height, width = self.images.shape[1:3]
        view, inside = pixels // (height * width), pixels % (height * width)
        place = torch.stack([inside % width, inside // width], -1)
        lens = None if self.distortion is None else self.distortion[view]
        rays = pixel_rays(self.c2w[view], self.intrinsics[view], place, distortion=lens, fisheye=self.fisheye)
        return rays, self.images.reshape(-1, 4)[pixels]

    def some(self, indices: list[int]) -> PosedImages:
        """The views at these indices."""
        lens = None if self.distortion is None else self.distortion[indices]
        distance = None if self.distance is None else self.distance[indices]
        return replace(
            self,
            images=self.images[indices],
            c2w=self.c2w[indices],
            intrinsics=self.intrinsics[indices],
            distortion=lens,
            distance=distance,
            known=None if self.known is None else self.known[indices],
        )


class SceneSource(Source):
    """Views to train a field on and views to judge it by. A method picks rays from `train` itself."""

    def __init__(
        self, config: SourceConfig, *, train: PosedImages, test: PosedImages, spec: SceneSpec
    ) -> None:
        super().__init__(config, size=len(train))
        if not len(train.foreground()):
            raise DataError(
                "every pixel of the training views is fully transparent, or ignored by its mask; there is nothing to "
                "reconstruct"
            )
        self.train, self.test, self.spec = train, test, spec

    def read(self, size: int, *, epoch_seed: int, position: int) -> Batch:
        """`size` rays to be drawn, by the method, from the step's random numbers."""
        return Batch.of(size)


def read_image(path: Path, *, turn: bool = True) -> Tensor:
    """(H, W, 4), colour multiplied by opacity; `turn`ed as its EXIF orientation says."""
    picture = pictures.read_image(path, turn=turn, max_pixels=MAX_PIXELS)
    rgba = np.asarray(picture.convert("RGBA"), dtype=np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    return torch.from_numpy(rgba)


def shrink(image: Tensor, factor: int, path: Path | str = "the picture") -> Tensor:
    """`image` (H, W, C) averaged over factor x factor pixels.

    Raises:
        DataError: a side is no multiple of `factor`.
    """
    height, width, channels = image.shape
    if height % factor or width % factor:
        raise DataError(
            f"{path} has {width} x {height} pixels, which factor = {factor} does not divide; choose another",
            field="data.factor",
        )
    return image.reshape(height // factor, factor, width // factor, factor, channels).mean(dim=(1, 3))


def check_total(views: int, height: int, width: int) -> None:
    """Refuse more pixels than fit into memory."""
    if views * height * width > MAX_PIXELS:
        raise DataError(
            f"{views} views of {width} x {height} pixels are more than {MAX_PIXELS} pixels; "
            "raise data.factor or lower data.size",
            field="data",
        )
