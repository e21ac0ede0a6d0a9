"""Values by item: they belong to the items of one data set, and to no other."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from distill_core.data import build_source
from distill_core.data.augmentation import ViewConfig
from distill_core.data.item_store import HEADER, ItemStore, Origin
from distill_core.errors import DataError
from distill_core.signature import TensorSpec

PROBS = {"probs": TensorSpec(dtype="float16", shape=(3,))}


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(5)
    for number in range(7):
        file = tmp_path / "pictures" / ("cat" if number < 3 else "dog") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (6, 9, 3), dtype=np.uint8)).save(file)
    return tmp_path / "pictures"


def images(folder, **options):
    return build_source({"name": "images", "path": str(folder), **options})


def test_the_fingerprint_is_of_items_and_preprocessing_and_not_of_place_names_order_or_view(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "b")
    (tmp_path / "b" / "README.md").write_text("words")
    first = images(folder).fingerprint
    views = {"order": {"kind": "per_class"}, "view": {"flip": True}, "rename_classes": {"cat": "tabby"}}
    assert images(tmp_path / "b", **views).fingerprint == first
    found = {first, images(folder, size=5).fingerprint, images(folder, channels=1).fingerprint}
    found.add(images(folder, limit=4).fingerprint)
    (tmp_path / "b" / "cat" / "0.png").rename(tmp_path / "b" / "cat" / "00.png")
    found.add(images(tmp_path / "b").fingerprint)
    Image.new("RGB", (9, 6)).save(folder / "cat" / "0.png")
    found.add(images(folder).fingerprint)
    assert len(found) == 6


def test_data_without_files_have_a_fingerprint_of_what_they_hold():
    tables = [
        {"name": "digits"},
        {"name": "digits", "split": "test"},
        {"name": "shapes", "count": 30},
        {"name": "shapes", "count": 30, "seed": 4},
        {"name": "prompts", "prompts": ["a cat"]},
        {"name": "classes", "num_classes": 3},
    ]
    found = [build_source(table).fingerprint for table in tables]
    assert len(set(found)) == len(found)
    assert [build_source(table).fingerprint for table in tables] == found


def test_a_memory_gives_back_what_was_put_for_an_item_and_survives_on_disk(folder, tmp_path):
    source = images(folder)
    memory = ItemStore.blank(source, PROBS, teacher="x@2", temperature=3.5)
    memory.put(torch.tensor([6, 1]), probs=torch.tensor([[0.25, 0.5, 0.25], [1.0, 0.0, 0.0]]))
    memory.save(tmp_path / "memory.safetensors")
    again = ItemStore.open(str(tmp_path / "memory.safetensors"), source)
    assert again.origin == memory.origin
    assert (again.origin.teacher, again.origin.temperature, len(again)) == ("x@2", 3.5, 7)
    assert again.at(torch.tensor([1, 2, 6]))["probs"].tolist() == [[1, 0, 0], [0, 0, 0], [0.25, 0.5, 0.25]]
    assert again.values["probs"].dtype == torch.float16
    assert not list(tmp_path.glob("*.tmp"))


def test_stored_views_replay_the_batches_that_they_were_stored_of(folder, tmp_path):
    table = {"crop_scale": 0.4, "shift": 2, "flip": True}
    source = images(folder, view=table)
    batches = [source.batch(5, epoch_seed=3, position=position) for position in range(3)]
    names = batches[0].view.keys()
    store = ItemStore(
        Origin(
            fingerprint=source.fingerprint, size=source.size, transform=ViewConfig.parse(table), batch_size=5
        ),
        torch.cat([batch.index for batch in batches]),
        {"mean": torch.cat([batch.x0.mean((1, 2, 3)) for batch in batches])},
        {name: torch.cat([batch.view[name] for batch in batches]) for name in names},
    )
    store.save(tmp_path / "labels.safetensors")
    again = ItemStore.open(str(tmp_path / "labels.safetensors"), images(folder))
    for number, batch in enumerate(batches):
        stored = again.rows(5 * number, 5 * number + 5)
        seen = images(folder).viewed(stored.index, stored.view)
        assert torch.equal(seen.x0, batch.x0)
        assert torch.equal(stored.values["mean"], batch.x0.mean((1, 2, 3)))
    last = {int(index): row for row, index in enumerate(store.index.tolist())}
    index = torch.tensor(sorted(last))
    rows = torch.tensor([last[int(one)] for one in index])
    assert torch.equal(again.at(index)["mean"], store.values["mean"][rows])
    with pytest.raises(DataError, match="rows 12 to 16 were asked for, and 15 are stored"):
        again.rows(12, 16)


def test_values_of_other_data_are_refused(folder, tmp_path):
    ItemStore.blank(images(folder), PROBS).save(tmp_path / "memory.safetensors")
    with pytest.raises(DataError, match="made of other data .7 items there, 4 here.*make it again") as caught:
        ItemStore.open(str(tmp_path / "memory.safetensors"), images(folder, limit=4), field="config.labels")
    assert caught.value.field == "config.labels"


def test_an_item_without_a_row_is_said(folder):
    source = images(folder)
    origin = Origin(fingerprint=source.fingerprint, size=7)
    store = ItemStore(origin, torch.tensor([4, 2]), {"probs": torch.ones(2, 3)})
    for ask in (store.at, lambda index: store.put(index, probs=torch.ones(2, 3))):
        with pytest.raises(DataError, match="nothing is stored for item 5"):
            ask(torch.tensor([2, 5]))


DAMAGE = {
    "ids are 0 to 7, of 7 items": {"index": torch.tensor([0, 1, 2, 3, 4, 5, 7])},
    "ids are -1 to 5": {"index": torch.tensor([0, 1, 2, 3, 4, 5, -1])},
    r"its index is torch.int32 \(7,\)": {"index": torch.arange(7, dtype=torch.int32)},
    r"its index is torch.float32 \(0,\)": {"index": None},
    r"probs has the shape \(6, 3\), for 7 rows": {"probs": torch.ones(6, 3)},
    "it holds no values": {"probs": None},
    "no part 'flop'; did you mean 'flip'": {"view.flop": torch.ones(7, dtype=torch.bool)},
    r"view.flip has the shape \(3,\)": {"view.flip": torch.ones(3, dtype=torch.bool)},
    "flip is torch.int64": {"view.flip": torch.ones(7, dtype=torch.int64)},
    "crop of its row 2 leaves": {"view.crop": torch.tensor([[0.1, 0.2, 0.7, 0.7]] * 7)},
    "shifted by more than 64": {"view.shift": torch.full((7, 2), -65)},
}


@pytest.mark.parametrize("said", DAMAGE)
def test_a_file_that_does_not_hold_together_is_refused_in_a_sentence(said, folder, tmp_path):
    source, file = images(folder), tmp_path / "memory.safetensors"
    ItemStore.blank(source, PROBS).save(file)
    header = {HEADER: Origin(fingerprint=source.fingerprint, size=7).model_dump_json()}
    tensors = {**load_file(file), **DAMAGE[said]}
    if "view.crop" in tensors:
        tensors["view.crop"][2, 1] = 0.4
    save_file({name: value for name, value in tensors.items() if value is not None}, file, header)
    with pytest.raises(DataError, match=f"memory.safetensors cannot be used as values by item: .*{said}"):
        ItemStore.open(str(file), source)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temprature": 4}, "unknown key header.temprature; did you mean 'temperature'"),
        ({"temperature": -1}, "header.temperature = -1 is not allowed"),
        ({"size": 6}, "its ids are 0 to 6, of 6 items|says that its data have 6 items"),
        ({"order": {"kind": "replay"}}, "header.order.kind"),
    ],
)
def test_a_header_is_read_strictly(change, said, folder, tmp_path):
    source, file = images(folder), tmp_path / "memory.safetensors"
    ItemStore.blank(source, PROBS).save(file)
    origin = Origin(fingerprint=source.fingerprint, size=7).model_dump(mode="json")
    save_file(load_file(file), file, {HEADER: json.dumps({**origin, **change})})
    with pytest.raises(DataError, match=said):
        ItemStore.open(str(file), source)


def test_other_files_are_refused_in_a_sentence(folder, tmp_path):
    source = images(folder)
    save_file({"index": torch.arange(7)}, tmp_path / "plain.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "plain.safetensors").read_bytes()[:30])
    (tmp_path / "labels.pt").write_bytes(b"x")
    for name, said in {
        "plain": "no entry 'distillery'",
        "cut": "cannot be used as values by item",
        "absent": "does not exist",
    }.items():
        with pytest.raises(DataError, match=said):
            ItemStore.open(str(tmp_path / f"{name}.safetensors"), source)
    with pytest.raises(DataError, match="can execute code"):
        ItemStore.open(str(tmp_path / "labels.pt"), source)
