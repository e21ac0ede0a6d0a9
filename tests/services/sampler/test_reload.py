"""New versions under load, and damaged ones."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distill_core.artifacts import ArtifactStore
from distill_core.errors import ArtifactError
from distillery.v1 import models_pb2
from distillery_sampler.client import SamplerClient
from tests.services.sampler.helpers import SamplerProcess, class_means, publish_denoiser, write_denoiser


def negative() -> np.ndarray:
    """Class means that nobody confuses with the first version's."""
    return -class_means()


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def is_inverted(client: SamplerClient, ref: str = "digits") -> bool:
    """Whether the second version answers: class 3's pattern has its sign turned."""
    picture = client.generate(ref, class_labels=[3])[0].astype(float) / 127.5 - 1
    return float((picture.transpose(2, 0, 1) * class_means()[3]).sum()) < 0


def versions(client: SamplerClient) -> dict[int, models_pb2.Model]:
    return {model.version: model for model in client.models(all_versions=True)}


class Load:
    """Clients that ask in a closed loop, and what went wrong for them."""

    def __init__(self, sampler: SamplerProcess, clients: int = 4) -> None:
        self._sampler, self._stop = sampler, threading.Event()
        self.calls, self.errors = 0, []
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def _ask(self) -> None:
        with self._sampler.client() as client:
            while not self._stop.is_set():
                try:
                    client.generate("digits", class_labels=[1, 2])
                    self.calls += 1
                except Exception as error:
                    self.errors.append(error)

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def store(tmp_path):
    store = ArtifactStore(tmp_path / "store")
    publish_denoiser(store, tmp_path / "one")
    return store


def publish_damaged(store: ArtifactStore, tmp_path: Path) -> None:
    """Version 2 with one byte of its graph changed, appearing all at once."""
    other = ArtifactStore(tmp_path / "other")
    for name in ("first", "second"):
        publish_denoiser(other, tmp_path / name)
    version = tmp_path / "other" / "digits" / "versions" / "2"
    graph = version / "exports" / "onnx-fp32" / "denoiser.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 0xFF
    graph.write_bytes(data)
    shutil.move(version, Path(store.url) / "digits" / "versions" / "2")


def test_a_new_version_is_swapped_in_under_load_without_a_failed_call(store, tmp_path):
    freed_soon = {"DISTILLERY_SAMPLER_KEEP_REPLACED_S": "0.3"}
    with SamplerProcess(store.url, freed_soon) as sampler, sampler.client() as client:
        assert not is_inverted(client)
        with Load(sampler) as load:
            until(lambda: load.calls > 20)
            publish_denoiser(store, tmp_path / "two", means=negative())
            until(lambda: is_inverted(client))
            calls = load.calls
            until(lambda: load.calls > calls + 20)
        assert load.errors == []
        until(lambda: versions(client)[1].state == models_pb2.MODEL_STATE_AVAILABLE)  # freed
        assert versions(client)[2].state == models_pb2.MODEL_STATE_READY
        assert not is_inverted(client, "digits@1")  # still to be had by number


def test_a_damaged_version_is_refused_and_the_old_one_goes_on(store, tmp_path):
    with SamplerProcess(store.url) as sampler, sampler.client() as client:
        assert not is_inverted(client)
        with Load(sampler) as load:
            publish_damaged(store, tmp_path)
            until(lambda: versions(client)[2].state == models_pb2.MODEL_STATE_FAILED)
            calls = load.calls
            until(lambda: load.calls > calls + 20)
        assert load.errors == []
        assert "checksum of exports/onnx-fp32/denoiser.onnx differs" in versions(client)[2].message
        assert not is_inverted(client)
        for _ in range(2):
            with pytest.raises(ArtifactError, match="checksum"):
                client.generate("digits@2", class_labels=[1])
        publish_denoiser(store, tmp_path / "three", means=negative())
        until(lambda: is_inverted(client))


@pytest.mark.parametrize(("keep_s", "loads"), [("60", 2), ("0", 4)])
def test_an_alias_that_moves_back_takes_its_old_version_back(store, tmp_path, keep_s, loads):
    publish_denoiser(store, tmp_path / "two", means=negative())
    store.set_alias("digits", "prod", 1)
    with SamplerProcess(store.url, {"DISTILLERY_SAMPLER_KEEP_REPLACED_S": keep_s}) as sampler:
        with sampler.client() as client:

            def replaced(version: int) -> None:
                if keep_s == "0":
                    until(lambda: versions(client)[version].state == models_pb2.MODEL_STATE_AVAILABLE)

            assert not is_inverted(client, "digits@prod")
            store.set_alias("digits", "prod", 2)
            until(lambda: is_inverted(client, "digits@prod"))
            replaced(1)
            store.set_alias("digits", "prod", 1)
            until(lambda: not is_inverted(client, "digits@prod"))
            replaced(2)
            assert is_inverted(client)  # latest
        assert sum(event["event"] == "model loaded" for event in sampler.events) == loads  # kept, or again


def test_a_refused_version_is_tried_again_when_the_alias_comes_back_to_it(store, tmp_path):
    store.set_alias("digits", "prod", 1)
    publish_damaged(store, tmp_path)
    graph = Path(store.url) / "digits" / "versions" / "2" / "exports" / "onnx-fp32" / "denoiser.onnx"
    with SamplerProcess(store.url) as sampler, sampler.client() as client:
        assert not is_inverted(client, "digits@prod")
        store.set_alias("digits", "prod", 2)
        until(lambda: versions(client)[2].state == models_pb2.MODEL_STATE_FAILED)
        time.sleep(0.6)  # some polls
        refused = [event for event in sampler.events if "refused" in event["event"]]
        assert len(refused) == 1  # not tried at every poll
        write_denoiser(graph, class_means())  # mended

        def away_and_back() -> bool:  # seen or not, as a poll falls between the two moves or not
            store.set_alias("digits", "prod", 1)
            time.sleep(0.6)
            store.set_alias("digits", "prod", 2)
            time.sleep(0.6)
            return versions(client)[2].state == models_pb2.MODEL_STATE_READY

        until(away_and_back)


def test_no_more_models_stay_loaded_than_allowed(store, tmp_path):
    for name in ("second", "third"):
        publish_denoiser(store, tmp_path / name, name=name)
    with (
        SamplerProcess(store.url, {"DISTILLERY_SAMPLER_MAX_MODELS": "2"}) as sampler,
        sampler.client() as client,
    ):
        for name in ("digits", "second", "third", "digits"):
            assert len(client.generate(name, class_labels=[1])) == 1
        ready = [model.name for model in client.models() if model.state == models_pb2.MODEL_STATE_READY]
        assert sorted(ready) == ["digits", "third"]


def test_a_kind_that_is_not_sampled_and_a_lacking_export_are_refused(store, tmp_path):
    from distill_core.artifacts import Manifest

    (tmp_path / "splats").mkdir()
    (tmp_path / "splats" / "config.json").write_text("{}")
    store.publish(tmp_path / "splats", Manifest(name="splats", kind="gaussians"))
    with SamplerProcess(store.url) as sampler, sampler.client() as client:
        with pytest.raises(ArtifactError, match="is a gaussians, which no sampler serves"):
            client.generate("splats", class_labels=[1])
        assert len(client.generate("digits", class_labels=[1])) == 1


def test_a_graph_that_is_no_onnx_is_refused_with_one_sentence(store, tmp_path):
    broken = tmp_path / "broken" / "exports" / "onnx-fp32"
    broken.mkdir(parents=True)
    (broken / "denoiser.onnx").write_bytes(b"this is no graph")
    manifest = store.manifest("digits").model_copy(update={"name": "broken"})
    store.publish(tmp_path / "broken", manifest)
    with (
        SamplerProcess(store.url) as sampler,
        sampler.client() as client,
        pytest.raises(ArtifactError, match="denoiser.onnx cannot be loaded"),
    ):
        client.generate("broken", class_labels=[1])
