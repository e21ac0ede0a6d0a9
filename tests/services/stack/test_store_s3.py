"""The artifact store over s3fs, against an S3 emulator on this machine: the whole contract, and one model's way."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
import torch

from distill_core import api
from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.artifacts import garbage as store_garbage
from distill_core.artifacts.garbage import StoredVersion, find_garbage, remove_upload, remove_version
from distill_core.errors import ArtifactError, ConfigError, NotFound, Unavailable
from distill_core.recipe import load_recipe

pytest.importorskip("s3fs", reason="the extra s3 is not installed")
moto = pytest.importorskip("moto.server", reason="the extra dev (moto) is not installed")

BUCKET = "models"


@pytest.fixture(scope="module")
def s3() -> Iterator[fsspec.AbstractFileSystem]:
    """An emulator with an empty bucket; the usual AWS variables lead to it."""
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.delenv("AWS_CA_BUNDLE", raising=False)
        files = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
        files.mkdir(BUCKET)
        yield files
        fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


@pytest.fixture
def url(s3) -> str:
    return f"s3://{BUCKET}/{secrets.token_hex(4)}"


@pytest.fixture
def store(url) -> ArtifactStore:
    return ArtifactStore(url)


@pytest.fixture
def folder(tmp_path) -> Path:
    model = tmp_path / "model"
    (model / "unet").mkdir(parents=True)
    (model / "unet" / "weights.safetensors").write_bytes(b"weights")
    (model / "preview.png").write_bytes(b"png")
    (model / "empty.txt").write_bytes(b"")
    return model


def draft(**values: object) -> Manifest:
    return Manifest(name="digits", kind="denoiser", **values)


def test_a_published_version_is_listed_and_fetched_by_another_opener(url, store, folder, tmp_path):
    assert store.names() == []
    published = store.publish(folder, draft(metrics={"frechet_distance": 1.5}))
    other = ArtifactStore(url)
    assert (published.ref, other.names(), other.versions("digits")) == ("digits@1", ["digits"], [1])
    fetched = other.fetch("digits", tmp_path / "cache")
    assert (fetched / "unet" / "weights.safetensors").read_bytes() == b"weights"
    assert (fetched / "empty.txt").read_bytes() == b""
    assert other.manifest("digits@latest").metrics == {"frechet_distance": 1.5}
    assert other.read_bytes("digits", "preview.png") == b"png"


def test_a_store_without_a_prefix_works_too(s3, folder, tmp_path):
    bucket = secrets.token_hex(8)
    s3.mkdir(bucket)
    store = ArtifactStore(f"s3://{bucket}")
    store.publish(folder, draft())
    assert store.names() == ["digits"]
    assert store.fetch("digits", tmp_path / "cache").is_dir()


def test_publishers_at_once_get_distinct_versions(url, folder):
    together = threading.Barrier(12)

    def publish(number: int) -> int:
        store = ArtifactStore(url)
        together.wait()
        return store.publish(folder, draft(title=str(number))).version

    with ThreadPoolExecutor(12) as pool:
        assert sorted(pool.map(publish, range(12))) == list(range(1, 13))
    titles = {ArtifactStore(url).manifest(f"digits@{number}").title for number in range(1, 13)}
    assert len(titles) == 12


def test_the_same_job_publishes_once(store, folder):
    first = store.publish(folder, draft(job="a"), key="a")
    assert store.publish(folder, draft(job="a"), key="a") == first
    assert store.publish(folder, draft(job="b"), key="b").version == 2


def test_a_publisher_that_died_half_way_left_no_version_and_its_retry_takes_the_number(
    store, folder, monkeypatch
):
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "_write_atomically", die)
        with pytest.raises(KeyboardInterrupt):
            store.publish(folder, draft(job="j"), key="j")
    assert store.versions("digits") == []
    with pytest.raises(NotFound):
        store.fetch("digits")
    assert store.publish(folder, draft(job="j"), key="j").version == 1


def test_aliases_move_and_keep_their_history(url, store, folder):
    for _ in range(2):
        store.publish(folder, draft())
    watcher = ArtifactStore(url)
    for version in (1, 2, 1):
        store.set_alias("digits", "prod", version, who="ann")
        assert watcher.resolve("digits@prod") == ("digits", version)  # what a running sampler would see
    assert [(move.previous, move.version) for move in store.history("digits")] == [(None, 1), (1, 2), (2, 1)]
    assert watcher.aliases("digits") == {"prod": 1, "latest": 2}
    with pytest.raises(ConfigError, match="reserved"):
        store.set_alias("digits", "latest", 1)
    with pytest.raises(NotFound, match="no version 7"):
        store.set_alias("digits", "prod", 7)


def test_a_damaged_file_is_named_and_never_kept_as_good(s3, url, store, folder, tmp_path):
    store.publish(folder, draft())
    stored = f"{url}/digits/versions/1/unet/weights.safetensors"
    s3.pipe_file(stored, b"weighty")
    for _ in range(2):
        with pytest.raises(ArtifactError, match="checksum of unet/weights.safetensors"):
            store.fetch("digits", tmp_path / "cache")
    s3.pipe_file(f"{url}/digits/versions/1/preview.png", b"bad")
    with pytest.raises(ArtifactError, match="checksum of preview.png"):
        store.read_bytes("digits", "preview.png")
    s3.pipe_file(stored, b"weights")
    s3.pipe_file(f"{url}/digits/versions/1/preview.png", b"png")
    assert (store.fetch("digits", tmp_path / "cache") / "preview.png").read_bytes() == b"png"


def test_a_missing_file_and_a_damaged_manifest_are_named(s3, url, store, folder, tmp_path):
    store.publish(folder, draft())
    s3.rm_file(f"{url}/digits/versions/1/preview.png")
    with pytest.raises(ArtifactError, match=r"preview.png is missing"):
        store.fetch("digits", tmp_path / "cache")
    s3.pipe_file(f"{url}/digits/versions/1/manifest.json", b"{")
    with pytest.raises(ArtifactError, match="is damaged"):
        store.manifest("digits")
    assert store.publish(folder, draft(job="b"), key="b").version == 2


def test_a_manifest_cannot_name_a_file_outside(s3, url, store, folder, tmp_path):
    store.publish(folder, draft())
    path = f"{url}/digits/versions/1/manifest.json"
    values = json.loads(s3.cat_file(path))
    values["files"]["../../../secret"] = values["files"].pop("preview.png")
    s3.pipe_file(path, json.dumps(values).encode())
    with pytest.raises(ArtifactError, match="leaves the model's folder"):
        store.fetch("digits", tmp_path / "cache")


def test_old_versions_and_cut_off_uploads_are_found_and_removed(s3, url, store, folder):
    for _ in range(4):
        store.publish(folder, draft())
    store.set_alias("digits", "prod", 1)
    s3.pipe_file(f"{url}/digits/versions/9/.claim", b"job-9")
    found = find_garbage(store, keep=1, older_than_s=0)
    assert [version.ref for version in found.versions] == ["digits@2", "digits@3"]
    assert [remove_version(store, version, lambda: True) for version in found.versions] == [True, True]
    assert not remove_version(store, StoredVersion("digits", 4, 0, 0.0), lambda: False)
    assert store.versions("digits") == [1, 4]
    assert s3.find(f"{url}/digits/versions/2") == []
    (upload,) = cut_off(store)
    assert upload.claimed_by == "job-9"
    assert remove_upload(store, upload, lambda: True)
    assert cut_off(store) == ()


def cut_off(store: ArtifactStore) -> tuple[StoredVersion, ...]:
    """Uploads without a manifest, whatever their age."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_garbage, "UPLOAD_AGE_S", -1.0)
        return find_garbage(store, keep=1, older_than_s=0).uploads


def test_a_store_that_is_away_says_so(monkeypatch, folder):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
    try:
        store = ArtifactStore(f"s3://{BUCKET}/away")
        with pytest.raises(Unavailable, match="s3://models/away"):
            store.publish(folder, draft())
        with pytest.raises(Unavailable, match="s3://models/away"):
            store.versions("digits")
    finally:
        fsspec.filesystem("s3").clear_instance_cache()


def test_a_model_is_trained_converted_and_served_through_s3(url, tmp_path):
    from distillery_converter.convert import convert
    from tests.services.sampler.helpers import SamplerProcess

    torch.set_num_threads(1)
    recipe = load_recipe("edm_digits").override({"steps": 2, "batch_size": 8, "network.args.num_layers": 1})
    recipe = recipe.model_copy(
        update={"evaluate": {key: value for key, value in recipe.evaluate.items() if key != "judge"}}
    )
    where = api.context(url, tmp_path / "cache")
    trained = api.train(recipe, tmp_path / "run", where, job="job-1").manifest
    store = ArtifactStore(url)
    exported = convert(store, trained.ref, "onnx-fp32", job="job-2", cache=tmp_path / "cache")
    assert (trained.ref, exported.ref, exported.parents) == (
        "edm-digits@1",
        "edm-digits@2",
        ("edm-digits@1",),
    )
    store.set_alias("edm-digits", "prod", 2)
    variables = {
        "DISTILLERY_SAMPLER_PRELOAD": '["edm-digits@prod"]',
        "DISTILLERY_CACHE_DIR": str(tmp_path / "sampler"),
    }
    with SamplerProcess(url, variables) as process, process.client() as client:
        pictures = client.generate("edm-digits@prod", class_labels=[3, 4], num_steps=2)
        assert (len(pictures), pictures[0].shape) == (2, (8, 8, 1))
