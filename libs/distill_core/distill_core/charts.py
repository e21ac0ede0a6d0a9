"""Charts as pictures: matrices of counts, and plots of lines, bars and points. Drawn with Pillow; loads no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]
Colour = tuple[int, int, int]
COLOURS: tuple[Colour, ...] = ((31, 119, 180), (214, 108, 16), (44, 140, 60), (148, 60, 170), (120, 120, 120))
INK, GREY, PALE, PAPER = (30, 30, 30), (150, 150, 150), (222, 222, 222), (255, 255, 255)
SIZE = (520, 440)  # pixels of a plot
LEFT, TOP, RIGHT, BOTTOM = 68, 40, 20, 58  # margins, pixels
CELLS = 640  # pixels of a matrix, at most
LONGEST = 16  # letters of a name
TICKS = 5


@dataclass(frozen=True)
class Axis:
    """What an axis shows, and from where to where."""

    label: str
    low: float
    high: float
    log: bool = False  # whether equal lengths are equal factors

    @classmethod
    def around(cls, label: str, values: Sequence[float], *, log: bool = False) -> Axis:
        """An axis with room on both sides of `values`."""
        low, high = min(values), max(values)
        if log:
            return cls(label, low / 2, high * 2, log=True)
        room = 0.15 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(label, low - room, high + room)

    def share(self, value: float) -> float:
        """Where `value` lies: 0 at the low end, 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[float]:
        """Round values within the axis."""
        if self.log:
            powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            found = [10.0**power for power in powers]
            return found if len(found) > 1 else [self.low * 2, self.high / 2]
        rough = 0.99 * (self.high - self.low) / TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [step * number for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


class Plot:
    """A plot that is drawn piece by piece; `picture` is what there is of it."""

    def __init__(self, title: str, x: Axis, y: Axis) -> None:
        self.x, self.y = x, y
        self.picture = Image.new("RGB", SIZE, PAPER)
        self.draw = ImageDraw.Draw(self.picture)
        self._named = 0
        self._frame(title)

    def place(self, x: float, y: float) -> Point:
        """The pixel of a point."""
        width, height = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM
        return LEFT + width * self.x.share(x), TOP + height * (1 - self.y.share(y))

    def _frame(self, title: str) -> None:
        left, bottom = LEFT, SIZE[1] - BOTTOM
        for value in self.x.ticks:
            across, _ = self.place(value, self.y.low)
            self.draw.line([(across, TOP), (across, bottom)], fill=PALE)
            write(self.draw, (across, bottom + 12), short(value), "mm")
        for value in self.y.ticks:
            _, down = self.place(self.x.low, value)
            self.draw.line([(left, down), (SIZE[0] - RIGHT, down)], fill=PALE)
            write(self.draw, (left - 6, down), short(value), "rm")
        self.draw.rectangle([(left, TOP), (SIZE[0] - RIGHT, bottom)], outline=INK)
        write(self.draw, (SIZE[0] / 2, TOP / 2), title, "mm", 15)
        write(self.draw, ((left + SIZE[0] - RIGHT) / 2, SIZE[1] - 20), self.x.label, "mm")
        sideways(self.picture, self.y.label, (14, (TOP + bottom) // 2))

    def bar(self, left: float, right: float, height: float, colour: Colour) -> None:
        """A bar from the low end of y up to `height`."""
        x0, y0 = self.place(left, height)
        x1, y1 = self.place(right, self.y.low)
        self.draw.rectangle([(x0 + 1, min(y0, y1)), (x1 - 1, y1)], fill=colour)

    def line(self, points: Sequence[Point], colour: Colour, *, marked: bool = True) -> None:
        """A line through `points`, each with a dot where they are `marked`."""
        placed = [self.place(*point) for point in points]
        self.draw.line(placed, fill=colour, width=2, joint="curve")
        for across, down in placed if marked else ():
            self.draw.ellipse([(across - 3, down - 3), (across + 3, down + 3)], fill=colour)

    def dot(self, x: float, y: float, radius: float, colour: Colour) -> None:
        """A dot of so many pixels."""
        across, down = self.place(x, y)
        self.draw.ellipse(
            [(across - radius, down - radius), (across + radius, down + radius)], fill=colour, outline=PAPER
        )

    def name(self, words: str, colour: Colour) -> None:
        """One more line of the legend, in the upper left."""
        down = TOP + 14 + 18 * self._named
        width = ImageFont.load_default(12).getlength(words)
        self.draw.rectangle([(LEFT + 6, down - 9), (LEFT + 32 + width, down + 9)], fill=PAPER)
        self.draw.rectangle([(LEFT + 10, down - 5), (LEFT + 20, down + 5)], fill=colour)
        write(self.draw, (LEFT + 26, down), words, "lm")
        self._named += 1


def matrix(title: str, counts: np.ndarray, names: Sequence[str], x: str, y: str) -> Image.Image:
    """A matrix of `counts` (K, K), coloured by their share of the row; `names` of both axes."""
    side = max(14, min(48, CELLS // len(names)))
    room = 32 + 7 * max(len(clipped(name)) for name in names)
    length = side * len(names)
    picture = Image.new("RGB", (max(length + room + 20, 320), length + room + 56), PAPER)
    draw = ImageDraw.Draw(picture)
    write(draw, (picture.width / 2, 18), title, "mm", 15)
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    for row, column in np.ndindex(*counts.shape):
        left, top = room + side * column, 36 + side * row
        draw.rectangle([(left, top), (left + side - 1, top + side - 1)], fill=shade(shares[row, column]))
        if counts[row, column] and side >= 24:
            ink = PAPER if shares[row, column] > 0.5 else INK
            write(draw, (left + side / 2, top + side / 2), str(counts[row, column]), "mm", 11, ink)
    for place, name in enumerate(map(clipped, names)):
        middle = side * place + side / 2
        write(draw, (room - 6, 36 + middle), name, "rm")
        sideways(picture, name, (int(room + middle), 40 + length), end=True)
    write(draw, (room + length / 2, picture.height - 12), x, "mm")
    sideways(picture, y, (10, 36 + length // 2))
    return picture


def beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures from left to right, on white."""
    whole = Image.new("RGB", (sum(one.width for one in pictures), max(one.height for one in pictures)), PAPER)
    left = 0
    for one in pictures:
        whole.paste(one, (left, (whole.height - one.height) // 2))
        left += one.width
    return whole


def shade(share: float) -> Colour:
    """White for 0, dark blue for 1."""
    red, green, blue = (round(255 + share * (end - 255)) for end in (8, 48, 107))
    return red, green, blue


def short(value: float) -> str:
    """A number in few letters: 1.2k, 3M, 0.25."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{round(value, 12):.3g}"


def clipped(name: str) -> str:
    """`name`, cut where it is long."""
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def write(
    draw: ImageDraw.ImageDraw, at: Point, words: str, anchor: str, size: int = 12, ink: Colour = INK
) -> None:
    """Words on a picture; `anchor` says which point of them `at` is, as Pillow names it."""
    draw.text(at, words, fill=ink, font=ImageFont.load_default(size), anchor=anchor)


def sideways(picture: Image.Image, words: str, at: tuple[int, int], *, end: bool = False) -> None:
    """Words that run upwards around the point `at`, or down from it to their `end`."""
    font = ImageFont.load_default(12)
    left, top, right, bottom = font.getbbox(words)
    label = Image.new("L", (math.ceil(right - left) + 2, math.ceil(bottom - top) + 4), 0)
    ImageDraw.Draw(label).text((1 - left, 1 - top), words, fill=255, font=font)
    label = label.rotate(90, expand=True)
    corner = (at[0] - label.width // 2, at[1] if end else at[1] - label.height // 2)
    picture.paste(INK, corner, label)
