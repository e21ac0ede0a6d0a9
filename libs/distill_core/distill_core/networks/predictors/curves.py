"""A curve with its standard error, piecewise linear between knots."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core.config import Config


class CurveArgs(Config):
    """What decides the curve's shape."""

    num_knots: int = Field(ge=2, le=100_000)  # where its values are kept


class Curve(nn.Module):
    """f(x) and its standard error at x (B,), each (B,) float64; beyond the outer knots the last pieces go on."""

    Args = CurveArgs

    knots: Tensor

    def __init__(self, args: CurveArgs) -> None:
        super().__init__()
        self.args = args
        self.register_buffer("knots", torch.linspace(0, 1, args.num_knots, dtype=torch.float64))
        self.values = nn.Parameter(torch.zeros(args.num_knots, dtype=torch.float64))
        self.errors = nn.Parameter(torch.zeros(args.num_knots, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.interpolated(x, self.values), self.interpolated(x, self.errors)

    def interpolated(self, x: Tensor, values: Tensor) -> Tensor:
        """The line through `values` (M,) at the knots; a sum of kinks, so that a graph needs no search."""
        slopes = values.diff() / self.knots.diff()
        beyond = (x.double()[:, None] - self.knots[1:-1]).clamp_min(0)
        return values[0] + slopes[0] * (x.double() - self.knots[0]) + beyond @ slopes.diff()


NETWORKS = {"curve": Curve}
