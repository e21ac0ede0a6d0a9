"""Text files that people write: what ends a line, and what may stand inside one."""

from __future__ import annotations

import hashlib
import json

import pytest
from PIL import Image

from distill_core.data import build_source
from distill_core.files.text import lines, read_text
from distill_core.recipe import load_recipe
from distill_core.training.run_folder import Run
from distill_service.auth import Tokens
from distill_service.settings import Settings
from distillery_cli.jobs.pipelines import read_pipeline

INSIDE = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]
MARK = "\ufeff".encode()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_line_ends_as_editors_end_it(end):
    assert lines(end.join(["a", "", " b "]) + end) == lines(end.join(["a", "", " b "])) == ["a", "", " b "]
    assert lines("") == []


@pytest.mark.parametrize("inside", INSIDE)
def test_other_separators_stand_inside_a_prompt(tmp_path, inside):
    file = tmp_path / "prompts.txt"
    file.write_bytes(MARK + f"a red{inside}cat\r\n\r\n \u3000\r\nein Würfel\r\n".encode() + MARK + b"dog")
    prompts = build_source({"name": "prompts", "path": str(file)}).prompts
    assert prompts == [f"a red{inside}cat", "ein Würfel", "dog"]


@pytest.mark.parametrize("inside", [*INSIDE, "  ", "\u3000"])
def test_a_caption_beside_a_picture_keeps_its_characters(tmp_path, inside):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(MARK + f" a red{inside}cat \r\n\r\non a mat\r\n".encode())
    assert build_source({"name": "images", "path": str(tmp_path)}).prompts == [f"a red{inside}cat on a mat"]


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85"])
def test_captions_of_metadata_keep_their_characters(tmp_path, inside):
    row = {"file_name": "a.png", "text": f"a red{inside}cat"}
    for name, text in (
        ("metadata.jsonl", json.dumps(row, ensure_ascii=False) + "\r\n\r\n"),
        ("metadata.csv", f'file_name,text\r\na.png,"a red{inside}cat"\r\n'),
    ):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        Image.new("L", (8, 8)).save(folder / "a.png")
        (folder / name).write_bytes(MARK + text.encode())
        assert build_source({"name": "images", "path": str(folder)}).prompts == [f"a red{inside}cat"]


def test_metrics_of_a_run_stay_whole_when_it_is_resumed(tmp_path):
    run = Run(tmp_path)
    told = [json.dumps({"step": step, "said": "a\u2028b"}, ensure_ascii=False) for step in (3, 7)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(told) + "\n", encoding="utf-8")
    run.drop_metrics_after(5)
    assert read_text(tmp_path / "metrics.jsonl") == told[0] + "\n"


def test_a_byte_order_mark_does_not_spoil_a_recipe_a_pipeline_or_a_token(tmp_path):
    (tmp_path / "r.toml").write_bytes(MARK + load_recipe("edm_digits").to_toml().encode())
    assert load_recipe(str(tmp_path / "r.toml")) == load_recipe("edm_digits")
    (tmp_path / "p.toml").write_bytes(MARK + b'name = "two"\n[[stages]]\nname = "a"\nrecipe = "edm_digits"\n')
    assert read_pipeline(tmp_path / "p.toml").name == "two"
    (tmp_path / "token").write_bytes(MARK + b"secret\r\n")
    assert Settings(token_file=tmp_path / "token").client_token() == "secret"
    digest = hashlib.sha256(b"secret").hexdigest()
    (tmp_path / "tokens").write_bytes(MARK + f"an\x85na:{digest}:use\r\n".encode())
    assert Tokens.read(tmp_path / "tokens").caller([("authorization", "Bearer secret")]).name == "an\x85na"
