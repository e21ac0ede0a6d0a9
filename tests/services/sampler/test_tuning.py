"""Instances, threads and batch sizes by timing: on devices whose times are known."""

from __future__ import annotations

import threading
from collections.abc import Hashable

import numpy as np
import pytest

from distill_core.artifacts import ArtifactStore
from distillery_sampler.backends.base import Generator
from distillery_sampler.backends.shared import SharedWeights
from distillery_sampler.engine.requests import ImageItem, ImageKey
from distillery_sampler.models.loading import open_model
from distillery_sampler.models.tuning import Layout, Tuned, WarmUpRequest, cores, tune, warm
from distillery_sampler.settings import SamplerSettings
from tests.services.sampler.helpers import publish_denoiser

QUESTION = WarmUpRequest(ImageKey(1, 1.0), ImageItem(1))


class Clock:
    """The time that passes while a `Device` works, and at no other moment."""

    def __init__(self) -> None:
        self.now = 0.0
        self._lock = threading.Lock()

    def pass_by(self, seconds: float) -> None:
        with self._lock:
            self.now += seconds

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    own = Clock()
    monkeypatch.setattr("distillery_sampler.models.tuning.time", own)
    return own


class Device(Generator):
    """Takes so long for a batch and for each image in it, `at_once` batches at a time."""

    name = "device"

    def __init__(
        self, clock: Clock, batch_s: float, image_s: float, *, at_once: int = 1, largest: int = 1000
    ) -> None:
        self.clock, self.batch_s, self.image_s = clock, batch_s, image_s
        self.at_once, self.largest = at_once, largest
        self.sizes: list[int] = []

    def generate(self, key, items):
        self.sizes.append(len(items))
        if len(items) > self.largest:
            raise RuntimeError("CUDA out of memory")
        self.clock.pass_by((self.batch_s + self.image_s * len(items)) / self.at_once)
        return np.zeros((len(items), 1, 1, 1), np.float32)

    def held(self) -> dict[Hashable, int]:
        return {}


def found(device: Device, **settings: object) -> Tuned:
    own = SamplerSettings(**{"instances": 1, **settings})
    return tune(device, lambda threads: device, QUESTION, own)[1]


def test_batches_grow_where_they_pay_and_stay_small_where_they_do_not(clock):
    assert found(Device(clock, 0.02, 0.0)) == (Layout(1, cores()), 32, pytest.approx(0.02 / 32))
    assert found(Device(clock, 0.0, 0.02)) == (Layout(1, cores()), 1, pytest.approx(0.02))
    assert found(Device(clock, 0.0, 0.003)) == (
        Layout(1, cores()),
        8,
        pytest.approx(0.003),
    )  # the queue's share


def test_no_batch_is_chosen_that_takes_longer_than_the_cap(clock):
    device = Device(clock, 0.05, 0.004)
    assert found(device, max_batch_s=0.08).max_batch == 4  # takes 66 ms, and 8 images 82
    assert max(device.sizes) == 8


def test_timing_ends_when_enough_time_has_passed(clock):
    device = Device(clock, 0.3, 0.0)
    assert found(device).max_batch == 2  # twice 0.3 s for one image, twice for two
    assert max(device.sizes) == 2


def test_the_size_that_runs_out_of_memory_ends_the_search_but_a_single_image_must_run(clock):
    assert found(Device(clock, 0.02, 0.0, largest=4)).max_batch == 4
    with pytest.raises(RuntimeError, match="out of memory"):
        found(Device(clock, 0.02, 0.0, largest=0))


@pytest.mark.parametrize(("quicker", "wanted"), [(5, Layout(1, 4)), (4, Layout(4, 1)), (2, Layout(4, 1))])
def test_the_layout_with_the_most_images_per_second_wins(monkeypatch, clock, quicker, wanted):
    monkeypatch.setattr("distillery_sampler.models.tuning.cores", lambda: 4)
    one = Device(clock, 0.0, 0.04, at_once=4)
    opened: list[int] = []

    def reopen(threads: int) -> Device:
        opened.append(threads)
        return Device(clock, 0.0, 0.04 / quicker)  # all cores on one batch

    chosen, tuned = tune(one, reopen, QUESTION, SamplerSettings(max_batch=1))
    assert opened == [4]
    assert tuned.layout == wanted
    assert (chosen is one) == (wanted == Layout(4, 1))
    assert tuned.seconds == pytest.approx(0.04 if chosen is one else 0.04 / quicker)


def test_what_was_found_before_is_not_timed_again(tmp_path):
    store = ArtifactStore(tmp_path / "store")
    publish_denoiser(store, tmp_path / "one")
    before = Tuned(Layout(3, 2), 5, 0.125)
    weights = SharedWeights(lambda ref: store.fetch(ref))
    assert open_model(store, "digits", weights, SamplerSettings(), before).tuned == before
    assert open_model(store, "digits", weights, SamplerSettings(max_batch=2)).tuned.max_batch == 2


def test_every_bucket_that_a_batch_can_be_filled_up_to_is_warm():
    device = Device(Clock(), 0.0, 0.0)
    warm(device, QUESTION, 5, (1, 2, 4, 8, 16))
    assert device.sizes == [1, 2, 4, 8]
