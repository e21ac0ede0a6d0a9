"""A short seed of `make fuzz-converter`: damaged models end in one sentence, in the converter and in the sampler."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from random import Random

import pytest
import torch

from distill_core.errors import ArtifactError
from distill_core.networks.foreign_configs import _numbers, check_numbers
from tests.services.fuzz.converter import Subject, fuzz
from tests.services.fuzz.damage import KINDS, lying_header, odd_value, truncated


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    torch.set_num_threads(1)
    return Subject(tmp_path_factory.mktemp("fuzz"))


def test_a_hundred_damaged_models_are_read_or_refused_in_one_sentence(subject):
    taken = fuzz(subject, first=1, count=100)
    assert sum(taken.values()) == 100
    kinds = Counter()
    for what, times in taken.items():
        kinds[what.split()[1]] += times
    assert kinds["ArtifactError"] >= 20
    assert set(kinds) <= {"read", "ArtifactError", "ConfigError"}


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors", ".json"])
def test_what_is_cut_off_is_refused(subject, suffix):
    path = next(
        path for path in subject.files if path.endswith("config.json" if suffix == ".json" else suffix)
    )
    whole = (subject.folder / path).read_bytes()
    assert subject.tried(path, whole) == "read"
    assert subject.tried(path, whole[: len(whole) // 2]) == "ArtifactError"


@pytest.mark.parametrize(
    ("part", "lie"),
    [
        ("image", {"height": 10**30}),
        ("image", {"channels": 2**17}),
        ("image", {"height": 2**16, "width": 2**16}),  # each alone is allowed
        ("image", {"picture": [3, 2**16, 2**16]}),
        ("image", {"picture": [0, 8, 8]}),
        ("sampler", {"max_steps": 10**30}),
        ("sampler", {"num_steps": 10**30, "max_steps": 10**30}),
    ],
    ids=str,
)
def test_a_size_that_no_machine_has_room_for_is_refused(subject, part, lie):
    told = json.loads((subject.folder / "distillery.json").read_bytes())
    told[part] |= lie
    assert subject.tried("distillery.json", json.dumps(told).encode()) == "ArtifactError"


@pytest.mark.parametrize(
    "lie", [{"num_layers": 10**30}, {"num_layers": 1001}, {"a": [{"b": 2**31}]}], ids=str
)
def test_a_network_that_takes_hours_to_build_is_refused_first(subject, tmp_path, lie):
    told = json.loads((subject.folder / "transformer/config.json").read_bytes())
    for numbers, refused in ((told, False), (told | lie, True)):
        (tmp_path / "config.json").write_text(json.dumps(numbers))
        with pytest.raises(ArtifactError, match="is above 1000") if refused else nullcontext():
            check_numbers(tmp_path)
    assert subject.tried("transformer/config.json", json.dumps(told | lie).encode()) == "ArtifactError"


def test_numbers_are_found_however_deep_they_are():
    nested = 2**31
    for _ in range(10_000):
        nested = [nested]
    assert list(_numbers({"a": nested, "b": 1.5})) == [("a", 2**31)]


def test_a_failure_that_is_not_one_of_ours_is_seen(subject, monkeypatch):
    monkeypatch.setattr(Subject, "_convert", lambda self: 1 // 0)
    path = next(path for path in subject.files if path.endswith(".json"))
    with pytest.raises(ZeroDivisionError):
        subject.tried(path, b"{}")


def test_damage_is_the_same_for_the_same_number(subject):
    for path in subject.files:
        whole = (subject.folder / path).read_bytes()
        for damage in KINDS["." + path.rsplit(".", 1)[1]]:
            assert damage(whole, Random(3)) == damage(whole, Random(3))
    assert len(truncated(whole, Random(1))) < len(whole)
    assert lying_header.__name__ != odd_value.__name__
