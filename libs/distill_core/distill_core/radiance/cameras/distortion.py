"""Lens distortion: from a pixel back to the direction it looks in, for the lenses of OpenCV's two models.

    perspective:  x_d = x g + 2 p1 x y + p2 (r^2 + 2 x^2),   g = 1 + k1 r^2 + k2 r^4 + k3 r^6 + k4 r^8
                  y_d = y g + 2 p2 x y + p1 (r^2 + 2 y^2),   (x, y) = direction / depth, y downwards
    fisheye:      theta_d = theta (1 + k1 theta^2 + k2 theta^4 + k3 theta^6 + k4 theta^8),   theta off the axis

Both are inverted by Newton's method in float64. k4 of the perspective model is nerfstudio's; OpenCV's own is a divisor.
"""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = ("k1", "k2", "k3", "k4", "p1", "p2")  # the order of the last axis
NEWTON_STEPS = 12


def look_through(plane: Tensor, coefficients: Tensor, *, fisheye: bool) -> Tensor:
    """Directions (R, 3), x right, y down, z forward, of points `plane` (R, 2) = ((u - cx) / fx, (v - cy) / fy).

    `coefficients` (R, 6) as in `COEFFICIENTS`. Directions have depth 1 (perspective) or length 1 (fisheye).
    """
    directions = (_fisheye if fisheye else _perspective)(plane.double(), coefficients.double())
    return directions.to(plane.dtype)


def distort(points: Tensor, coefficients: Tensor, *, fisheye: bool) -> Tensor:
    """Points on the plane of directions (x, y, 1): `points` (R, 2) to (R, 2), the inverse of `look_through`."""
    x, y = points.unbind(-1)
    k1, k2, k3, k4, p1, p2 = coefficients.unbind(-1)
    r2 = x * x + y * y
    if fisheye:
        r = r2.sqrt().clamp_min(1e-12)
        theta = torch.atan(r)
        return points * (_bent(theta, coefficients) / r)[:, None]
    g = 1 + r2 * (k1 + r2 * (k2 + r2 * (k3 + r2 * k4)))
    return torch.stack(
        [x * g + 2 * p1 * x * y + p2 * (r2 + 2 * x * x), y * g + 2 * p2 * x * y + p1 * (r2 + 2 * y * y)], -1
    )


def _perspective(plane: Tensor, coefficients: Tensor) -> Tensor:
    k1, k2, k3, k4, p1, p2 = coefficients.unbind(-1)
    point = plane.clone()
    for _ in range(NEWTON_STEPS):
        x, y = point.unbind(-1)
        r2 = x * x + y * y
        g = 1 + r2 * (k1 + r2 * (k2 + r2 * (k3 + r2 * k4)))
        slope = k1 + r2 * (2 * k2 + r2 * (3 * k3 + r2 * 4 * k4))  # dg / d r2
        cross = 2 * x * y * slope + 2 * p1 * x + 2 * p2 * y  # d x_d / d y = d y_d / d x
        across = g + 2 * x * x * slope + 2 * p1 * y + 6 * p2 * x  # d x_d / d x
        down = g + 2 * y * y * slope + 2 * p2 * x + 6 * p1 * y  # d y_d / d y
        off_x, off_y = (distort(point, coefficients, fisheye=False) - plane).unbind(-1)
        determinant = across * down - cross * cross
        point = point - torch.stack(
            [
                (down * off_x - cross * off_y) / determinant,
                (across * off_y - cross * off_x) / determinant,
            ],
            -1,
        )
    return torch.cat([point, torch.ones_like(point[:, :1])], -1)


def _fisheye(plane: Tensor, coefficients: Tensor) -> Tensor:
    k1, k2, k3, k4 = coefficients[:, :4].unbind(-1)
    radius = plane.norm(dim=-1)
    theta = radius.clone()
    for _ in range(NEWTON_STEPS):
        t2 = theta * theta
        slope = 1 + t2 * (3 * k1 + t2 * (5 * k2 + t2 * (7 * k3 + t2 * 9 * k4)))
        theta = theta - (_bent(theta, coefficients) - radius) / slope
    sideways = plane / radius.clamp_min(1e-12)[:, None] * theta.sin()[:, None]
    return torch.cat([sideways, theta.cos()[:, None]], -1)


def _bent(theta: Tensor, coefficients: Tensor) -> Tensor:
    k1, k2, k3, k4 = coefficients[:, :4].unbind(-1)
    t2 = theta * theta
    return theta * (1 + t2 * (k1 + t2 * (k2 + t2 * (k3 + t2 * k4))))
