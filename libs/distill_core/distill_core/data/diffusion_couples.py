"""Composition profiles of diffusion couples: measured ones from a table, or simulated ones with a known coefficient.

A couple joins two alloys; while it is annealed for a time t their atoms mix. In the frame that moves with the atoms,

    dN/dt = d/dxi (D / V^2 dN/dxi),    dxi = dx / V,    N(xi < 0, 0) = N^-,   N(xi > 0, 0) = N^+

with N the mole fraction of B, V the molar volume and D the interdiffusion coefficient (Wagner 1969).
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from distill_core.config import Config as SourceConfig
from distill_core.config import DataPath
from distill_core.data.source import Source, existing, unknown_choice
from distill_core.errors import DataError
from distill_core.files.text import lines, read_text

Fraction = Annotated[float, Field(ge=0, le=1)]
COLUMNS = ("distance", "fraction", "molar_volume")
MAX_POINTS, LEAST_POINTS = 100_000, 9
MAX_BYTES = 16 * 2**20  # of a table: 160 for each of the most points
SIMULATED = frozenset(("ends", "molar_volume", "contraction", "noise", "points", "seed"))
COEFFICIENT, VOLUME = 0.01, 7.0  # of the simulated couple at N = 0: um^2/s and cm^3/mol
REACH, CELLS = 8.0, 1201  # of its grid in xi, in lengths sqrt(D t)


class DiffusionCouple(Source):
    """Points of one profile in order: `distance` (um), `fraction` of B, `molar_volume` (cm^3/mol).

    A simulated one has `coefficient` (um^2/s) too. `facts` say the annealing time.
    """

    class Config(SourceConfig):
        """Options of the recipe's `[data]` table."""

        name: Literal["diffusion_couple"] = "diffusion_couple"
        path: DataPath | None = (
            None  # CSV: distance (um), fraction (of B), molar_volume (cm^3/mol); else simulated
        )
        hours: float | None = Field(None, gt=0, le=1e6)  # annealing time, h; simulated: 10
        ends: tuple[Fraction, Fraction] = (0.04, 0.93)  # fraction of B far to the left and to the right
        molar_volume: Literal["constant", "vegard", "contracting"] = "vegard"  # over the fraction of B
        contraction: float = Field(0.16, gt=0, lt=0.5)  # contracting: largest share below Vegard's law
        noise: float = Field(0.0, ge=0, le=0.1)  # standard deviation of a measured fraction
        points: int = Field(401, ge=LEAST_POINTS, le=MAX_POINTS)  # measured at even distances
        seed: int = Field(0, ge=0, lt=2**63)  # of the noise

        @model_validator(mode="after")
        def _of_one_kind(self) -> Self:
            if self.path is not None and (extra := sorted(SIMULATED & self.model_fields_set)):
                raise ValueError(f"{extra[0]} is of a simulated couple; leave it out beside path")
            if self.path is not None and self.hours is None:
                raise ValueError("hours is missing: say for how long the couple of path was annealed")
            if self.ends[0] == self.ends[1]:
                raise ValueError(f"ends = {self.ends} are equal, and nothing diffuses between them")
            return self

    def __init__(self, config: Config) -> None:
        self.hours = config.hours or 10.0
        columns = (
            _simulated(config, self.hours) if config.path is None else read_profile(existing(config.path))
        )
        arrays = {name: torch.from_numpy(values) for name, values in columns.items()}
        super().__init__(config, size=len(columns["distance"]), arrays=arrays)

    @property
    def facts(self) -> dict[str, float]:
        """The annealing time in seconds."""
        return {**super().facts, "seconds": 3600 * self.hours}


def read_profile(path: Path) -> dict[str, np.ndarray]:
    """The columns of a CSV file of measured points; without `molar_volume` it is constant.

    Raises:
        DataError: a missing, unknown or repeated column, no number, a fraction outside 0 to 1, distances that do not
            rise, or too few points; the sentence names the line.
    """
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise DataError(
            f"{path} has {path.stat().st_size} bytes; a table of a profile has at most {MAX_BYTES}",
            field="data.path",
        )
    try:
        rows = [row for row in csv.reader(lines(read_text(path))) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV: {error}", field="data.path") from None
    names = [name.strip() for name in rows[0]] if rows else []
    for name in names:
        if name not in COLUMNS:
            raise unknown_choice("column", name, COLUMNS, field="data.path")
    if len(set(names)) < len(names) or not {"distance", "fraction"} <= set(names):
        raise DataError(
            f"{path} has the columns {', '.join(names) or 'none'}; expected distance, fraction and, if it varies, "
            "molar_volume, each once",
            field="data.path",
        )
    points = [_numbers(path, number, row, names) for number, row in enumerate(rows[1:], start=2)]
    if not LEAST_POINTS <= len(points) <= MAX_POINTS:
        raise DataError(
            f"{path} has {len(points)} points; a profile has {LEAST_POINTS} to {MAX_POINTS}",
            field="data.path",
        )
    found = dict(zip(names, np.array(points, dtype=np.float64).T, strict=True))
    found.setdefault("molar_volume", np.ones(len(points)))
    _check(path, found)
    return {name: np.ascontiguousarray(found[name]) for name in COLUMNS}


def _numbers(path: Path, line: int, row: list[str], names: list[str]) -> list[float]:
    try:
        values = [float(text) for text in row]
    except ValueError:
        values = []
    if len(values) != len(names) or not all(map(math.isfinite, values)):
        raise DataError(
            f"{path}: line {line} is {','.join(row)[:60]!r}; expected {len(names)} numbers", field="data.path"
        )
    return values


def _check(path: Path, columns: dict[str, np.ndarray]) -> None:
    wrong = {
        "a distance that is not above the one before": np.diff(columns["distance"], prepend=-np.inf) <= 0,
        "a fraction outside 0 to 1": (columns["fraction"] < 0) | (columns["fraction"] > 1),
        "a molar_volume that is not above 0": columns["molar_volume"] <= 0,
    }
    for what, at in wrong.items():
        if at.any():
            raise DataError(f"{path}: point {int(at.argmax()) + 1} has {what}", field="data.path")


def coefficient(fraction: np.ndarray) -> np.ndarray:
    """Interdiffusion coefficient of the simulated couple, um^2/s: it grows fivefold from A to B."""
    return COEFFICIENT * (1 + 4 * fraction**2)


def molar_volume(fraction: np.ndarray, law: str, contraction: float) -> np.ndarray:
    """Molar volume of the simulated couple, cm^3/mol: constant, by Vegard's law, or below it in the middle."""
    if law == "constant":
        return np.full_like(fraction, VOLUME)
    below = 4 * contraction * fraction * (1 - fraction) if law == "contracting" else 0.0
    volume: np.ndarray = VOLUME * (1 + 0.5 * fraction) * (1 - below)
    return volume


def simulate(
    ends: tuple[float, float],
    diffusivity: Callable[[np.ndarray], np.ndarray],
    volume: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Distance (n,) and fraction (n,) of a couple after the time 1, by finite volumes in the frame of the atoms.

    `diffusivity` and `volume` are functions of the fraction; the distance is 0 at the left end of the grid.
    """
    from scipy.integrate import solve_ivp

    scale = float(np.sqrt(diffusivity(np.linspace(min(ends), max(ends), 101)).max()))
    thinnest = float(volume(np.linspace(min(ends), max(ends), 101)).min())
    xi = np.linspace(-REACH, REACH, CELLS) * scale / thinnest
    step = xi[1] - xi[0]

    def change(_time: float, n: np.ndarray) -> np.ndarray:
        middle = (n[1:] + n[:-1]) / 2
        flux = diffusivity(middle) / volume(middle) ** 2 * np.diff(n) / step
        rate: np.ndarray = np.diff(flux, prepend=0.0, append=0.0) / step  # nothing passes the outer ends
        return rate

    begin = np.where(xi < 0, ends[0], ends[1]).astype(np.float64)
    begin[np.isclose(xi, 0)] = (ends[0] + ends[1]) / 2
    after = solve_ivp(change, (0, 1), begin, method="LSODA", rtol=1e-7, atol=1e-10, lband=1, uband=1).y[:, -1]
    widths = step * (volume(after[1:]) + volume(after[:-1])) / 2
    return np.concatenate([[0.0], np.cumsum(widths)]), after


@functools.lru_cache(maxsize=16)
def _exact(ends: tuple[float, float], law: str, contraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Distances in lengths sqrt(D t), over the part where something has diffused, and fractions; (n,) each."""
    relative = molar_volume(np.array(ends), law, contraction).min()
    x, n = simulate(
        ends,
        lambda n: coefficient(n) / COEFFICIENT,
        lambda n: molar_volume(n, law, contraction) / relative,
    )
    unchanged = 1e-7 * abs(n[-1] - n[0])
    first, last = (
        np.flatnonzero(np.abs(n - n[0]) > unchanged)[0],
        np.flatnonzero(np.abs(n - n[-1]) > unchanged)[-1],
    )
    return x[first : last + 1] - x[first], n[first : last + 1]


def _simulated(config: DiffusionCouple.Config, hours: float) -> dict[str, np.ndarray]:
    x, n = _exact(config.ends, config.molar_volume, config.contraction)
    at = np.linspace(0, x[-1], config.points)
    fraction = np.interp(at, x, n)
    noise = np.random.Generator(np.random.Philox(config.seed)).standard_normal(config.points) * config.noise
    return {
        "distance": at * math.sqrt(COEFFICIENT * 3600 * hours),
        "fraction": np.clip(fraction + noise, 0, 1),
        "molar_volume": molar_volume(fraction, config.molar_volume, config.contraction),
        "coefficient": coefficient(fraction),
    }


SOURCES = {"diffusion_couple": DiffusionCouple}
