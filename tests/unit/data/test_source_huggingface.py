from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill_core.data import build_source
from distill_core.errors import ConfigError, DataError

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

CIFAR10 = Path(__file__).parents[3].parent / "shared" / "data" / "cifar10"
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def png(array):
    stream = BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def labelled(names=("cat", "dog")):
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=list(names))}
    )
    rows = {"picture": [Image.fromarray(image) for image in IMAGES], "kind": [0, 1, 0, 1, 0, 1]}
    return datasets.Dataset.from_dict(rows, features=features)


def read(path, **options):
    return build_source({"name": "huggingface", "path": str(path), **options})


def write(path, columns):
    pq.write_table(pa.table(columns), path)
    return path


def expected():
    return torch.from_numpy(IMAGES.transpose(0, 3, 1, 2)).float() / 127.5 - 1


def test_typed_columns_are_found_whatever_their_name(tmp_path):
    labelled().to_parquet(tmp_path / "x.parquet")
    source = read(tmp_path / "x.parquet")
    assert (source.shape, source.class_names, source.size) == ((3, 8, 8), ("cat", "dog"), 6)
    assert torch.equal(source.all().x0, expected())
    assert source.all().cond["class_label"].tolist() == [0, 1, 0, 1, 0, 1]


def test_a_folder_that_was_saved_to_disk_is_read(tmp_path):
    datasets.DatasetDict({"train": labelled(), "test": labelled().select(range(2))}).save_to_disk(
        tmp_path / "d"
    )
    labelled().save_to_disk(tmp_path / "single")
    assert torch.equal(read(tmp_path / "d").all().x0, expected())
    assert read(tmp_path / "d", split="test").size == 2
    assert read(tmp_path / "single").size == 6
    with pytest.raises(ConfigError, match="did you mean 'train'") as caught:
        read(tmp_path / "d", split="trian")
    assert caught.value.field == "data.split"


def test_the_split_is_in_the_file_names(tmp_path):
    labelled().to_parquet(tmp_path / "train-00000-of-00001.parquet")
    labelled().select(range(3)).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    assert read(tmp_path).size == 6
    assert read(tmp_path, split="test").size == 3
    with pytest.raises(ConfigError, match="no split"):
        read(tmp_path, split="validation")


def test_plain_bytes_and_names_as_labels_are_understood(tmp_path):
    table = {"image": [png(image) for image in IMAGES], "label": ["b", "a", "b", "a", "c", "c"]}
    source = read(write(tmp_path / "x.parquet", table))
    assert torch.equal(source.all().x0, expected())
    assert source.class_names == ("a", "b", "c")
    assert source.labels.tolist() == [1, 0, 1, 0, 2, 2]


def test_arrow_files_with_nested_numbers_are_understood(tmp_path):
    rows = {"image": IMAGES[..., 0].tolist(), "label": [0, 1, 2, 0, 1, 2]}
    table = pa.table(
        {"image": pa.array(rows["image"], pa.list_(pa.list_(pa.uint8()))), "label": rows["label"]}
    )
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    source = read(tmp_path / "x.arrow")
    assert (source.shape, source.num_classes) == ((1, 8, 8), 3)
    assert torch.equal(source.all().x0, expected()[:, :1])


def test_limit_size_and_absent_labels(tmp_path):
    labelled().to_parquet(tmp_path / "x.parquet")
    source = read(tmp_path / "x.parquet", limit=4, size=4, channels=1, label_column="")
    assert (source.size, source.shape, source.num_classes) == (4, (1, 4, 4), None)


@pytest.mark.parametrize("option", ["image_column", "label_column"])
def test_an_unknown_column_names_the_nearest(tmp_path, option):
    labelled().to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match="did you mean") as caught:
        read(tmp_path / "x.parquet", **{option: "pictur" if option == "image_column" else "kin"})
    assert caught.value.field == f"data.{option}"


def test_a_table_without_pictures_lists_its_columns(tmp_path):
    with pytest.raises(DataError, match="no column of a, b") as caught:
        read(write(tmp_path / "x.parquet", {"a": [1], "b": [2]}))
    assert caught.value.field == "data.image_column"


def test_text_is_no_picture(tmp_path):
    with pytest.raises(DataError, match="a column of pictures holds encoded bytes"):
        read(write(tmp_path / "x.parquet", {"image": ["a", "b"]}))


def test_arrays_of_several_sizes_are_refused(tmp_path):
    with pytest.raises(DataError, match="arrays of several sizes"):
        read(write(tmp_path / "x.parquet", {"image": [[[1, 2]], [[1, 2], [3, 4]]]}))


def test_nan_is_refused_with_its_item(tmp_path):
    with pytest.raises(DataError, match="NaN or infinity in item 1"):
        read(write(tmp_path / "x.parquet", {"image": [[[0.1, 0.2]], [[float("nan"), 0.2]]]}))


def test_a_damaged_picture_is_named_by_its_row(tmp_path):
    encoded = [png(image) for image in IMAGES]
    encoded[4] = encoded[4][:60]
    with pytest.raises(DataError, match="picture 4 of column image"):
        read(write(tmp_path / "x.parquet", {"image": encoded}))


def test_a_picture_given_as_a_path_is_refused(tmp_path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "secret.png")
    with pytest.raises(DataError, match="only a path"):
        read(
            write(tmp_path / "x.parquet", {"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}]})
        )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, -1, 0, 0, 0], "label -1 of item 2 is out of range"),
        ([0.5, 1, 2, 0, 0, 0], "a label is one whole number"),
        ([0, 1, None, 0, 0, 0], "a label is one whole number"),
    ],
)
def test_labels_that_are_no_class_are_refused(tmp_path, labels, message):
    table = {"image": [png(image) for image in IMAGES], "label": labels}
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "x.parquet", table))


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("content", [b"", b"hello", b"PAR1" + bytes(50) + b"PAR1"])
def test_a_damaged_file_is_named(tmp_path, suffix, content):
    (tmp_path / f"x.{suffix}").write_bytes(content)
    with pytest.raises(DataError, match=rf"x\.{suffix} cannot be read as a data set"):
        read(tmp_path / f"x.{suffix}")


def test_a_truncated_parquet_file_is_named(tmp_path):
    labelled().to_parquet(tmp_path / "x.parquet")
    data = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="cannot be read as a data set"):
        read(tmp_path / "x.parquet")


def test_an_empty_or_foreign_folder_says_what_it_should_hold(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"holds no \.parquet or \.arrow file"):
        read(tmp_path)


def test_a_table_without_rows_is_refused(tmp_path):
    with pytest.raises(DataError, match="is empty"):
        read(write(tmp_path / "x.parquet", {"image": pa.array([], pa.binary())}))


@pytest.mark.skipif(
    not CIFAR10.is_dir(), reason=f"real data absent: {CIFAR10.name} is not beside the repository"
)
def test_real_cifar10_is_read_as_it_lies():
    source = read(CIFAR10, split="test", limit=500)
    batch = source.batch(32, epoch_seed=0, position=0)
    assert (source.shape, source.size) == ((3, 32, 32), 500)
    assert source.class_names[:2] == ("airplane", "automobile")
    assert batch.x0.shape == (32, 3, 32, 32)
    assert 0.1 < batch.x0.std() < 1
    assert (source.class_frequencies() > 0.05).all()
