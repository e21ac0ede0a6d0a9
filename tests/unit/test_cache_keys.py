"""Keys of cached models: what decides a result changes them, and nothing else does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from PIL import Image

import distill_core
from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.cache_keys import DECIDE_NOTHING, cache_key, files_digest, pairs_key
from distill_core.errors import NotFound
from distill_core.recipe import Recipe, load_recipe


@pytest.fixture
def store(tmp_path):
    """A store with two versions of a model, of which `prod` is the first."""
    store = ArtifactStore(tmp_path / "store")
    for weights in (b"one", b"other"):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "model.safetensors").write_bytes(weights)
        store.publish(tmp_path / "model", Manifest(name="shown", kind="denoiser"))
    store.set_alias("shown", "prod", 1)
    return store


@pytest.fixture
def folder(tmp_path):
    """A folder of pictures in two classes."""
    for number, name in enumerate(("cat", "dog", "dog")):
        file = tmp_path / "pictures" / name / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 6), (40 * number, 1, 2)).save(file)
    return tmp_path / "pictures"


def recipe(folder: Path | None = None, **changes: object) -> Recipe:
    data = {"name": "digits"} if folder is None else {"name": "images", "path": str(folder)}
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return load_recipe("dmd2").override({"data": data, **changes})


def test_a_file_below_a_data_path_changes_the_key_and_its_own_state_brings_it_back(folder, store):
    def key() -> str:
        return cache_key(recipe(folder), store)

    before, one = key(), folder / "dog" / "1.png"
    found, state = {before}, one.stat()
    os.utime(one, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    found.add(key())
    kept = one.read_bytes()
    one.write_bytes(kept + b"more")
    os.utime(one, ns=(state.st_atime_ns, state.st_mtime_ns))
    found.add(key())
    one.write_bytes(kept)
    os.utime(one, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert key() == before
    one.rename(folder / "cat" / "1.png")
    found.add(key())
    assert len(found) == 4


def test_where_a_data_path_is_and_what_is_hidden_below_it_change_nothing(folder, store, tmp_path):
    before = cache_key(recipe(folder), store)
    shutil.copytree(folder, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "elsewhere" / ".cache").mkdir()
    (tmp_path / "elsewhere" / ".cache" / "a.png").write_bytes(b"x")
    assert cache_key(recipe(tmp_path / "elsewhere"), store) == before


def test_the_name_of_a_single_file_counts_since_splits_are_told_by_it(tmp_path):
    for name in ("train.parquet", "test.parquet"):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, ns=(7, 7))
    assert files_digest(tmp_path / "train.parquet") != files_digest(tmp_path / "test.parquet")
    assert files_digest(tmp_path / "absent") == ""


@pytest.mark.parametrize(
    "place", ["data.path", "data.other.path", "config.held_out.path", "teacher.path", "student.path"]
)
def test_a_path_counts_wherever_a_recipe_names_one(place, folder, store, tmp_path):
    shutil.copytree(folder, tmp_path / "b")
    if place == "config.held_out.path":
        base = load_recipe("judge_digits").override({"config.held_out": {"name": "images", "path": "x"}})
    else:
        base = recipe(folder, data__other={"name": "images", "path": str(folder)})
    changed = base.override({place: str(tmp_path / "b")})
    before = cache_key(changed, store)
    next((tmp_path / "b").rglob("*.png")).write_bytes(b"other")
    assert cache_key(changed, store) != before


@pytest.mark.parametrize("place", ["teacher", "teachers.other", "extractor", "student"])
def test_an_alias_counts_as_the_version_that_it_is_now(place, store):
    named = recipe(**{place: {"artifact": "shown@prod"}})
    first = cache_key(named, store)
    store.set_alias("shown", "prod", 2)
    assert cache_key(named, store) != first
    store.set_alias("shown", "prod", 1)
    assert cache_key(named, store) == first
    store.set_alias("shown", "other", 2)
    store.publish(Path(store.url).parent / "model", Manifest(name="more", kind="denoiser"))
    assert cache_key(named, store) == first


def test_the_same_version_of_another_store_is_another_model(store, tmp_path):
    (tmp_path / "model" / "model.safetensors").write_bytes(b"third")
    again = ArtifactStore(tmp_path / "again")
    again.publish(tmp_path / "model", Manifest(name="shown", kind="denoiser"))
    named = recipe(teacher={"artifact": "shown@1"})
    assert cache_key(named, store) != cache_key(named, again)
    with pytest.raises(NotFound, match="shown has no version 2"):
        cache_key(recipe(teacher={"artifact": "shown@2"}), again)


@pytest.mark.parametrize("place", ["teacher", "teachers.other", "extractor", "student"])
def test_a_recipe_counts_as_what_it_trains_now(place, store, tmp_path):
    file, base = tmp_path / "base.toml", load_recipe("edm_digits")
    named, keys = recipe(**{place: {"recipe": str(file)}}), set()
    for steps in (10, 11):
        file.write_text(base.override({"steps": steps}).to_toml())
        keys.add(cache_key(named, store))
        file.write_text(base.override({"steps": steps, "log_every": 3}).to_toml())
        keys.add(cache_key(named, store))
    assert len(keys) == 2
    moved = file.rename(tmp_path / "moved.toml")
    assert cache_key(recipe(**{place: {"recipe": str(moved)}}), store) in keys


OTHERWISE = {
    "title": "Another",
    "check.seeds": [1],
    "publish.name": "another",
    "evaluate.num_samples": 77,
    "log_every": 3,
    "sample_every": 3,
    "checkpoint_every": 3,
    "keep_checkpoints": 3,
    "prefetch": 3,
}


def test_what_decides_nothing_is_not_in_the_key(store):
    assert {key.partition(".")[0] for key in OTHERWISE} == DECIDE_NOTHING
    before = cache_key(recipe(), store)
    for key, value in OTHERWISE.items():
        assert cache_key(recipe().override({key: value}), store) == before, key
    deciding = {"seed": 3, "steps": 9, "batch_size": 24, "accumulate": 2, "precision": "bf16", "threads": 3}
    found = {cache_key(recipe().override({key: value}), store) for key, value in deciding.items()}
    found |= {cache_key(recipe(optim__student__lr=0.03), store), cache_key(recipe(data__split="test"), store)}
    assert len(found | {before}) == len(deciding) + 3


def test_pairs_have_a_key_of_their_teacher_and_data_alone(folder, store):
    named = recipe(folder, teacher={"artifact": "shown@prod"}, pairs={"count": 9})
    first = pairs_key(named, store)
    assert pairs_key(named.override({"steps": 3, "config": {}, "optim": {}}), store) == first
    found = {first, pairs_key(named.override({"pairs.count": 10}), store)}
    store.set_alias("shown", "prod", 2)
    found.add(pairs_key(named, store))
    next(folder.rglob("*.png")).write_bytes(b"other")
    found.add(pairs_key(named, store))
    assert len(found) == 4


METHOD = """
from distill_core.method import Method, MethodConfig
from outside_pack.maths import halved


class Config(MethodConfig):
    pass


class Outside(Method):
    def __init__(self, config: Config):
        super().__init__()
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """An installed package with a method, what it imports, what that imports, and a module beside."""
    root = tmp_path / "site"
    package = root / "outside_pack"
    package.mkdir(parents=True)
    for name, text in {
        "__init__": "",
        "method": METHOD,
        "maths": "from outside_pack import deeper\n\n\ndef halved(x):\n    return deeper.scale(x)\n",
        "deeper": "def scale(x):\n    return x / 3\n",
        "beside": "",
    }.items():
        (package / f"{name}.py").write_text(text)
    info = root / "outside_pack-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-pack\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[distillery.methods]\noutside = outside_pack.method\n")
    monkeypatch.syspath_prepend(str(root))
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "outside_pack"]:
        del sys.modules[name]


def test_an_edited_module_that_a_method_imports_changes_its_key(outside, store):
    made = load_recipe({"method": "outside", "steps": 3})
    found = {cache_key(made, store)}
    (outside / "beside.py").write_text("edited = True\n")
    assert cache_key(made, store) in found
    for name in ("method", "maths", "deeper"):
        with (outside / f"{name}.py").open("a") as file:
            file.write("\n# edited\n")
        found.add(cache_key(made, store))
    assert len(found) == 4


PRINTS_KEYS = """
import sys
from pathlib import Path

import distill_core
from distill_core.artifacts import ArtifactStore
from distill_core.cache_keys import cache_key
from distill_core.recipe import load_recipe

def shown():
    made = load_recipe("dmd2").override({"data": {"name": "images", "path": sys.argv[1]}})
    print(cache_key(made, ArtifactStore("absent")))

shown()
for name in ("errors", "methods/diffusion/swiftbrush", "data/shapes") + (
    "diffusion/sampling", "losses/matching", "data/images"
):
    with (Path(distill_core.__file__).parent / f"{name}.py").open("a") as file:
        file.write("# edited")
    shown()
"""


def test_another_checkout_in_another_process_has_the_same_keys_until_a_module_of_the_method_is_edited(
    folder, store, tmp_path
):
    ours = Path(distill_core.__file__).parent
    shutil.copytree(ours, tmp_path / "a" / "distill_core", ignore=shutil.ignore_patterns("__pycache__"))
    paths = [str(tmp_path / "a"), *(path for path in sys.path if "distill_core" not in path)]
    done = subprocess.run(
        [sys.executable, "-c", dedent(PRINTS_KEYS), str(folder)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
    )
    keys = done.stdout.split()
    assert len(keys) == 7
    assert keys[:4] == [cache_key(recipe(folder), store)] * 4  # what dmd2 does not compute with
    assert len(set(keys[3:])) == 4
