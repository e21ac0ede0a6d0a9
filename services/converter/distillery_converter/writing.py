"""The graphs of a model as a target says, written and compared with PyTorch."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distill_core.artifacts import GraphReport
from distill_core.errors import ArtifactError
from distill_core.tensorrt.building import SOURCES
from distillery_converter import onnx, parity, tensorrt
from distillery_converter.calibration import Run
from distillery_converter.graph import Graph
from distillery_converter.int8 import quantise
from distillery_converter.parity import Parity
from distillery_converter.precision import lowered
from distillery_converter.targets import Target

WORTH_IT = 0.9  # a part's file must shrink below this share to give up its float32
ONCE = "runs once an image, and overflows or gains little"
Precision = Literal["fp32", "fp16", "bf16", "int8"]


@dataclass(frozen=True)
class WrittenGraph:
    """One converted graph."""

    graph: Graph
    run: Run
    parity: Parity
    precision: Precision
    size: int  # bytes, with its side file
    left_in_float: str = ""

    @property
    def report(self) -> GraphReport:
        """Report of it in the manifest."""
        return GraphReport(
            precision=self.precision,
            size=self.size,
            max_abs_difference=self.parity.max_abs,
            rel_l2=self.parity.rel_l2,
            snr_db=self.parity.snr_db,
            changed_pixels=self.parity.changed_pixels,
            agreement=self.parity.agreement,
            left_in_float=self.left_in_float,
        )


def write_graphs(graphs: list[Graph], exports: Path, goal: Target, cache: Path) -> list[WrittenGraph]:
    """Write every graph into `exports`, which holds nothing else afterwards; what is not published goes beside it.

    Raises:
        ArtifactError: a graph cannot be converted, or none of them gains by it.
        Unavailable: the target needs a GPU or a package that is not here.
    """
    if goal.runtime == "tensorrt":
        return _engines(graphs, exports, goal, cache)
    scratch = exports.parents[2] / "onnx"
    if goal.precision == "int8":
        written = [_int8(graph, exports, scratch, goal) for graph in graphs]
    elif goal.precision == "fp16":
        written = [_fp16(graph, exports, scratch, goal) for graph in graphs]
    else:
        return [_written(graph, onnx.export(graph, exports), "fp32") for graph in graphs]
    if all(one.precision == "fp32" for one in written):
        reasons = "; ".join(f"{one.graph.name}: {one.left_in_float}" for one in written)
        raise ArtifactError(
            f"no part of this model gains by {goal.name} ({reasons}), so nothing was published; choose onnx-fp32",
            field="target",
        )
    return written


def _engines(graphs: list[Graph], exports: Path, goal: Target, cache: Path) -> list[WrittenGraph]:
    """Engines for this machine, and the ONNX files beside them that a sampler builds its own of elsewhere."""
    low = goal.precision if goal.precision in ("fp16", "bf16") else None
    lowered_graphs = [lowered(graph, low) if low else graph for graph in graphs]
    opset = onnx.OPSETS[goal.precision]
    files = [onnx.export(graph, exports / SOURCES, opset=opset) for graph in lowered_graphs]
    runs = tensorrt.build(files, graphs, exports, target=goal.name, cache=cache)
    written = []
    for graph, exported, run in zip(graphs, lowered_graphs, runs, strict=True):
        kept = low is not None and exported is graph
        size = (exports / f"{graph.name}.plan").stat().st_size
        measured = parity.compare(graph, run)
        written.append(
            WrittenGraph(graph, run, measured, "fp32" if kept else goal.precision, size, ONCE if kept else "")
        )
    return written


def _fp16(graph: Graph, exports: Path, scratch: Path, goal: Target) -> WrittenGraph:
    half = lowered(graph, "fp16")
    if half is not graph:
        return _written(graph, onnx.export(half, exports), "fp16")
    if graph.halved is not None:
        return _if_worth_it(graph, exports, scratch, goal, graph.halved)
    return _written(graph, onnx.export(graph, exports), "fp32", left_in_float=ONCE)


def _int8(graph: Graph, exports: Path, scratch: Path, goal: Target) -> WrittenGraph:
    if graph.whole is None:
        return _if_worth_it(
            graph, exports, scratch, goal, lambda source, target: quantise(graph, source, target)
        )
    exports.mkdir(parents=True, exist_ok=True)
    target = exports / f"{graph.name}.onnx"
    left = quantise(graph, onnx.export(graph, scratch), target)
    return _written(graph, target, "int8", as_served=True, left_in_float=left)


def _if_worth_it(
    graph: Graph, exports: Path, scratch: Path, goal: Target, write: Callable[[Path, Path], Any]
) -> WrittenGraph:
    """The graph as `write` makes it of its float32 file; that file where the gate fails or little is gained."""
    exports.mkdir(parents=True, exist_ok=True)
    source, target = onnx.export(graph, scratch), exports / f"{graph.name}.onnx"
    try:
        left = write(source, target) or ""
        one = _written(graph, target, goal.precision, as_served=True, left_in_float=left)
        why = _refused(one, _size(source), goal)
    except ArtifactError as error:
        why = str(error)
    if not why:
        return one
    for file in _files(target):
        file.unlink()
    for file in _files(source):  # by their own names: the side file's is stored inside
        shutil.copyfile(file, exports / file.name)
    return _written(graph, target, "fp32", left_in_float=why)


def _refused(one: WrittenGraph, size: int, goal: Target) -> str:
    """Reason why a part stays in float32; nothing where it gains."""
    if one.parity.rel_l2 > goal.rel_l2:
        return f"differs by {one.parity.rel_l2:.2g} relative L2 in {goal.precision}, of {goal.rel_l2:.2g} allowed"
    if one.size > WORTH_IT * size:
        return f"its file would still have {one.size / size:.0%} of its bytes in {goal.precision}"
    return ""


def _written(
    graph: Graph, path: Path, precision: Precision, *, as_served: bool = False, left_in_float: str = ""
) -> WrittenGraph:
    predict = parity.onnx_runner(path)
    measured = parity.compare(graph, predict, as_served=as_served)
    return WrittenGraph(
        graph, lambda inputs: predict(inputs)[0], measured, precision, _size(path), left_in_float
    )


def _files(path: Path) -> Iterator[Path]:
    """An ONNX file, and its side file if there is one."""
    return (file for file in (path, path.with_name(f"{path.name}.data")) if file.exists())


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path))
