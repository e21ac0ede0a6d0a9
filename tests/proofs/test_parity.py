"""`make prove-parity`: the student of every method, converted: float32 as PyTorch computes it, int8 with its report.

Students are tiny, trained for two steps. In float32 they agree to a relative L2 of 1e-4 in batches of 1, 3 and 16. In
int8 they are published with their figures, or refused with them: two steps make no trained network, and only that is
claimed of it. What is no generator and no field is refused in one sentence. Without the file's name a few methods run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.errors import ArtifactError
from distill_core.kinds import find_card
from distill_core.kinds.cards import described
from distill_core.methods import method_names
from distillery_converter.convert import convert
from distillery_converter.parity import BATCHES
from tests.helpers import REPOSITORY, recipe_of, tiny_trainer

SHORT = ("classifier", "dmd2", "radiance_field")
COLUMNS = "{method:<20} {kind:<10} {fp32:>9} {snr:>9} {ratio:>8} {size:>14}  {said}"
HEAD = dict(method="method", kind="kind", fp32="fp32 L2", snr="int8 dB", ratio="FD ratio", size="MB", said="")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    named = any("test_parity" in str(arg) for arg in metafunc.config.invocation_params.args)
    metafunc.parametrize("name", method_names() if named else SHORT)


@pytest.fixture(scope="module")
def rows() -> Iterator[list[dict[str, Any]]]:
    found: list[dict[str, Any]] = []
    yield found
    out = REPOSITORY / "out"
    out.mkdir(exist_ok=True)
    (out / "parity.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


def student(name: str, context: Any, folder: Path) -> tuple[ArtifactStore, Manifest]:
    """The method's result after two steps, published where its base is."""
    trainer = tiny_trainer(recipe_of(name), context, folder / "run")
    trainer.train()
    with trainer.averaged():
        trainer.method.main.save(folder / "model")
        fields = described(trainer.method.main)
    draft = Manifest(name=f"tiny-{name.replace('_', '-')}", method=name, **fields)
    return context.store, context.store.publish(folder / "model", draft)


def converted(name: str, store: ArtifactStore, made: Manifest, folder: Path) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = {
        **HEAD,
        "method": name,
        "kind": made.kind,
        "fp32": "",
        "snr": "",
        "ratio": "",
        "size": "",
    }
    card = find_card(made.kind)
    if card.why_not_exported(made.card_as(card.Card)):
        with pytest.raises(ArtifactError, match="cannot be converted") as caught:
            convert(store, made.ref, "onnx-fp32", cache=folder)
        return row | {"said": f"refused: {caught.value}"}
    report = convert(store, made.ref, "onnx-fp32", cache=folder).exports["onnx-fp32"]
    assert report.rel_l2 <= 1e-4
    assert report.batches == BATCHES == (1, 3, 16)
    row |= {"fp32": f"{report.rel_l2:.1e}", "size": f"{report.figures['megabytes']:.2f}"}
    refusal, low = "", None
    try:
        low = convert(store, made.ref, "onnx-int8", cache=folder).exports["onnx-int8"]
    except ArtifactError as error:
        refusal = str(error)
    if low is None:
        assert "nothing was published" in refusal
        assert store.manifest(made.name).exports.keys() == {"onnx-fp32"}
        return row | {"said": f"int8 refused: {refusal}"}
    assert low.snr_db is not None
    assert low.snr_db >= 25
    assert made.kind != "denoiser" or (low.frechet is not None and low.frechet.ratio <= 1.05)
    left = [f"{part}: {one.left_in_float}" for part, one in low.graphs.items() if one.precision == "fp32"]
    return row | {
        "snr": f"{low.snr_db:.1f}",
        "ratio": f"{low.frechet.ratio:.3f}" if low.frechet else "",
        "size": f"{row['size']} -> {low.figures['megabytes']:.2f}",
        "said": "; ".join(left),
    }


def test_a_students_graphs_compute_what_pytorch_computes(name, context, tmp_path, rows, capsys):
    store, made = student(name, context, tmp_path)
    row = converted(name, store, made, tmp_path / "cache")
    with capsys.disabled():
        if not rows:
            print("\n" + COLUMNS.format(**HEAD))
        print(COLUMNS.format(**row))
    rows.append(row)
