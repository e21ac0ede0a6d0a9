"""Does a converted graph compute what PyTorch computes? Measured on fixed inputs, and gated."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from distill_core.errors import ArtifactError
from distillery_converter.calibration import Arrays, Run
from distillery_converter.graph import Graph
from distillery_converter.targets import Target

RunAll = Callable[[Arrays], tuple[np.ndarray, ...]]
BATCHES = (1, 3, 16)  # 1 and 3 reveal a batch that was baked in; 16 is the largest that is compared
HELD_OUT = 20_260_102  # seed of the trajectories that int8 graphs are compared on; calibration has others


@dataclass(frozen=True)
class Parity:
    """The worst differences from PyTorch, over all compared batches."""

    max_abs: float
    scaled_max_abs: (
        float  # max_abs over max(1, largest |output|): float32 error grows with the numbers themselves
    )
    rel_l2: float
    changed_pixels: float | None = (
        None  # share of 8-bit values that differ; None: the graph makes no pictures
    )

    agreement: float | None = None  # share of equal answers; None: the graph is no classifier

    @property
    def snr_db(self) -> float | None:
        """Signal-to-noise ratio in decibels, which is the relative L2 difference in other words; None: no noise."""
        return -20 * math.log10(self.rel_l2) if self.rel_l2 > 0 else None

    def worst(self, other: Parity) -> Parity:
        changed = [one.changed_pixels for one in (self, other) if one.changed_pixels is not None]
        return Parity(
            max(self.max_abs, other.max_abs),
            max(self.scaled_max_abs, other.scaled_max_abs),
            max(self.rel_l2, other.rel_l2),
            max(changed, default=None),
        )


def compare(
    graph: Graph, run: Run | RunAll, batches: Iterable[int] = BATCHES, *, as_served: bool = False
) -> Parity:
    """`run` against the graph's own module on its fixed inputs, or on those that serving would feed it.

    Raises:
        ArtifactError: an output that is missing, of another shape or type, or not finite.
    """
    parity, agreed = Parity(0.0, 0.0, 0.0), []
    for batch in batches:
        outputs = [
            (graph.predict(inputs), _several(run(inputs))) for inputs in _inputs(graph, batch, as_served)
        ]
        for index, name in enumerate(graph.outputs):
            pairs = [(expected[index], given[index]) for expected, given in outputs]
            for expected, given in pairs:
                _check(_named(graph, name), expected, given)
                if name == graph.classes:
                    agreed.append((expected.argmax(-1) == given.argmax(-1)).ravel())
            expected, given = (_joined(side, graph) for side in zip(*pairs, strict=True))
            parity = parity.worst(_difference(expected, given, pictures=graph.makes_pictures))
    return replace(parity, agreement=float(np.concatenate(agreed).mean())) if agreed else parity


def onnx_runner(path: Path) -> RunAll:
    """The ONNX file at `path` in ONNX Runtime on the CPU, as a function of its inputs.

    Raises:
        ArtifactError: ONNX Runtime cannot run it; it says why.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with _told(path):
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(inputs: Arrays) -> tuple[np.ndarray, ...]:
        with _told(path):
            return tuple(session.run(None, inputs))

    return run


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # ONNX Runtime's have no class in common
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArtifactError(f"{path.name} cannot be run by ONNX Runtime: {reason}") from error


def require(parity: Parity, target: Target, *, model: str, part: str) -> None:
    """Refuse a conversion that differs by more than its target's gates.

    Raises:
        ArtifactError: it does; the sentence gives all figures and the gates.
    """
    if parity.scaled_max_abs <= target.max_abs and parity.rel_l2 <= target.rel_l2:
        return
    snr, least = parity.snr_db or math.inf, -20 * math.log10(target.rel_l2)
    raise ArtifactError(
        f"{model} as {target.name} differs from PyTorch by {parity.scaled_max_abs:.3g} (allowed "
        f"{target.max_abs:.3g}) and by {parity.rel_l2:.3g} relative L2 (allowed {target.rel_l2:.3g}) in its {part}, "
        f"{snr:.1f} of at least {least:.1f} dB, so nothing was published; choose a target of higher precision"
        + (" or a larger tolerance" if parity.rel_l2 <= target.rel_l2 else ""),
        field="tolerance",
    )


def _inputs(graph: Graph, batch: int, as_served: bool) -> Iterator[Arrays]:
    if not as_served:
        yield graph.inputs(batch)
    if not as_served and not graph.frees:
        return
    for feed in graph.feeds(HELD_OUT):
        yield {name: value[:batch] for name, value in feed.items()}


def _joined(parts: Sequence[np.ndarray], graph: Graph) -> np.ndarray:
    """All values of the parts, whose sizes differ beside the batch where the graph has free axes."""
    return np.concatenate([part.ravel() for part in parts] if graph.frees else parts)


def _several(found: np.ndarray | tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    return found if isinstance(found, tuple) else (found,)


def _named(graph: Graph, output: str) -> str:
    return graph.name if len(graph.outputs) == 1 else f"{output} of {graph.name}"


def _check(name: str, expected: np.ndarray, given: np.ndarray) -> None:
    if given.shape != expected.shape:
        raise ArtifactError(
            f"{name}: the converted graph returns {given.shape} where PyTorch returns {expected.shape}"
        )
    if given.dtype != expected.dtype:
        raise ArtifactError(
            f"{name}: the converted graph returns {given.dtype} values where PyTorch returns {expected.dtype}"
        )
    if not np.isfinite(expected).all():
        raise ArtifactError(f"{name}: the model itself returns numbers that are not finite; train it again")
    if not np.isfinite(given).all():
        raise ArtifactError(
            f"{name}: the converted graph returns numbers that are not finite; use a target in fp32"
        )


def _difference(expected: np.ndarray, given: np.ndarray, *, pictures: bool) -> Parity:
    if expected.dtype.kind in "iub":  # an answer is right or wrong, not near
        return Parity(0.0, 0.0, float((expected != given).mean()))
    difference = given.astype(np.float64) - expected
    largest = float(np.abs(difference).max())
    norm = float(np.linalg.norm(expected.astype(np.float64)))
    rel_l2 = float(np.linalg.norm(difference)) / norm if norm > 0 else largest
    changed = float((_pixels(expected) != _pixels(given)).mean()) if pictures else None
    return Parity(largest, largest / max(1.0, float(np.abs(expected).max())), rel_l2, changed)


def _pixels(pictures: np.ndarray) -> np.ndarray:
    pixels: np.ndarray = ((np.clip(pictures, -1, 1) + 1) * 127.5).round().astype(np.uint8)
    return pixels
