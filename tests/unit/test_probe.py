"""Probes beside a model's weights: what is written is read again, and nothing larger is."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from distill_core.errors import ArtifactError
from distill_core.probe import HEADER_BYTES, PROBE, PROBE_BYTES, Probe, read_probe, write_probe


def part(values: int, seed: int = 1) -> dict[str, np.ndarray]:
    """Inputs and outputs of one function, `values` numbers of four bytes in all."""
    numbers = np.random.default_rng(seed).uniform(-1, 1, values).astype(np.float32)
    return {"inputs.image": numbers[:3], "outputs.logits": numbers[3:]}


def test_what_is_written_is_read_by_function_input_and_output(tmp_path):
    write_probe(tmp_path, {"predict": part(8), "encode": part(5, seed=2)})
    found = read_probe(tmp_path)
    assert sorted(found) == ["encode", "predict"]
    np.testing.assert_array_equal(found["predict"].inputs["image"], part(8)["inputs.image"])
    np.testing.assert_array_equal(found["encode"].outputs["logits"], part(5, seed=2)["outputs.logits"])


def test_a_model_without_a_probe_has_no_file(tmp_path):
    write_probe(tmp_path, {})
    assert list(tmp_path.iterdir()) == []
    assert read_probe(tmp_path) == {}


def test_functions_are_kept_as_long_as_the_file_stays_small(tmp_path):
    most = PROBE_BYTES // 4
    write_probe(
        tmp_path, {"large": part(most + 1), "most": part(most - 4), "small": part(4), "more": part(5)}
    )
    assert sorted(read_probe(tmp_path)) == ["most", "small"]
    assert PROBE_BYTES < (tmp_path / PROBE).stat().st_size <= PROBE_BYTES + HEADER_BYTES


def test_names_that_outgrow_the_header_are_not_written(tmp_path):
    write_probe(
        tmp_path, {"first": part(8), "second": {"inputs." + "x" * HEADER_BYTES: np.ones(PROBE_BYTES // 8)}}
    )
    assert list(read_probe(tmp_path)) == ["first"]


def test_a_file_larger_than_any_that_is_written_is_refused_unread(tmp_path):
    (tmp_path / PROBE).touch()
    with (tmp_path / PROBE).open("r+b") as file:
        file.truncate(2**40)  # without a block on the disk
    with pytest.raises(ArtifactError, match=f"{PROBE} has {2**40} bytes, and at most 1114112 are read"):
        read_probe(tmp_path)
    save_file({"predict/inputs.image": np.zeros((PROBE_BYTES + HEADER_BYTES) // 8)}, tmp_path / PROBE)
    with pytest.raises(ArtifactError, match="at most 1114112 are read; publish it again"):
        read_probe(tmp_path)


@pytest.mark.parametrize(
    "arrays",
    [
        {"predict": np.ones(2)},
        {"predict/images": np.ones(2)},
        {"predict/weights.image": np.ones(2)},
        {"predict/inputs.": np.ones(2)},
        {"predict/inputs.image": np.ones(())},
    ],
)
def test_what_is_no_input_or_output_of_a_function_is_refused_by_name(arrays, tmp_path):
    save_file(arrays, tmp_path / PROBE)
    with pytest.raises(ArtifactError, match=f"holds '{next(iter(arrays))}', expected FUNCTION/inputs.NAME"):
        read_probe(tmp_path)


def test_differences_are_relative_to_the_largest_value_and_shares_of_whole_numbers():
    probe = Probe({}, {"logits": np.array([[-8.0, 2.0]]), "label": np.array([3, 1, 4, 1, 5])})
    found = probe.differences({"logits": np.array([[-8.0, 2.4]]), "label": np.array([3, 1, 4, 2, 5])})
    assert found == pytest.approx({"logits": 0.05, "label": 0.2})


@pytest.mark.parametrize(
    "answer", [None, np.zeros((2, 1)), np.array([[np.nan, 2.0]]), np.array([[np.inf, 2.0]])]
)
def test_an_answer_that_is_missing_of_another_shape_or_not_finite_differs_without_bound(answer):
    probe = Probe({}, {"logits": np.array([[-8.0, 2.0]])})
    assert probe.differences({} if answer is None else {"logits": answer}) == {"logits": float("inf")}
