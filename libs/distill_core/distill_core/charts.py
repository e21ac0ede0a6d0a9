"""Charts as pictures: matrices of counts, and axes to draw on. Matplotlib without a display; loads no torch."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 100
SIZE = (5.2, 4.4)  # inches of a plot
CELL = 0.42  # inches of a matrix's cell, where there are few
WIDEST = 6.4  # inches of a matrix at most
NUMBERED = 16  # classes up to which a matrix's cells bear their numbers
LONGEST = 16  # letters of a name


def axes(title: str, x: str, y: str, size: tuple[float, float] = SIZE) -> Axes:
    """Empty axes of a figure of their own."""
    from matplotlib.figure import Figure

    drawn = Figure(size, dpi=DPI, layout="constrained").add_subplot()
    drawn.set(title=title, xlabel=x, ylabel=y)
    return drawn


def picture(drawn: Axes) -> Image.Image:
    """The figure of some axes as RGB."""
    figure, written = drawn.get_figure(root=True), io.BytesIO()
    assert figure is not None
    figure.savefig(written, format="png")
    return Image.open(written).convert("RGB")


def matrix(title: str, counts: np.ndarray, names: Sequence[str], x: str, y: str) -> Axes:
    """A matrix of `counts` (K, K), coloured by their share of the row; `names` of both axes."""
    side = min(CELL * len(names), WIDEST)
    drawn = axes(title, x, y, (side + 2, side + 1.6))
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    drawn.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    words = [plain(clipped(name)) for name in names]
    small = 10 if len(names) <= NUMBERED else 6
    drawn.set_xticks(range(len(names)), words, rotation=90, fontsize=small)
    drawn.set_yticks(range(len(names)), words, fontsize=small)
    if len(names) <= NUMBERED:
        for row, column in np.argwhere(counts):
            ink = "white" if shares[row, column] > 0.5 else "black"
            drawn.text(column, row, str(counts[row, column]), ha="center", va="center", color=ink, fontsize=9)
    return drawn


def beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures from left to right, on white."""
    size = (sum(one.width for one in pictures), max(one.height for one in pictures))
    whole, left = Image.new("RGB", size, "white"), 0
    for one in pictures:
        whole.paste(one, (left, (whole.height - one.height) // 2))
        left += one.width
    return whole


def short(value: float) -> str:
    """A number in few letters: 9k, 2.3M, 55m (thousandths)."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="", places=None)(float(f"{value:.3g}"))


def clipped(name: str) -> str:
    """`name`, cut where it is long."""
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def plain(words: str) -> str:
    """Words of a user's, none of which is read as a formula."""
    return words.replace("$", r"\$")
