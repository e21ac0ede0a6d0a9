"""The artifact store: complete or absent, never twice, never damaged, never outside its folder."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.errors import ArtifactError, ConfigError, NotFound
from distill_core.kinds.predictor.card import Card


@pytest.fixture
def folder(tmp_path) -> Path:
    model = tmp_path / "model"
    (model / "unet").mkdir(parents=True)
    (model / "unet" / "weights.safetensors").write_bytes(b"weights")
    (model / "preview.png").write_bytes(b"png")
    return model


@pytest.fixture
def store(tmp_path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def draft(**values: object) -> Manifest:
    return Manifest(name="digits", kind="denoiser", **values)


def test_a_published_version_is_found_verified_and_listed(store, folder):
    manifest = store.publish(folder, draft(metrics={"frechet_distance": 1.5}))
    assert manifest.ref == "digits@1"
    assert store.names() == ["digits"]
    fetched = store.fetch("digits")
    assert (fetched / "unet" / "weights.safetensors").read_bytes() == b"weights"
    assert store.manifest("digits@latest").metrics == {"frechet_distance": 1.5}
    assert store.read_bytes("digits", "preview.png") == b"png"


def test_reading_a_card_changes_no_manifest_and_a_copy_reads_its_own():
    read, unread = (Manifest(name="reader", kind="predictor", card={"parameters": 3}) for _ in range(2))
    assert read.card_as(Card) is read.card_as(Card)
    assert read == unread
    assert read.model_dump_json() == unread.model_dump_json()
    assert read.model_copy(update={"card": {"parameters": 4}}).card_as(Card).parameters == 4
    assert read.card_as(Card).parameters == 3


def test_a_number_whose_claim_is_lost_is_not_given_again(store, folder):
    """As in a store that was copied without its hidden files."""
    for _ in range(2):
        store.publish(folder, draft())
    for claim in Path(store.url).glob("digits/versions/*/.claim"):
        claim.unlink()
    assert store.publish(folder, draft()).version == 3
    assert store.versions("digits") == [1, 2, 3]


def test_the_same_job_publishes_once(store, folder):
    first = store.publish(folder, draft(job="job-1"), key="job-1")
    assert store.publish(folder, draft(job="job-1"), key="job-1") == first
    assert store.versions("digits") == [1]
    assert store.publish(folder, draft(job="job-2"), key="job-2").version == 2


def test_a_publisher_killed_half_way_leaves_no_version_and_its_retry_takes_the_number(
    store, folder, tmp_path
):
    script = f"""
import os, shutil
from pathlib import Path
from distill_core.artifacts import ArtifactStore, Manifest
store = ArtifactStore({str(tmp_path / "store")!r})
store._write_atomically = lambda *a: os._exit(9)
store.publish(Path({str(folder)!r}), Manifest(name="digits", kind="denoiser", job="j"), key="j")
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    assert store.versions("digits") == []
    with pytest.raises(NotFound):
        store.fetch("digits")
    assert store.publish(folder, draft(job="j"), key="j").version == 1


def test_concurrent_publishers_get_distinct_versions(store, folder):
    with ThreadPoolExecutor(12) as pool:
        versions = [m.version for m in pool.map(lambda _: store.publish(folder, draft()), range(12))]
    assert sorted(versions) == list(range(1, 13))


def test_of_many_who_claim_one_version_at_once_one_gets_it(store, tmp_path):
    """Also when all of them looked before any of them wrote."""
    target = str(tmp_path / "store/digits/versions/1/.claim")
    together = threading.Barrier(8)

    def create(number: int) -> bool:
        together.wait()
        try:
            store._create(target, str(number).encode())
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        for attempt in range(50):
            Path(target).unlink(missing_ok=True)
            assert sum(pool.map(create, range(8))) == 1, attempt
    assert [path.name for path in Path(target).parent.iterdir()] == [".claim"]


def test_a_damaged_file_is_named(store, folder):
    store.publish(folder, draft())
    stored = Path(store.root) / "digits/versions/1/unet/weights.safetensors"
    stored.write_bytes(b"weighty")
    with pytest.raises(ArtifactError, match="checksum of unet/weights.safetensors"):
        store.fetch("digits")
    stored.unlink()
    with pytest.raises(ArtifactError, match="unet/weights.safetensors is missing"):
        store.fetch("digits")


@pytest.mark.parametrize("name", ["../x", "/etc", "a/b", "", "A", "x" * 65, ".hidden"])
def test_a_name_that_could_leave_the_store_is_refused(store, folder, name):
    with pytest.raises(ConfigError):
        store.resolve(name)
    with pytest.raises(ConfigError):
        store.publish(folder, Manifest.parse({"name": name, "kind": "denoiser"}))


def test_a_manifest_that_names_a_file_outside_is_refused(store, folder):
    store.publish(folder, draft())
    path = Path(store.root) / "digits/versions/1/manifest.json"
    values = json.loads(path.read_text())
    values["files"]["../../../../secret"] = values["files"].pop("preview.png")
    path.write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="leaves the model's folder"):
        store.fetch("digits")


@pytest.mark.parametrize("file", ["model.pt", "optimizer.pkl", "pytorch_model.bin"])
def test_a_pickle_is_not_published(store, folder, file):
    (folder / file).write_bytes(b"\x80\x04.")
    with pytest.raises(ArtifactError, match=f"{file} is refused.*safetensors"):
        store.publish(folder, draft())
    assert store.versions("digits") == []


def test_a_link_is_not_published(store, folder):
    (folder / "link").symlink_to("/etc/hostname")
    with pytest.raises(ArtifactError, match="is a link"):
        store.publish(folder, draft())


def test_unknown_names_and_versions_say_what_there_is(store, folder):
    store.publish(folder, draft())
    with pytest.raises(NotFound, match="did you mean 'digits'"):
        store.resolve("digit")
    with pytest.raises(NotFound, match="no version 7; it has 1"):
        store.resolve("digits@7")
    with pytest.raises(NotFound, match="no version 999"):
        store.resolve("digits@" + "9" * 5000)  # more digits than Python turns into a number
    with pytest.raises(NotFound, match="no alias '²'"):
        store.resolve("digits@²")
    with pytest.raises(NotFound, match="no alias 'prod'"):
        store.resolve("digits@prod")


def test_aliases_move_and_keep_their_history(store, folder):
    for _ in range(2):
        store.publish(folder, draft())
    store.set_alias("digits", "prod", 1, who="ann")
    store.set_alias("digits", "prod", 2)
    store.set_alias("digits", "prod", 1)
    assert store.resolve("digits@prod") == ("digits", 1)
    assert store.resolve("digits") == ("digits", 2)
    assert [(move.previous, move.version) for move in store.history("digits")] == [(None, 1), (1, 2), (2, 1)]
    with pytest.raises(ConfigError, match="reserved"):
        store.set_alias("digits", "latest", 1)


def test_a_store_on_another_file_system_copies_and_verifies(folder, tmp_path):
    store = ArtifactStore(f"memory://distillery-{tmp_path.name}")
    store.publish(folder, draft())
    fetched = store.fetch("digits", tmp_path / "cache")
    assert (fetched / "unet" / "weights.safetensors").read_bytes() == b"weights"
    (fetched / "preview.png").write_bytes(b"bad")  # a copy that this disk damaged is fetched again
    assert (store.fetch("digits", tmp_path / "cache") / "preview.png").read_bytes() == b"png"
    store.fs.pipe_file(f"{store.root}/digits/versions/1/preview.png", b"bad")
    (fetched / "preview.png").unlink()
    with pytest.raises(ArtifactError, match="preview.png"):
        store.fetch("digits", tmp_path / "cache")
    assert [path.name for path in fetched.parent.iterdir()] == []  # and nothing half-fetched stays


@pytest.mark.parametrize("content", ["{", "5", '{"name": "digits"}'])
def test_a_damaged_manifest_stops_neither_later_jobs_nor_takes_an_alias(content, store, folder, tmp_path):
    store.publish(folder, draft(job="a"), key="a")
    (tmp_path / "store" / "digits" / "versions" / "1" / "manifest.json").write_text(content)
    assert store.publish(folder, draft(job="b"), key="b").version == 2
    with pytest.raises(ArtifactError):
        store.set_alias("digits", "prod", 1)
    assert store.aliases("digits") == {"latest": 2}


def test_a_damaged_alias_is_named(store, folder, tmp_path):
    store.publish(folder, draft())
    store.set_alias("digits", "prod", 1)
    (tmp_path / "store" / "digits" / "aliases" / "prod.json").write_text('{"alias": "prod"}')
    with pytest.raises(ArtifactError, match="digits/aliases/prod.json in .* is damaged: missing key version"):
        store.resolve("digits@prod")


def test_a_card_is_read_once_and_a_copy_with_another_card_reads_its_own():
    from distill_core.kinds.field.card import Card

    scene = {"field": "hash", "bound": 1.3, "radius": 2.7}
    first = Manifest(name="a", kind="field", card={"scene": scene})
    assert first.card_as(Card) is first.card_as(Card)
    other = first.model_copy(update={"card": {"scene": {**scene, "field": "vm"}}})
    assert (other.card_as(Card).scene.field, first.card_as(Card).scene.field) == ("vm", "hash")
