"""The batcher, with real threads; a gate holds the device so that what waits is known exactly."""

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest

from distill_core.errors import Overloaded
from distillery_sampler.engine.batcher import Batcher, Expired


class Device:
    """Doubles integers, remembers its batches, and works only while the gate is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.batches: list[list[int]] = []

    def __call__(self, key: object, payloads: list[int]) -> list[int]:
        self.gate.wait()
        self.batches.append(list(payloads))
        if -1 in payloads:
            raise ValueError("poison")
        return [2 * value for value in payloads]


class Seen:
    """Remembers what the batcher tells."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.refusals: list[str] = []

    def origin(self) -> None:
        return None

    def batch(self, images: int, reason: str, waits: list, seconds: float, origins: list) -> None:
        self.reasons.append(reason)

    def queue(self, images: int) -> None:
        assert images >= 0

    def rejected(self, reason: str) -> None:
        self.refusals.append(reason)


@asynccontextmanager
async def batcher_of(device: Callable, seen: Seen | None = None, **options: object):
    batcher = Batcher(device, seen or Seen(), **{"max_batch": 4, "max_queue": 64, **options})
    try:
        yield batcher
    finally:
        await batcher.close()


@contextmanager
def clock(seconds_a_look: float = 0.0) -> Iterator[None]:
    """The event loop's clock goes on only as it is looked at: estimates do not depend on how busy the machine is."""
    loop = asyncio.get_running_loop()
    looks = itertools.count(loop.time(), seconds_a_look)
    loop.time = lambda: next(looks)
    try:
        yield
    finally:
        del loop.time


async def hold(batcher: Batcher) -> asyncio.Future:
    """Occupy the device with one image, payload 0."""
    (future,) = batcher.submit("key", [0], client="holder")
    while batcher.queued:
        await asyncio.sleep(0)
    return future


def test_the_next_batch_forms_while_the_device_works():
    async def run() -> None:
        device, seen = Device(), Seen()
        async with batcher_of(device, seen) as batcher:
            held = await hold(batcher)
            futures = [batcher.submit("key", [value])[0] for value in (1, 2, 3, 4, 5)]
            device.gate.set()
            assert await asyncio.gather(held, *futures) == [0, 2, 4, 6, 8, 10]
        assert device.batches == [[0], [1, 2, 3, 4], [5]]
        assert seen.reasons == ["idle", "full", "idle"]

    asyncio.run(run())


def test_payloads_of_different_kinds_share_no_batch_and_are_answered_in_order():
    async def run() -> None:
        device = Device()
        async with batcher_of(device, partition=lambda value: value % 2) as batcher:
            held = await hold(batcher)
            futures = batcher.submit("key", [1, 2, 3, 4, 5, 6])
            device.gate.set()
            assert await asyncio.gather(held, *futures) == [0, 2, 4, 6, 8, 10, 12]
        assert device.batches == [[0], [1, 3, 5], [2, 4, 6]]

    asyncio.run(run())


def test_a_large_request_is_split_and_answered_in_order():
    async def run() -> None:
        device = Device()
        device.gate.set()
        async with batcher_of(device) as batcher:
            assert await asyncio.gather(*batcher.submit("key", range(11))) == list(range(0, 22, 2))
        assert [len(batch) for batch in device.batches] == [4, 4, 3]

    asyncio.run(run())


def test_images_with_different_keys_never_share_a_batch():
    async def run() -> None:
        device = Device()
        async with batcher_of(device) as batcher:
            held = await hold(batcher)
            futures = [batcher.submit(value % 2, [value], client="one")[0] for value in range(1, 7)]
            device.gate.set()
            await asyncio.gather(held, *futures)
        assert sorted(device.batches[1:]) == [[1, 3, 5], [2, 4, 6]]

    asyncio.run(run())


def test_a_poison_image_fails_alone():
    async def run() -> None:
        device = Device()
        async with batcher_of(device) as batcher:
            held = await hold(batcher)
            futures = [batcher.submit("key", [value])[0] for value in (1, -1, 3)]
            device.gate.set()
            await held
            results = await asyncio.gather(*futures, return_exceptions=True)
        assert results[0] == 2
        assert isinstance(results[1], ValueError)
        assert results[2] == 6

    asyncio.run(run())


@pytest.mark.parametrize("fault", ["too few answers", "an exit"])
def test_a_device_that_fails_answers_everybody_and_works_on(fault):
    def device(key: object, payloads: list[int]) -> list[int]:
        if 0 not in payloads:
            return payloads
        if fault == "an exit":
            raise SystemExit(3)
        return payloads[1:]

    async def run() -> None:
        async with batcher_of(device) as batcher:
            (broken,) = await asyncio.gather(*batcher.submit("key", [0]), return_exceptions=True)
            assert isinstance(broken, ValueError if fault == "too few answers" else SystemExit)
            assert await batcher.submit("key", [7])[0] == 7

    asyncio.run(run())


def test_a_busy_event_loop_keeps_no_device_waiting():
    async def run() -> None:
        device = Device()
        device.gate.set()
        async with batcher_of(device, max_batch=1) as batcher:
            futures = batcher.submit("key", [1, 2, 3])
            while len(device.batches) < 3:  # the loop stands still
                time.sleep(0.01)
            assert device.batches == [[1], [2], [3]]
            assert not any(future.done() for future in futures)
            assert await asyncio.gather(*futures) == [2, 4, 6]

    asyncio.run(run())


def test_a_cancelled_image_never_reaches_a_batch_and_frees_its_place():
    async def run() -> None:
        device = Device()
        async with batcher_of(device) as batcher:
            held = await hold(batcher)
            futures = batcher.submit("key", [1, 2, 3])
            futures[1].cancel()
            await asyncio.sleep(0)
            assert batcher.queued == 2
            device.gate.set()
            await asyncio.gather(held, futures[0], futures[2])
        assert device.batches == [[0], [1, 3]]

    asyncio.run(run())


def test_an_expired_image_never_reaches_a_batch():
    async def run() -> None:
        device, seen = Device(), Seen()
        async with batcher_of(device, seen) as batcher:
            held = await hold(batcher)
            now = asyncio.get_running_loop().time()
            (late,) = batcher.submit("key", [1], deadline=now + 100)
            (patient,) = batcher.submit("key", [2], deadline=now + 10_000)
            with clock(seconds_a_look=101):
                device.gate.set()
                assert await asyncio.gather(held, patient) == [0, 4]
            with pytest.raises(Expired):
                await late
        assert device.batches == [[0], [2]]
        assert seen.refusals == ["deadline"]

    asyncio.run(run())


def test_a_call_whose_deadline_the_queue_cannot_meet_is_refused_at_once():
    async def run() -> None:
        device = Device()
        async with batcher_of(device) as batcher:
            held = await hold(batcher)
            batcher.seconds_per_cost = 2.0
            waiting = batcher.submit("key", [1])
            with pytest.raises(Expired, match="longer than the call's deadline"):
                batcher.submit("key", [2], deadline=asyncio.get_running_loop().time() + 1)
            device.gate.set()
            await asyncio.gather(held, *waiting)

    asyncio.run(run())


def test_nothing_is_taken_from_a_caller_with_less_time_than_the_queue():
    async def run() -> None:
        device = Device()
        async with batcher_of(device, seconds_per_cost=1.0) as batcher:
            assert batcher.too_late(0.001) is None
            with clock():
                held = await hold(batcher)
                waiting = batcher.submit("key", [1, 2, 3])
                assert "takes about 4 s" in str(batcher.too_late(7.9))  # twice the estimate
                assert batcher.too_late(8.1) is None
            device.gate.set()
            await asyncio.gather(held, *waiting)

    asyncio.run(run())


def test_an_idle_device_is_tried_whatever_the_estimate_says_and_puts_it_right():
    async def run() -> None:
        device = Device()
        device.gate.set()
        async with batcher_of(device) as batcher:
            batcher.seconds_per_cost = 1000.0  # after a machine that stood still
            soon = asyncio.get_running_loop().time() + 500
            assert await batcher.submit("key", [1], deadline=soon)[0] == 2
            assert batcher.seconds_per_cost < 1000

    asyncio.run(run())


def test_what_would_end_too_late_makes_way_for_others():
    async def run() -> None:
        device, seen = Device(), Seen()
        async with batcher_of(device, seen, max_batch=1) as batcher:
            held = await hold(batcher)
            now = asyncio.get_running_loop().time()
            (late,) = batcher.submit("key", [1], deadline=now + 30)
            (patient,) = batcher.submit("key", [2])
            batcher.seconds_per_cost = 60.0
            device.gate.set()
            assert await asyncio.gather(held, patient) == [0, 4]
            with pytest.raises(Expired):
                await late
        assert device.batches == [[0], [2]]
        assert seen.refusals == ["deadline"]

    asyncio.run(run())


def test_a_full_queue_refuses_the_whole_request_and_says_when_to_come_back():
    async def run() -> None:
        device, seen = Device(), Seen()
        async with batcher_of(device, seen, max_queue=4) as batcher:
            with clock():
                held = await hold(batcher)
                batcher.seconds_per_cost = 0.3
                futures = batcher.submit("key", [1, 2, 3])
                with pytest.raises(Overloaded) as refusal:
                    batcher.submit("key", [4, 5])
            assert refusal.value.retry_after_s == pytest.approx(1.2)  # three wait, one runs
            assert batcher.queued == 3
            device.gate.set()
            await asyncio.gather(held, *futures)
        assert seen.refusals == ["queue"]
        assert device.batches == [[0], [1, 2, 3]]

    asyncio.run(run())


def test_one_client_cannot_take_the_whole_queue_from_others():
    async def run() -> None:
        device, seen = Device(), Seen()
        async with batcher_of(device, seen, max_queue=8) as batcher:
            held = await hold(batcher)
            futures = batcher.submit("key", [1], client="small")
            futures += batcher.submit("key", [2, 3, 4, 5], client="greedy")
            with pytest.raises(Overloaded):
                batcher.submit("key", [6], client="greedy")
            futures += batcher.submit("key", [7], client="small")
            device.gate.set()
            await asyncio.gather(held, *futures)
        assert seen.refusals == ["client_share"]

    asyncio.run(run())


def test_clients_take_turns():
    async def run() -> None:
        device = Device()
        async with batcher_of(device, max_batch=2) as batcher:
            held = await hold(batcher)
            futures = batcher.submit("key", [1, 2, 3, 4], client="first")
            futures += batcher.submit("key", [11, 12], client="second")
            device.gate.set()
            await asyncio.gather(held, *futures)
        assert device.batches == [[0], [1, 11], [2, 12], [3, 4]]

    asyncio.run(run())


def test_bulk_work_waits_for_interactive_work_but_never_starves():
    async def run() -> None:
        device = Device()
        async with batcher_of(device, max_batch=1) as batcher:
            held = await hold(batcher)
            futures = batcher.submit("key", [100], bulk=True)
            futures += batcher.submit("key", range(1, 21))
            device.gate.set()
            await asyncio.gather(held, *futures)
        order = [batch[0] for batch in device.batches]
        assert 1 < order.index(100) <= 8
        assert order[1] == 1

    asyncio.run(run())


def test_several_instances_work_at_once():
    async def run() -> None:
        together = threading.Barrier(2, timeout=40)  # breaks, and fails the test, unless two threads meet

        def device(key: object, payloads: list[int]) -> list[int]:
            together.wait()
            return payloads

        async with batcher_of(device, max_batch=1, instances=2) as batcher:
            assert await asyncio.gather(*batcher.submit("key", [1, 2])) == [1, 2]

    asyncio.run(run())


def test_idle_instances_share_what_waits():
    async def run() -> None:
        device = Device()
        async with batcher_of(device, instances=2, max_batch=8) as batcher:
            futures = batcher.submit("key", range(6))
            while batcher.queued:
                await asyncio.sleep(0)
            device.gate.set()
            await asyncio.gather(*futures)
        assert sorted(device.batches) == [[0, 1, 2], [3, 4, 5]]

    asyncio.run(run())


def test_closing_cancels_whoever_still_waits():
    async def run() -> None:
        device = Device()
        batcher = Batcher(device, Seen(), max_batch=1, max_queue=8)
        held = await hold(batcher)
        (waiting,) = batcher.submit("key", [1])
        await batcher.close()
        device.gate.set()
        assert held.cancelled()
        assert waiting.cancelled()

    asyncio.run(run())
