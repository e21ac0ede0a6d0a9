"""Prompts from tables and from captions beside pictures."""

import json

import pytest
import torch
from PIL import Image

from distill_core.data import build_source, prompts
from distill_core.errors import ConfigError, DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b", "c"):
        Image.new("RGB", (8, 8), (10, 20, 30)).save(tmp_path / f"{name}.png")
    return tmp_path


def images(path, **options):
    return build_source({"name": "images", "path": str(path), **options})


def caption(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


def table(path, columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


def lengths(prompts):
    return {"prompt_embeds": torch.tensor([[len(prompt)] for prompt in prompts])}


def test_a_text_file_beside_each_picture_is_its_caption(folder):
    caption(folder, a="a cat\n", b="ein Würfel,\n rot", c="dog")
    source = images(folder)
    assert source.prompts == ["a cat", "ein Würfel, rot", "dog"]
    source.encode_with(lengths)
    batch = source.all()
    assert batch.x0.shape == (3, 3, 8, 8)
    assert batch.cond["prompt_embeds"].flatten().tolist() == [5, 15, 3]


def test_pictures_may_have_labels_and_captions_and_are_conditioned_on_what_was_asked_for(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / label / "1.png")
        caption(tmp_path / label, **{"1": f"a {label}"})
    source = images(tmp_path)
    assert (source.class_names, source.prompts) == (("cat", "dog"), ["a cat", "a dog"])
    assert source.all().cond.keys() == {"class_label"}
    source.encode_with(lengths)
    assert source.all().cond.keys() == {"prompt_embeds"}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_metadata_file_gives_the_captions_of_its_folder(folder, kind):
    (folder / "sub").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "sub" / "d.png")
    rows = [("sub/d.png", "last, not least"), ("b.png", "two"), ("a.png", "one"), ("./c.png", "three")]
    if kind == "jsonl":
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    else:
        lines = ["file_name,text", *(f'{name},"{text}"' for name, text in rows)]
    (folder / f"metadata.{kind}").write_text("\n".join(lines), encoding="utf-8")
    source = images(folder, labels="none")
    assert source.prompts == ["one", "two", "three", "last, not least"]
    assert images(folder, labels="none", limit=2).prompts == ["one", "three"]


def test_metadata_without_captions_and_other_text_files_are_no_captions(folder):
    (folder / "metadata.csv").write_text("file_name,score\na.png,1\n")
    (folder / "notes.txt").write_text("hello")
    assert images(folder).prompts is None


def test_a_picture_without_a_caption_among_others_is_named_unless_captions_are_off(folder):
    caption(folder, a="one", c="three")
    with pytest.raises(DataError, match=r"b\.png .* has no caption .* write b\.txt") as caught:
        images(folder)
    assert caught.value.field == "data.captions"
    assert images(folder, captions="none").prompts is None


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", "x" * 20_000, "not a text file of at most"),
        ("a.txt", "x" * 5000, "item 0 of the captions .* longer than 4096"),
        ("a.txt", " \n", "item 0 of the captions .* is empty"),
        ("metadata.jsonl", "{", "cannot be read as jsonl"),
        ("metadata.jsonl", '{"text": "a"}', "row 1 of .* has no file_name"),
        ("metadata.jsonl", '"a"', "row 1 of .* has no file_name"),
        ("metadata.csv", 'file_name,text\na.png,"x', "cannot be read as csv"),
        ("metadata.csv", "file_name,text\na.png\nb.png,x\nc.png,y\n", "item 0 of the captions .* is empty"),
    ],
)
def test_captions_that_cannot_be_used_are_refused(folder, name, content, sentence):
    caption(folder, b="two", c="three")
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=sentence):
        images(folder)


def test_a_metadata_file_has_a_limit(folder, monkeypatch):
    monkeypatch.setattr(prompts, "MAX_PROMPT_FILE", 10)
    (folder / "metadata.csv").write_text("file_name,text\na.png,one\n")
    with pytest.raises(DataError, match="at most 10 bytes"):
        images(folder)


@pytest.mark.parametrize("options", [{}, {"column": "caption"}])
def test_prompts_come_from_a_column_of_a_table_without_its_pictures(tmp_path, options):
    path = table(tmp_path / "x.parquet", {"image": [b"no picture"] * 2, "caption": ["a cat ", "a dog"]})
    source = build_source({"name": "prompts", "path": path, **options})
    assert (source.prompts, source.shape) == (["a cat", "a dog"], None)
    in_folder = build_source({"name": "prompts", "path": str(tmp_path)})
    assert in_folder.prompts == source.prompts


def test_a_table_gives_pictures_labels_and_prompts(tmp_path):
    rows = [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    path = table(tmp_path / "x.parquet", {"image": rows, "label": [1, 0], "text": ["one", "two"]})
    source = build_source({"name": "huggingface", "path": path})
    assert (source.shape, source.prompts, source.num_classes) == ((1, 2, 2), ["one", "two"], 2)
    assert build_source({"name": "huggingface", "path": path, "prompt_column": ""}).prompts is None


@pytest.mark.parametrize(
    ("columns", "options", "error", "sentence"),
    [
        ({"a": ["x"]}, {}, DataError, "no column of a is known to hold prompts; set data.column"),
        ({"a": ["x"]}, {"column": "b"}, ConfigError, "no column 'b'; known: a"),
        ({"text": [1]}, {"column": "text"}, DataError, "column text holds int64; a prompt is text"),
        ({"text": ["x", None]}, {}, DataError, "item 1 of column text .* is empty"),
        ({"text": ["x", " "]}, {}, DataError, "item 1 of column text .* is empty"),
        ({"text": ["x" * 5000]}, {}, DataError, "item 0 of column text .* longer than 4096"),
    ],
)
def test_a_table_without_usable_prompts_is_refused(tmp_path, columns, options, error, sentence):
    path = table(tmp_path / "x.parquet", columns)
    with pytest.raises(error, match=sentence):
        build_source({"name": "prompts", "path": path, **options})


def test_a_column_of_empty_captions_can_be_left_out(tmp_path):
    path = table(tmp_path / "x.parquet", {"image": [[[0, 1]], [[2, 3]]], "text": ["one", None]})
    with pytest.raises(DataError, match="set data.prompt_column = ''"):
        build_source({"name": "huggingface", "path": path})
    assert build_source({"name": "huggingface", "path": path, "prompt_column": ""}).size == 2


def test_data_without_prompts_cannot_be_encoded():
    with pytest.raises(DataError, match="no prompts to encode"):
        build_source({"name": "digits"}).encode_with(lengths)
