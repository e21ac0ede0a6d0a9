import gzip
import struct

import numpy as np
import pytest
import torch

from distill_core.data import build_source
from distill_core.errors import DataError

CODES = {"uint8": 0x08, "int8": 0x09, "float32": 0x0D, "float64": 0x0E}


def idx_bytes(array):
    header = struct.pack(">BBBB", 0, 0, CODES[array.dtype.name], array.ndim) + struct.pack(
        f">{array.ndim}I", *array.shape
    )
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.fixture
def array():
    return np.random.default_rng(0).integers(0, 256, (12, 5, 6), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, array):
    labels = np.arange(12, dtype=np.uint8) % 4
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(array)))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels)))
    (tmp_path / "t10k-images.idx3-ubyte").write_bytes(idx_bytes(array[:3]))
    return tmp_path


def idx(path, **options):
    return build_source({"name": "idx", "path": str(path), **options})


def test_a_folder_with_the_usual_names_gives_pictures_and_labels(folder, array):
    source = idx(folder)
    batch = source.all()
    assert (source.shape, source.num_classes, source.size) == ((1, 5, 6), 4, 12)
    assert torch.allclose(batch.x0[:, 0], torch.from_numpy(array).float() / 127.5 - 1)
    assert batch.cond["class_label"].tolist() == [0, 1, 2, 3] * 3


def test_the_test_split_may_be_plain_and_without_labels(folder):
    source = idx(folder, split="test")
    assert (source.size, source.num_classes) == (3, None)


def test_floats_span_zero_to_one_unless_a_range_is_given(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(idx_bytes(np.array([[[-1.0, 0.0], [0.5, 1.0]]], dtype=np.float32)))
    with pytest.raises(DataError, match="not within 0 to 1") as caught:
        idx(file)
    assert caught.value.field == "data.value_range"
    assert idx(file, value_range=[-1, 1]).all().x0.flatten().tolist() == [-1.0, 0.0, 0.5, 1.0]


def test_nan_is_refused_with_its_item(tmp_path):
    values = np.zeros((3, 2, 2), dtype=np.float64)
    values[2, 0, 1] = np.nan
    file = tmp_path / "x"
    file.write_bytes(idx_bytes(values))
    with pytest.raises(DataError, match="NaN or infinity in item 2"):
        idx(file)


@pytest.mark.parametrize("cut", [0, 3, 7, 30])
def test_a_truncated_file_is_named(tmp_path, array, cut):
    file = tmp_path / "short"
    file.write_bytes(idx_bytes(array)[:cut])
    with pytest.raises(DataError, match="short is (truncated|not an IDX file)"):
        idx(file)


def test_bytes_too_many_are_refused(tmp_path, array):
    file = tmp_path / "long"
    file.write_bytes(idx_bytes(array) + b"x")
    with pytest.raises(DataError, match="too long"):
        idx(file)


def test_a_bad_magic_number_is_shown(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"PK\x03\x04" + bytes(20))
    with pytest.raises(DataError, match="not an IDX file: it begins with 504b0304"):
        idx(file)


def test_a_damaged_gzip_is_named(folder):
    file = folder / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(DataError, match="train-images-idx3-ubyte"):
        idx(folder)


def test_a_header_that_claims_too_much_is_refused(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(struct.pack(">BBBBIII", 0, 0, 8, 3, 2**31, 2**10, 2**10))
    with pytest.raises(DataError, match="at most"):
        idx(file)


def test_signed_pictures_are_the_wrong_type(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(idx_bytes(np.zeros((2, 3, 3), dtype=np.int8)))
    with pytest.raises(DataError, match="int8"):
        idx(file)


def test_labels_out_of_range_are_named(folder):
    with pytest.raises(DataError, match="label 3 of item 3 is out of range 0 to 2") as caught:
        idx(folder, num_classes=3)
    assert caught.value.field == "data.num_classes"


def test_labels_of_another_count_are_refused(folder, tmp_path):
    labels = tmp_path / "labels"
    labels.write_bytes(idx_bytes(np.zeros(5, dtype=np.uint8)))
    with pytest.raises(DataError, match="5 labels for 12 pictures"):
        idx(folder, labels=str(labels))


def test_float_labels_are_the_wrong_type(folder, tmp_path):
    labels = tmp_path / "labels"
    labels.write_bytes(idx_bytes(np.zeros(12, dtype=np.float32)))
    with pytest.raises(DataError, match="a label is one whole number"):
        idx(folder, labels=str(labels))


def test_a_folder_without_idx_files_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"holds no train-images\* file"):
        idx(tmp_path)
