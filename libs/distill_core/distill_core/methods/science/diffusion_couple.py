"""Interdiffusion coefficients of a binary diffusion couple from one measured profile, in closed form.

    Y = (N - N^-) / (N^+ - N^-),   C = N / V,   Y_C = (C - C^-) / (C^+ - C^-),   t: annealing time
    wagner:       D* = V*/(2t) (dx/dY)*  [(1 - Y*)   int_-inf^x* Y/V dx + Y*   int_x*^inf (1 - Y)/V dx]
    den_broeder:  D* =  1/(2t) (dx/dY_C)* [(1 - Y_C*) int_-inf^x* Y_C dx + Y_C* int_x*^inf (1 - Y_C) dx]

N: mole fraction of B, V: molar volume, * : at the composition of interest, ^-/^+: far to the left and right. No Matano
plane is needed. The two agree only where V follows Vegard's law. Step 0 fits the profile, each later one the profile
with its residuals drawn anew (bootstrap): their root mean square distance from the fit is the standard error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from distill_core.data import Source
from distill_core.errors import ConfigError, DataError
from distill_core.method import Batch, Method, MethodConfig, Update
from distill_core.networks.predictor import Predictor, PredictorFile
from distill_core.networks.predictors.curves import Curve, CurveArgs
from distill_core.recipe.tables import EvaluateConfig, NetworkConfig
from distill_core.signature import Function, TensorSpec

TAIL = 0.03  # share of the points at each end that are those far away
FLAT = 0.02  # of the whole difference, by which the composition may still change there


class Config(MethodConfig):
    relation: Literal["wagner", "den_broeder"] = "wagner"  # by volumes, or by normalised concentrations
    smoothing: Literal["gcv", "none"] = (
        "gcv"  # spline by generalised cross-validation; none: through all points
    )
    num_knots: int = Field(41, ge=2, le=10_000)  # compositions at which the coefficient is kept
    margin: float = Field(0.05, gt=0, lt=0.5)  # of Y at both ends, where dx/dY grows without bound


class Profile(NamedTuple):
    """A profile over the distance: fraction of B, its slope (1/length), and the molar volume, (n,) each."""

    x: np.ndarray
    n: np.ndarray
    slope: np.ndarray
    volume: np.ndarray

    def far(self, values: np.ndarray) -> tuple[float, float]:
        """Means of `values` at the two ends."""
        count = max(2, round(TAIL * len(self.x)))
        return float(values[:count].mean()), float(values[-count:].mean())


def wagner(profile: Profile, time: float) -> np.ndarray:
    """D (n,) at each point, length^2/time (Wagner 1969, in the form of Paul 2017)."""
    left, right = profile.far(profile.n)
    y = (profile.n - left) / (right - left)
    before = cumulative(y / profile.volume, profile.x)
    after = total_after((1 - y) / profile.volume, profile.x)
    dy_dx = profile.slope / (right - left)
    with np.errstate(divide="ignore", invalid="ignore"):  # far away, where nothing has diffused
        found: np.ndarray = profile.volume / (2 * time) / dy_dx * ((1 - y) * before + y * after)
    return found


def den_broeder(profile: Profile, time: float) -> np.ndarray:
    """D (n,) at each point by normalised concentrations, length^2/time (den Broeder 1969)."""
    c = profile.n / profile.volume
    left, right = profile.far(c)
    y = (c - left) / (right - left)
    before, after = cumulative(y, profile.x), total_after(1 - y, profile.x)
    dy_dx = np.gradient(y, profile.x, edge_order=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        found: np.ndarray = 1 / (2 * time) / dy_dx * ((1 - y) * before + y * after)
    return found


RELATIONS = {"wagner": wagner, "den_broeder": den_broeder}


def intrinsic(profile: Profile, time: float, marker: float) -> tuple[float, float]:
    """Intrinsic coefficients (D_A, D_B) at the marker plane at distance `marker` (van Loo 1970), length^2/time."""
    x, n, volume = profile.x, profile.n, profile.volume
    left, right = profile.far(n)
    y = (n - left) / (right - left)
    before = float(np.interp(marker, x, cumulative(y / volume, x)))
    after = float(np.interp(marker, x, total_after((1 - y) / volume, x)))
    found = []
    for fraction, ends in ((1 - n, (1 - left, 1 - right)), (n, (left, right))):
        slope = float(np.interp(marker, x, np.gradient(fraction / volume, x, edge_order=2)))
        found.append((ends[1] * before - ends[0] * after) / (2 * time * slope))
    return found[0], found[1]


def integrated(profile: Profile, time: float, start: float, stop: float) -> float:
    """Integral of D over the compositions of a phase of nearly constant composition, between two distances."""
    x, n, volume = profile.x, profile.n, profile.volume
    left, right = profile.far(n)
    inside = (x >= start) & (x <= stop)
    phase, own_volume = float(n[inside].mean()), float(volume[inside].mean())
    lower, upper = (phase - left) / (right - left), (right - phase) / (right - left)
    before = np.interp(start, x, cumulative(own_volume / volume * (n - left), x))
    after = np.interp(stop, x, total_after(own_volume / volume * (right - n), x))
    width = stop - start
    own = lower * upper * (right - left) * width**2
    return float((own + width * (upper * before + lower * after)) / (2 * time))


def cumulative(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Integral (n,) from the left end up to each point, by the trapezoidal rule."""
    from scipy.integrate import cumulative_trapezoid

    integral: np.ndarray = cumulative_trapezoid(values, x, initial=0)
    return integral


def total_after(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Integral (n,) from each point to the right end."""
    before = cumulative(values, x)
    after: np.ndarray = before[-1] - before
    return after


class DiffusionCouple(Method):
    paper = (
        "Paul et al. 2018, Development of different methods and their efficiencies for the estimation of diffusion "
        "coefficients following the diffusion couple technique, arXiv 1809.09687"
    )
    kind = "predictor"
    roles = ("coefficient",)
    result = "coefficient"
    plan = "step"

    def __init__(self, config: Config, *, data: Source) -> None:
        super().__init__()
        self.config, self.data = config, data
        if "seconds" not in data.facts:
            raise ConfigError(
                "diffusion_couple needs one profile and its annealing time; set data.name = 'diffusion_couple'",
                field="data.name",
            )
        points = data.all().columns
        self.x, self.n, self.volume = (
            points[name].numpy() for name in ("distance", "fraction", "molar_volume")
        )
        left, right = _ends(self.profile(self.n))
        share = torch.linspace(config.margin, 1 - config.margin, config.num_knots, dtype=torch.float64)
        knots = (left + (right - left) * share).sort().values
        self.coefficient = _predictor(knots)
        self.squares = torch.zeros(
            config.num_knots, dtype=torch.float64
        )  # of the drawn fits' distances from the fit

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return {"distance": "the profile", "fraction": "the profile", "molar_volume": "the profile"}

    @torch.no_grad()
    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        fitted, curve = self.profile(self.n), self.curve
        if step == 0:
            curve.values.copy_(self.coefficients(fitted))
        else:
            drawn = torch.randint(len(self.n), (len(self.n),)).numpy()
            again = self.coefficients(self.profile(fitted.n + (self.n - fitted.n)[drawn]))
            self.squares = self.squares + (again - curve.values).square()
            curve.errors.copy_((self.squares / step).sqrt())
        yield Update("coefficient", None, {"standard_error": (curve.errors / curve.values).median()})

    @property
    def curve(self) -> Curve:
        """The network of the predictor."""
        network = self.coefficient.network
        assert isinstance(network, Curve)
        return network

    def profile(self, n: np.ndarray) -> Profile:
        """The spline through measured fractions `n` (n,)."""
        from scipy.interpolate import CubicSpline, make_smoothing_spline

        make: Any = CubicSpline if self.config.smoothing == "none" else make_smoothing_spline
        spline = make(self.x, n)
        return Profile(self.x, spline(self.x), spline(self.x, 1), self.volume)

    def coefficients(self, profile: Profile) -> Tensor:
        """D (M,) at the knots, um^2/s."""
        found = RELATIONS[self.config.relation](profile, self.data.facts["seconds"])
        return torch.from_numpy(self.at_knots(profile, found))

    def at_knots(self, profile: Profile, values: np.ndarray) -> np.ndarray:
        """Values (n,) along a profile at the compositions of the knots, (M,)."""
        order = np.argsort(profile.n)
        found: np.ndarray = np.interp(self.curve.knots.numpy(), profile.n[order], values[order])
        return found

    def state(self) -> dict[str, Tensor]:
        return {"squares": self.squares}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.squares = state["squares"]

    @torch.no_grad()
    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """Median relative standard error, and of a simulated couple the median errors of this and of both relations."""
        curve, fitted = self.curve, self.profile(self.n)
        found = {"standard_error": float((curve.errors / curve.values).median())}
        if "coefficient" not in self.data.arrays:
            return found
        truth = self.at_knots(fitted, self.data.arrays["coefficient"].numpy())
        found["coefficient_error"] = _median_error(curve.values.numpy(), truth)
        for name, relation in RELATIONS.items():
            each = self.at_knots(fitted, relation(fitted, self.data.facts["seconds"]))
            found[f"{name}_error"] = _median_error(each, truth)
        return found


def _median_error(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.median(np.abs(found / truth - 1)))


def _ends(profile: Profile) -> tuple[float, float]:
    """Fractions far to the left and right.

    Raises:
        DataError: the profile is flat, its ends are not, or it rises and falls between them.
    """
    left, right = profile.far(profile.n)
    change = right - left
    count = max(2, round(TAIL * len(profile.x)))
    if abs(change) < 1e-3:
        raise DataError(
            f"the profile goes from {left:.4g} to {right:.4g}; nothing has diffused between its ends",
            field="data.path",
        )
    drift = max(abs(profile.n[count] - profile.n[0]), abs(profile.n[-1] - profile.n[-count - 1]))
    if drift > FLAT * abs(change):
        raise DataError(
            f"the profile's ends are not flat: they change by {drift / abs(change):.1%} of the whole difference; "
            "measure further out, to where nothing has diffused",
            field="data.path",
        )
    y = (profile.n - left) / change
    inside = (y > 2 * FLAT) & (y < 1 - 2 * FLAT)
    if not inside.any() or (profile.slope[inside] / change <= 0).any():
        raise DataError(
            "the profile rises and falls between its ends; the relations need one that is monotonic: measure one "
            "couple without extrema, or smooth it (config.smoothing = 'gcv')",
            field="data.path",
        )
    return left, right


def _predictor(knots: Tensor) -> Predictor:
    network = Curve(CurveArgs(num_knots=len(knots)))
    network.knots.copy_(knots)
    value = TensorSpec(dtype="float64")
    low, high = float(knots[0]), float(knots[-1])
    function = Function(
        inputs={"fraction": TensorSpec(dtype="float64", low=low, high=high)},  # mole fraction of B
        outputs={"coefficient": value, "standard_error": value},  # um^2/s
    )
    described = PredictorFile(
        network=NetworkConfig(name="curve", args=network.args.model_dump(mode="json")),
        functions={"predict": function},
    )
    return Predictor(network, described)
