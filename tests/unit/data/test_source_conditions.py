import pytest
import torch

from distill_core.data import build_source
from distill_core.errors import ConfigError, DataError


def test_classes_come_equally_often_and_without_pictures():
    source = build_source({"name": "classes", "num_classes": 5})
    batch = source.batch(10, epoch_seed=0, position=0)
    assert batch.x0 is None
    assert source.shape is None
    assert sorted(batch.cond["class_label"].tolist()) == sorted([0, 1, 2, 3, 4] * 2)
    assert source.class_frequencies().tolist() == [0.2] * 5


def test_prompts_come_in_order_of_the_stream_with_their_embeddings(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cat\n\nein Würfel\n", encoding="utf-8")
    from_file = build_source({"name": "prompts", "path": str(tmp_path / "prompts.txt")})
    inline = build_source({"name": "prompts", "prompts": ["a red cat", "ein Würfel"]})
    assert from_file.prompts == inline.prompts == ["a red cat", "ein Würfel"]
    assert inline.batch(4, epoch_seed=0, position=0).cond == {}
    inline.encode_with(lambda prompts: {"prompt_embeds": torch.tensor([[len(prompt)] for prompt in prompts])})
    batch = inline.batch(4, epoch_seed=0, position=0)
    assert (batch.size, batch.x0) == (4, None)
    assert sorted(batch.cond["prompt_embeds"].flatten().tolist()) == [9, 9, 10, 10]


@pytest.mark.parametrize("values", [{"prompts": []}, {"prompts": ()}])
def test_an_empty_prompt_list_is_refused(values):
    with pytest.raises(DataError, match="holds no prompt") as caught:
        build_source({"name": "prompts", **values})
    assert caught.value.field == "data.prompts"


def test_an_empty_prompt_file_is_refused(tmp_path):
    (tmp_path / "p.txt").write_text("\n \n")
    with pytest.raises(DataError, match="holds no prompt"):
        build_source({"name": "prompts", "path": str(tmp_path / "p.txt")})


@pytest.mark.parametrize("values", [{}, {"path": "p.txt", "prompts": ["a"]}])
def test_prompts_come_from_one_place(values):
    with pytest.raises(ConfigError, match="exactly one of path"):
        build_source({"name": "prompts", **values})


def test_a_prompt_that_is_too_long_or_empty_is_refused(tmp_path):
    (tmp_path / "p.txt").write_text("fine\n" + "x" * 5000)
    with pytest.raises(DataError, match="line 2 of .* is longer than 4096"):
        build_source({"name": "prompts", "path": str(tmp_path / "p.txt")})
    with pytest.raises(ConfigError):
        build_source({"name": "prompts", "prompts": [""]})


def test_a_prompt_file_must_be_text(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        build_source({"name": "prompts", "path": str(tmp_path / "p.txt")})
    with pytest.raises(DataError, match=r"holds no \.parquet or \.arrow file"):
        build_source({"name": "prompts", "path": str(tmp_path)})
