"""The demo's table, pictures and verdict, from figures and arrays; knows no service."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distillery_cli.terminal import output

if TYPE_CHECKING:
    import numpy as np

    Curve = list[tuple[int, dict[str, float]]]  # (step, values)

MAX_RATIO = 1.5  # the student's Fréchet distance over that of its teacher at 32 steps
MIN_ACCURACY = 0.95
MAX_DIFFERENCE = 1e-3  # between ONNX and PyTorch, of pictures in [-1, 1]
CURVES = {  # stage -> the metrics that say how its training went
    "teacher": ("teacher_loss",),
    "student": ("fake_score_loss", "score_gap"),
    "field": ("field_loss",),
}


class Row(NamedTuple):
    """One line of the table."""

    frechet_distance: float
    accuracy: float
    ms_per_image: float


@dataclass(frozen=True)
class Report:
    """All that the demo measured."""

    teacher: Row
    teacher_one_step: Row
    student: Row
    onnx: Row
    max_abs_difference: float
    field: Mapping[str, float]
    seconds: Mapping[str, float]  # of each stage, and `total`
    models: Mapping[str, str]
    num_samples: int

    def values(self) -> dict[str, Any]:
        """As `report.json` has it."""
        rows = {
            name: getattr(self, name)._asdict() for name in ("teacher", "teacher_one_step", "student", "onnx")
        }
        rows["onnx"]["max_abs_difference"] = self.max_abs_difference
        return {
            **rows,
            "field": dict(self.field),
            "seconds": self.seconds["total"],
            "stage_seconds": dict(self.seconds),
            "models": dict(self.models),
            "num_samples": self.num_samples,
            "demands": [{"demand": demand.said, "holds": demand.holds} for demand in demands(self)],
        }


class Demand(NamedTuple):
    """Demands that must hold for the demo to count as a success."""

    said: str
    holds: bool


def demands(report: Report) -> list[Demand]:
    """The three demands, with the measured figures."""
    student, limit = report.student, MAX_RATIO * report.teacher.frechet_distance
    lowest = min(student.accuracy, report.onnx.accuracy)
    return [
        Demand(
            f"Fréchet distance of the one-step student {student.frechet_distance:.3g}, at most {limit:.3g} "
            f"({MAX_RATIO:g} x the teacher's at 32 steps)",
            student.frechet_distance <= limit,
        ),
        Demand(f"class accuracy {lowest:.1%}, at least {MIN_ACCURACY:.0%}", lowest >= MIN_ACCURACY),
        Demand(
            f"ONNX differs from PyTorch by {report.max_abs_difference:.2g}, at most {MAX_DIFFERENCE:g}",
            report.max_abs_difference <= MAX_DIFFERENCE,
        ),
    ]


def table(report: Report) -> output.FittedTable:
    """The four rows."""
    columns = ["model", "network evaluations", "Fréchet distance", "class accuracy", "ms per image"]
    rows = (
        ("teacher, 32 steps", 63, report.teacher),
        ("teacher, 1 step", 1, report.teacher_one_step),
        ("student, 1 step", 1, report.student),
        ("student, 1 step, ONNX", 1, report.onnx),
    )
    cells = [
        [title, calls, f"{row.frechet_distance:.3f}", f"{row.accuracy:.1%}", f"{row.ms_per_image:.2f}"]
        for title, calls, row in rows
    ]
    title = f"{report.num_samples} digits of each, asked for over gRPC"
    return output.table(columns, cells, title=title, spare=["network evaluations", "ms per image"])


def save_contact_sheet(panels: Mapping[str, np.ndarray], path: Path) -> None:
    """Titled grids side by side; each panel is (N, C, H, W) in [-1, 1], ten pictures a row."""
    pyplot = pyplot_without_display()
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4.5), layout="constrained")
    for axis, (title, pictures) in zip(axes, panels.items(), strict=True):
        axis.imshow(grid(pictures), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_title(title)
        axis.axis("off")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def grid(pictures: np.ndarray, *, columns: int = 10) -> np.ndarray:
    """(N, C, H, W) as one picture (rows * (H + 1), columns * (W + 1)[, 3]) with white lines between."""
    import numpy as np

    count, channels, height, width = pictures.shape
    rows = -(-count // columns)
    canvas = np.ones((rows * columns, height + 1, width + 1, channels), np.float32)
    canvas[:count, :-1, :-1] = pictures.transpose(0, 2, 3, 1)
    tiled = canvas.reshape(rows, columns, height + 1, width + 1, channels).transpose(0, 2, 1, 3, 4)
    return tiled.reshape(rows * (height + 1), columns * (width + 1), channels).squeeze()


def save_curves(curves: Mapping[str, Curve], path: Path) -> None:
    """A panel per stage: its losses over the steps."""
    pyplot = pyplot_without_display()
    shown = {stage: curve for stage, curve in curves.items() if stage in CURVES and curve}
    figure, axes = pyplot.subplots(
        1, max(1, len(shown)), figsize=(5 * max(1, len(shown)), 3.5), layout="constrained", squeeze=False
    )
    for axis, (stage, curve) in zip(axes[0], shown.items(), strict=False):
        for name in _present(CURVES[stage], curve):
            points = [(step, values[name]) for step, values in curve if name in values]
            axis.plot(*zip(*points, strict=True), label=name.replace("_", " "))
        axis.set(title=stage, xlabel="step", yscale="log")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _present(wanted: Sequence[str], curve: Curve) -> list[str]:
    names = {name for _, values in curve for name in values}
    return [name for name in wanted if name in names] or sorted(n for n in names if n.endswith("_loss"))


def save_strip(frames: Sequence[np.ndarray], path: Path, *, count: int = 8) -> None:
    """`count` frames of an orbit, (H, W, 3) uint8, side by side."""
    import numpy as np
    from PIL import Image

    step = max(1, len(frames) // count)
    Image.fromarray(np.concatenate(list(frames[::step])[:count], axis=1)).save(path)


def pyplot_without_display() -> Any:
    """Matplotlib's pyplot, drawing into files."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    return pyplot
