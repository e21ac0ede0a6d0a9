"""Data sets that methods make: bit for bit the same when they are opened again, and plain parquet for others."""

from __future__ import annotations

import json

import datasets
import pyarrow.parquet
import pytest
import torch

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.data import build_source, pictures
from distill_core.data.item_set import CONFIG, TABLE, ItemSet, load_item_set
from distill_core.errors import ArtifactError, ConfigError
from distill_core.kinds import find_kind
from distill_core.kinds.cards import described, facts
from distill_core.kinds.loading import StoreModels, kind_of, load_model

COUNT = 7
NAMES = ("ant", "bee", "cow")


def item_set(channels: int = 3, *, on_bytes: bool = True, **columns) -> ItemSet:
    generator = torch.Generator().manual_seed(3)
    levels = torch.randint(0, 256, (COUNT, channels, 6, 9), generator=generator, dtype=torch.uint8)
    x0 = levels.float() / 127.5 - 1
    return ItemSet(
        x0 if on_bytes else 1.3 * x0 + 0.01,
        labels=torch.tensor([2, 0, 1, 1, 0, 2, 2]),
        class_names=NAMES,
        **columns,
    )


ARRAYS = {
    "logits": torch.randn(COUNT, 3, generator=torch.Generator().manual_seed(1)),
    "half": torch.linspace(-3, 7, COUNT * 2).reshape(COUNT, 2).half(),
    "weight": torch.linspace(-3, 7, COUNT, dtype=torch.float64),
    "mask": torch.arange(COUNT * 54).reshape(COUNT, 6, 9) % 5 == 0,
    "volume": torch.arange(COUNT * 24, dtype=torch.uint8).reshape(COUNT, 2, 3, 4),
    "number": torch.arange(COUNT, dtype=torch.int32) - 3,
}


@pytest.mark.parametrize(
    ("channels", "on_bytes", "kept"),
    [(3, True, "png"), (1, True, "png"), (3, False, "float32"), (5, True, "float32")],
)
def test_what_is_saved_is_opened_the_same_to_the_bit(channels, on_bytes, kept, tmp_path):
    made = item_set(channels, on_bytes=on_bytes, arrays=ARRAYS, prompts=[f"a {n}" for n in range(COUNT)])
    made.save(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["pictures"] == kept
    again = load_item_set(tmp_path)
    every = torch.arange(COUNT)
    assert torch.equal(again.pixels.take(every), made.pixels.take(every))
    assert torch.equal(again.labels, made.labels)
    assert (again.class_names, again.prompts, again.size) == (NAMES, made.prompts, COUNT)
    assert again.card() == made.card()
    for name, value in ARRAYS.items():
        assert torch.equal(again.arrays[name], value), name
        assert again.arrays[name].dtype == value.dtype


def test_pictures_that_do_not_fit_into_memory_are_decoded_when_asked_for(tmp_path, monkeypatch):
    made = item_set()
    made.save(tmp_path)
    monkeypatch.setattr(pictures, "IN_MEMORY_BYTES", 0)
    index = torch.tensor([5, 1, 5])
    assert torch.equal(load_item_set(tmp_path).pixels.take(index), made.pixels.take(index))


def test_datasets_reads_the_file_by_itself(tmp_path):
    made = item_set(arrays={"logits": ARRAYS["logits"], "mask": ARRAYS["mask"]}, prompts=["x"] * COUNT)
    made.save(tmp_path / "set")
    file = str(tmp_path / "set" / TABLE)
    rows = datasets.load_dataset("parquet", data_files=file, cache_dir=str(tmp_path / "cache"))["train"]
    assert isinstance(rows.features["image"], datasets.Image)
    assert rows.features["label"].names == list(NAMES)
    assert rows["label"][:] == made.labels.tolist()
    picture = torch.tensor(list(rows[4]["image"].tobytes())).reshape(6, 9, 3).permute(2, 0, 1)
    assert torch.equal(picture.float() / 127.5 - 1, made.pixels.take(torch.tensor([4]))[0])
    logits = torch.tensor(rows.with_format("numpy")["logits"][:])
    assert torch.equal(logits, ARRAYS["logits"])
    assert rows[3]["mask"] == ARRAYS["mask"][3].tolist()


def test_our_own_reader_of_hugging_face_data_reads_it_too(tmp_path):
    made = item_set()
    made.save(tmp_path)
    source = build_source({"name": "huggingface", "path": str(tmp_path / TABLE)})
    assert torch.equal(source.all().x0, made.pixels.take(torch.arange(COUNT)))
    assert (source.labels.tolist(), source.class_names) == (made.labels.tolist(), NAMES)


def test_its_kind_recognises_shows_and_describes_it(tmp_path):
    item_set(arrays={"logits": ARRAYS["logits"]}).save(tmp_path)
    assert kind_of(tmp_path).name == "dataset"
    model = load_model(tmp_path)
    said = described(model)
    assert said["signature"].functions == {}
    told = facts(Manifest(name="x", **said))
    assert (told["items"], told["classes"]) == (7, 3)
    assert "logits float32 (3)" in told["columns"]
    shown = find_kind("dataset").preview(model, None, 0, {})
    assert torch.equal(shown, model.pixels.take(torch.tensor([1, 4, 2, 3, 0, 5, 6])))  # class by class
    eight = ItemSet(torch.zeros(230, 5, 6, 9))
    assert find_kind("dataset").preview(eight, None, 0, {}).shape == (100, 1, 6, 9)
    assert find_kind("dataset").preview(ItemSet(arrays=ARRAYS), None, 0, {}) is None


@pytest.fixture
def store(tmp_path):
    store = ArtifactStore(tmp_path / "store")
    made = item_set(arrays={"logits": ARRAYS["logits"]})
    made.save(tmp_path / "set")
    store.publish(tmp_path / "set", Manifest(name="made", **described(made)))
    return store


def opened(store, tmp_path, **table):
    folders = StoreModels(store, tmp_path / "cache")
    return build_source({"name": "artifact", **table}, folders=folders)


def test_a_published_set_is_a_source_with_all_its_columns_order_and_view(store, tmp_path):
    table = {"order": {"kind": "static", "share": 0.6}, "view": {"flip": True}}
    source = opened(store, tmp_path, ref="made@1", rename_classes={"bee": "wasp"}, **table)
    assert source.columns.keys() == {"x0", "class_label", "logits"}
    assert (source.class_names, source.order.epoch) == (("ant", "wasp", "cow"), 4)
    batch = source.batch(4, epoch_seed=1, position=2)
    assert torch.equal(batch.columns["logits"], ARRAYS["logits"][batch.index])
    assert batch.view.keys() == {"flip"}
    by_path = build_source({"name": "artifact", "path": source.config.path})
    assert by_path.fingerprint == source.fingerprint


def test_the_range_of_pictures_is_said_where_they_keep_it(tmp_path):
    for on_bytes, low in ((True, -1), (False, None)):
        item_set(on_bytes=on_bytes).save(tmp_path / str(on_bytes))
        source = build_source({"name": "artifact", "path": str(tmp_path / str(on_bytes))})
        assert source.columns["x0"].low == low


@pytest.mark.parametrize(
    ("table", "field", "said"),
    [
        ({}, "data", "give exactly one of ref, recipe, path"),
        ({"ref": "made", "path": "/x"}, "data", "give exactly one of ref, recipe, path"),
        ({"reff": "made"}, "data.reff", "did you mean 'ref'"),
        ({"ref": "mad@1"}, "model", "did you mean 'made'"),
        ({"ref": "made@2"}, "version", "made has no version 2"),
        ({"path": "/absent/folder"}, "data.path", "does not exist"),
        ({"ref": "made", "rename_classes": {"be": "b"}}, "data.rename_classes", "did you mean 'bee'"),
    ],
)
def test_a_wrong_table_is_refused_in_a_sentence(table, field, said, store, tmp_path):
    with pytest.raises(Exception, match=said) as caught:
        opened(store, tmp_path, **table)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("table", "field"), [({"ref": "made"}, "data.ref"), ({"recipe": "kd"}, "data.recipe")]
)
def test_without_a_store_a_reference_is_refused_in_a_sentence(table, field):
    with pytest.raises(ConfigError, match="give data.path, the folder of a version") as caught:
        build_source({"name": "artifact", **table})
    assert caught.value.field == field


def test_a_model_of_another_kind_is_no_data(store, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / CONFIG).write_text('{"kind": "predictor"}')
    store.publish(tmp_path / "other", Manifest(name="other", kind="predictor"))
    with pytest.raises(
        ArtifactError, match="data.ref = 'other@1' cannot be used: .*kind 'predictor'"
    ) as caught:
        opened(store, tmp_path, ref="other@1")
    assert caught.value.field == "data.ref"


def rewritten(folder, change) -> None:
    table = pyarrow.parquet.read_table(folder / TABLE)
    pyarrow.parquet.write_table(change(table), folder / TABLE)


DAMAGE = {
    "has 6 rows, and config.json says 7": lambda table: table.slice(0, 6),
    "has no column logits; it has image, label": lambda table: table.drop_columns(["logits"]),
    "column label holds 7 values of int32": lambda table: table.set_column(
        1, "label", table["label"].cast("int32")
    ),
    "column logits of a data set holds NaN": lambda table: table.set_column(
        2, "logits", pyarrow.array([[float("nan")] * 3] * 7, pyarrow.list_(pyarrow.float32(), 3))
    ),
    "column logits is empty in 7 rows": lambda table: table.set_column(
        2, "logits", pyarrow.nulls(7, pyarrow.list_(pyarrow.float32(), 3))
    ),
    "labels are 0 to 2": lambda table: table.set_column(1, "label", pyarrow.array([3] * 7, pyarrow.int64())),
    "picture 0 of data.parquet": lambda table: table.set_column(
        0, "image", pyarrow.array([{"bytes": b"x", "path": None}] * 7)
    ),
}


@pytest.mark.parametrize("said", DAMAGE)
def test_a_damaged_table_is_refused_in_a_sentence(said, tmp_path):
    item_set(arrays={"logits": ARRAYS["logits"]}).save(tmp_path)
    rewritten(tmp_path, DAMAGE[said])
    with pytest.raises(ArtifactError, match=f"does not hold a data set: .*{said}"):
        load_item_set(tmp_path)


def test_damaged_files_are_refused_in_a_sentence(tmp_path):
    item_set().save(tmp_path)
    whole = (tmp_path / TABLE).read_bytes()
    (tmp_path / TABLE).write_bytes(whole[: len(whole) // 3])
    with pytest.raises(ArtifactError, match="does not hold a data set"):
        load_item_set(tmp_path)
    (tmp_path / TABLE).unlink()
    with pytest.raises(ArtifactError, match="it lacks config.json or data.parquet"):
        load_item_set(tmp_path)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"labels": torch.tensor([1, 0])}, "x0 3, class_label 2"),
        ({"labels": torch.tensor([1, 0, 2]), "class_names": ("a", "b")}, "labels are 0 to 1"),
        ({"arrays": {"v": torch.ones(2)}}, "x0 3, v 2"),
        (
            {"arrays": {"v": torch.tensor([1, 2, float("inf")])}},
            "column v of a data set holds NaN or infinity",
        ),
    ],
)
def test_columns_that_do_not_belong_together_are_refused(columns, said):
    with pytest.raises(ConfigError, match=said):
        ItemSet(torch.zeros(3, 1, 6, 9), **columns)


def test_a_data_set_without_items_is_refused():
    for columns in ({"pixels": torch.zeros(0, 1, 6, 9), "labels": torch.zeros(0, dtype=torch.long)}, {}):
        with pytest.raises(ConfigError, match="one number of items, above 0"):
            ItemSet(**columns)


@pytest.mark.parametrize("name", ["image", "label", "class_label"])
def test_a_column_cannot_take_the_place_of_pictures_or_labels(name, tmp_path):
    with pytest.raises(ConfigError, match=f"a data set's own {name} is no further column"):
        ItemSet(torch.zeros(3, 1, 6, 9), arrays={name: torch.ones(3)}).save(tmp_path)
