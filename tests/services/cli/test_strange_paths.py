"""Folders with any name: what has a meaning in URLs and patterns has none in a path."""

from __future__ import annotations

import fsspec
import numpy as np
import pytest
import redis
from sqlalchemy import text

from distill_core.artifacts import ArtifactStore
from distill_core.data import build_source
from distill_core.errors import ConfigError, DataError
from distill_core.files.paths import path_of, url_of, user_path
from distill_service.jobs import broker
from distill_service.jobs.celery_app import RUN_NEXT, make_app, wake
from distill_service.jobs.database import Database
from distill_service.jobs.paths import check_paths
from distill_service.settings import Settings

NAMES = ["st?q=1", "a#b", "100%25", "a b", "a@b:c", "[1]", "*", "-x", "~x", "a::b", "a;b&c=d", "$HOME", "é"]


@pytest.mark.parametrize("name", NAMES)
def test_the_job_table_is_in_the_state_folder(tmp_path, name):
    settings = Settings(state_dir=tmp_path / name)
    db = Database.open(settings.database_url)
    with db.read() as session:
        assert session.execute(text("select count(*) from jobs")).scalar() == 0
    db.close()
    assert (tmp_path / name / "jobs.db").is_file()
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_parameter_of_a_job_table_s_url_is_refused_with_how_to_write_a_question_mark(tmp_path):
    with pytest.raises(ConfigError, match="'q'.* as %3F"):
        Database(f"sqlite:///{tmp_path}/st?q=1")


@pytest.mark.parametrize("name", NAMES)
def test_the_broker_of_messages_in_files_is_in_the_state_folder(tmp_path, name, monkeypatch):
    monkeypatch.setattr(broker, "redis_server", lambda: None)
    settings = Settings(state_dir=tmp_path / name)
    assert wake(make_app(broker.broker_url(settings)), ["train"])
    (message,) = (tmp_path / name / "broker" / "messages").iterdir()
    assert RUN_NEXT in message.read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.skipif(broker.redis_server() is None, reason="no redis-server is installed")
@pytest.mark.parametrize("name", ["st?q=1", "a#b c", "100%25", "a@b:c"])
def test_the_embedded_redis_is_reached_by_its_url(tmp_path_factory, name, tmp_path):
    state = tmp_path_factory.mktemp("s") / name
    settings = Settings(state_dir=state)
    with broker.running_broker(settings) as url:
        assert wake(make_app(url), ["train"])
        with redis.Redis(unix_socket_path=str(broker.socket_path(state))) as client:
            assert client.llen("train") == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_store_is_in_the_folder_that_is_named(tmp_path, name, monkeypatch):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for url in (str(tmp_path / name), f"./{name}"):
        store = ArtifactStore(url)
        assert store.local
        store._create(store._path("models", "x", "versions", "1", ".claim"), b"key")
        assert (tmp_path / name / "models/x/versions/1/.claim").read_bytes() == b"key"
        store._remove(store._path("models"))
        assert not list((tmp_path / name).iterdir())
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_store_whose_name_reads_as_a_pattern_removes_nothing_from_its_neighbour():
    memory = fsspec.filesystem("memory")
    for folder in ("st1", "st[1]"):
        memory.pipe_file(f"/{folder}/x/versions/2/.claim", b"")
        memory.pipe_file(f"/{folder}/x/versions/2/part/weights", b"kept")
    store = ArtifactStore("memory://st[1]")
    store._remove(store._path("x", "versions", "2"))
    assert memory.find("/st[1]") == []
    assert len(memory.find("/st1")) == 2
    memory.rm("/st1", recursive=True)


@pytest.mark.parametrize("name", [*NAMES, "set[1]", "{a,b}", "s3:/x"])
@pytest.mark.parametrize("form", ["parquet", "arrow", "saved"])
def test_a_table_is_read_from_the_very_folder_that_is_named(tmp_path, name, form, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for folder, count in (("set1", 10), (name, 40)):
        pictures = [np.full((4, 4), index, np.uint8).tolist() for index in range(count)]
        rows = datasets.Dataset.from_dict({"image": pictures})
        place = tmp_path / "data" / folder
        place.mkdir(parents=True)
        if form == "saved":
            rows.save_to_disk(tmp_path / "saved")
            (tmp_path / "saved").rename(place / "saved")
        elif form == "parquet":
            rows.to_parquet(tmp_path / "train.parquet")
            (tmp_path / "train.parquet").rename(place / "train.parquet")
        else:
            _write_arrow(rows, place / "train.arrow")
    path = tmp_path / "data" / name / ("saved" if form == "saved" else "")
    assert build_source({"name": "huggingface", "path": str(path)}).size == 40


def _write_arrow(rows, file):
    import pyarrow as pa

    table = rows.data.table
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def test_a_table_that_was_changed_is_read_anew(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for count in (5, 7):
        pictures = [np.full((4, 4), index, np.uint8).tolist() for index in range(count)]
        datasets.Dataset.from_dict({"image": pictures}).to_parquet(tmp_path / "t$.parquet")
        assert build_source({"name": "huggingface", "path": str(tmp_path / "t$.parquet")}).size == count


def test_a_home_folder_that_nobody_has_is_a_name_like_any_other(tmp_path, monkeypatch):
    assert str(user_path("~nobody-of-that-name/x")) == "~nobody-of-that-name/x"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/x") == tmp_path / "x"
    with pytest.raises(ConfigError, match="zero character"):
        build_source({"name": "images", "path": "a\0b"})
    with pytest.raises(DataError, match="does not exist"):
        build_source({"name": "images", "path": "x" * 5000})
    with pytest.raises(ConfigError, match="may not be read by a job"):
        check_paths({"data": {"path": "~nobody-of-that-name/x"}}, Settings(data_roots=str(tmp_path)))


@pytest.mark.parametrize("name", NAMES)
def test_a_path_survives_its_url(tmp_path, name):
    assert path_of(url_of("filesystem", tmp_path / name), "filesystem") == tmp_path / name
