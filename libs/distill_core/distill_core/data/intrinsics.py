"""The one reader of what files say of cameras: focal lengths, principal points, lenses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_core.errors import DataError
from distill_core.radiance.cameras.distortion import COEFFICIENTS

Values = Mapping[str, Any]
PERSPECTIVE = {  # camera models that are seen through COEFFICIENTS, and the ones of these that they have not
    "": (),
    "PERSPECTIVE": (),
    "OPENCV": (),
    "PINHOLE": (),
    "SIMPLE_PINHOLE": (),
    "SIMPLE_RADIAL": (),
    "RADIAL": (),
    "FULL_OPENCV": ("k4", "k5", "k6"),  # a divisor there
}
FISHEYE = ("OPENCV_FISHEYE", "FISHEYE", "SIMPLE_FISHEYE", "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE")
NO_FISHEYE = ("p1", "p2")  # coefficients that a fisheye does not have here
OTHER_LENSES = (  # keys of lenses and cameras that rays are not made for; harmless while they are 0, false or empty
    *("k5", "k6", "s1", "s2", "s3", "s4", "sx1", "sy1", "omega", "skew", "shift_x", "shift_y"),
    *(f"ftheta_p{power}" for power in range(5)),
    *("latlong", "equirectangular", "rolling_shutter", "ortho_scale"),
)
KEYS = frozenset(
    (
        *("w", "h", "fl_x", "fl_y", "camera_angle_x", "camera_angle_y", "x_fov", "y_fov", "cx", "cy"),
        *("camera_model", "is_fisheye", *COEFFICIENTS, *OTHER_LENSES),
    )
)


@dataclass(frozen=True)
class Intrinsics:
    """A camera as a file describes it, in pixels of `size`; unset: of its picture."""

    lengths: tuple[float | None, float | None]  # focal lengths across and down, in pixels
    centre: tuple[float | None, float | None] = (None, None)  # unset: the middle
    size: tuple[int, int] | None = None  # width, height
    lens: tuple[float, ...] = (0.0,) * len(COEFFICIENTS)
    fisheye: bool = False
    angles: tuple[float | None, float | None] = (None, None)  # of view, in radians; where there is no length

    def pinhole(self, picture: tuple[int, int]) -> tuple[float, float, float, float]:
        """fx, fy, cx, cy in pixels of `size`, or of a `picture` so wide and high."""
        size = self.size or picture
        fx, fy = (
            0.5 * side / math.tan(angle / 2) if length is None and angle is not None else length
            for length, angle, side in zip(self.lengths, self.angles, size, strict=True)
        )
        across, down = fx or fy, fy or fx  # pixels are square where one is told
        assert across is not None, "a reader gives one of them"
        assert down is not None, "a reader gives one of them"
        cx, cy = (side / 2 if told is None else told for told, side in zip(self.centre, size, strict=True))
        return across, down, cx, cy


def read_intrinsics(file: Values, frame: Values, path: Path) -> Intrinsics:
    """The camera of a frame by its own values, and where it says nothing by its file's; both with the keys `KEYS`.

    Raises:
        DataError: no focal length, a value that is none, or a lens that is not supported; names the key.
    """
    values = {**file, **{key: value for key, value in frame.items() if value is not None}}
    fisheye = _fisheye(values, path)
    axes = [_focal((frame, file), axis, path) for axis in "xy"]
    if not any(told for axis in axes for told in axis):
        raise DataError(
            f"{path} gives no focal length: camera_angle_x is None and so is fl_x; set one of them, in the file or "
            "its frames"
        )
    return Intrinsics(
        (axes[0][0], axes[1][0]),
        (number(values.get("cx"), path, "cx"), number(values.get("cy"), path, "cy")),
        _size(values, path),
        tuple(number(values.get(name), path, name) or 0.0 for name in COEFFICIENTS),
        fisheye,
        (axes[0][1], axes[1][1]),
    )


def _focal(levels: Iterable[Values], axis: str, path: Path) -> tuple[float | None, float | None]:
    """Focal length or angle of view, whichever the first level that knows this axis says; a length goes first."""
    for values in levels:
        length = number(values.get(f"fl_{axis}"), path, f"fl_{axis}")
        if length is not None:
            if length <= 0:
                raise DataError(f"{path}: fl_{axis} is {length:g}; a focal length is above 0 pixels")
            return length, None
        for key, unit in ((f"camera_angle_{axis}", 1.0), (f"{axis}_fov", math.pi / 180)):
            angle = number(values.get(key), path, key)
            if angle is not None:
                if not 0 < angle * unit < math.pi:
                    limit = "pi" if unit == 1 else "180 degrees"
                    raise DataError(f"{path}: {key} is {angle:g}; it must be between 0 and {limit}")
                return None, angle if unit == 1 else math.radians(angle)
    return None, None


def _size(values: Values, path: Path) -> tuple[int, int] | None:
    sides = [number(values.get(key), path, key) for key in ("w", "h")]
    if sides == [None, None]:
        return None
    if any(side is None or side < 1 or side != int(side) for side in sides):
        raise DataError(
            f"{path}: w and h are {values.get('w')!r} and {values.get('h')!r}; give both as whole pixels, or neither"
        )
    width, height = (int(side) for side in sides if side is not None)
    return width, height


def _fisheye(values: Values, path: Path) -> bool:
    """Is the lens a fisheye? Refuses lenses that are neither that nor a perspective one."""
    model, told = str(values.get("camera_model") or "").upper(), values.get("is_fisheye", False)
    if not isinstance(told, bool):
        raise DataError(f"{path}: is_fisheye is {told!r}; it is true or false")
    if model not in PERSPECTIVE and model not in FISHEYE:
        raise DataError(
            f"{path}: camera_model {model} is not supported; known are "
            f"{', '.join(filter(None, (*PERSPECTIVE, *FISHEYE)))}"
        )
    fisheye = told or model in FISHEYE
    wrong = [*OTHER_LENSES, *(NO_FISHEYE if fisheye else PERSPECTIVE[model])]
    refuse_unless_neutral(values, wrong, path, "undistort the pictures")
    return fisheye


def refuse_unless_neutral(values: Values, keys: Iterable[str], path: Path, instead: str) -> None:
    """Raise `DataError` for a key that would change the result and is not honoured, unless it says nothing."""
    for key in keys:
        if not _says_nothing(values.get(key)):
            raise DataError(f"{path}: {key} is not supported; {instead}, and remove the key")


def _says_nothing(value: Any) -> bool:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(map(_says_nothing, value))
    return not value


def number(value: Any, path: Path, name: str) -> float | None:
    """`value` as a float, None for none.

    Raises:
        DataError: not a finite number.
    """
    if value is None:
        return None
    try:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError
        return float(value)
    except (ValueError, OverflowError):
        raise DataError(f"{path}: {name} is {str(value)[:60]!r}; it must be a finite number") from None
