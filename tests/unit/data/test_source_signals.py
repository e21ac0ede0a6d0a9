"""Recorded frames: read as they are, and refused in one sentence where they cannot be."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from distill_core.data import build_source
from distill_core.errors import DataError

FRAMES = np.random.Generator(np.random.Philox(0)).standard_normal((6, 2, 16)).astype(np.float32)
LABELS = np.array([0, 2, 1, 1, 0, 2])


def recorded(folder, **arrays):
    path = folder / "frames.safetensors"
    save_file({"iq": FRAMES, "class_label": LABELS, **arrays}, path)
    return {"name": "signals", "path": str(path), "class_names": ["am", "fm", "ssb"]}


def test_frames_come_as_they_were_recorded_with_their_labels_and_further_numbers(tmp_path):
    source = build_source(recorded(tmp_path, snr=np.arange(6)))
    items = source.all()
    assert np.array_equal(items.columns["iq"].numpy(), FRAMES)
    assert items.columns["class_label"].tolist() == LABELS.tolist()
    assert items.columns["snr"].tolist() == [0, 1, 2, 3, 4, 5]
    assert source.class_names == ("am", "fm", "ssb")


def broken():
    wrong = FRAMES.copy()
    wrong[4, 1, 3] = np.nan
    return wrong


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"iq": broken()}, "iq of frame 4 holds NaN or infinity; repair or remove it"),
        ({"snr": np.array([1, 2, np.inf, 4, 5, 6])}, "snr of frame 2 holds NaN or infinity"),
        ({"iq": FRAMES[:, :1]}, r"iq has the shape \(6, 1, 16\); frames are \(N, 2, L\)"),
        ({"class_label": LABELS + 1}, "label 3 of item 1 is out of range 0 to 2"),
        ({"class_label": LABELS[:4]}, "class_label holds int64 of the shape"),
        ({"snr": FRAMES[:, 0]}, "beside iq there is one number a frame"),
    ],
)
def test_frames_that_cannot_be_used_are_refused_by_name(arrays, said, tmp_path):
    with pytest.raises(DataError, match=said):
        build_source(recorded(tmp_path, **arrays))


def test_files_of_another_kind_are_refused(tmp_path):
    table = recorded(tmp_path)
    save_file({"class_label": LABELS}, tmp_path / "frames.safetensors")
    with pytest.raises(DataError, match="has class_label, and iq is missing"):
        build_source(table)
    (tmp_path / "frames.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DataError, match="damaged or not safetensors"):
        build_source(table)
    (tmp_path / "frames.csv").write_text("1, 2")
    with pytest.raises(DataError, match=r"frames.csv is no .safetensors file"):
        build_source({**table, "path": str(tmp_path / "frames.csv")})
