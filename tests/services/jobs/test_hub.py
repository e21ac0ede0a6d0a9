"""Many watchers, one poller: all get everything, in order, and what it costs does not follow their number."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest

from distill_core.errors import NotFound, Unavailable
from distill_service.jobs import hub as hubs
from distill_service.jobs import queue, requests
from distill_service.jobs.database import Database
from distill_service.jobs.hub import Hub
from distill_service.jobs.queue import Outcome
from distill_service.jobs.watch import Cursor, Notice, Options
from tests.services.jobs.jobs_child import PNG
from tests.services.jobs.jobs_stack import convert, submit, train

SOON = 0.02


async def until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


class Reader:
    """A watcher that keeps what it gets."""

    def __init__(self, hub: Hub, job_id: str, **options) -> None:
        self.got: list[Notice] = []
        self.task = asyncio.create_task(self._read(hub, job_id, Options(**options)))

    async def _read(self, hub: Hub, job_id: str, options: Options) -> None:
        async with aclosing(hub.follow(job_id, options)) as notices:
            async for notice in notices:
                self.got.append(notice)

    @property
    def said(self) -> list[str]:
        return [f"{n.what} {getattr(n.value, 'what', '')}".strip() for n in self.got]

    @property
    def lines(self) -> list[int]:
        return [n.value["step"] for n in self.got if n.what == "metrics"]


def write(runs: Path, job_id: str, *steps: int) -> None:
    (runs / job_id).mkdir(parents=True, exist_ok=True)
    with (runs / job_id / "metrics.jsonl").open("a") as file:
        file.writelines(f'{{"step": {step}}}\n' for step in steps)


def finish(db) -> None:
    claim = queue.claim(db, ["train"], worker="w", lease_s=60)
    queue.finish(db, claim.id, claim.attempt, Outcome("succeeded", artifact="digits@1"))


def test_a_thousand_watchers_look_as_often_as_one(db, tmp_path):
    job = submit(db, train()).job
    write(tmp_path, job.id, 1, 2)

    async def scenario() -> None:
        hub = Hub(db, tmp_path, look_s=SOON)
        readers = [Reader(hub, job.id) for _ in range(500)]
        await until(lambda: all(reader.lines == [1, 2] for reader in readers))
        readers += [Reader(hub, job.id) for _ in range(500)]  # they catch up, and join the others
        await until(lambda: all(reader.lines == [1, 2] for reader in readers) and hub.groups == 1)
        before = hub.looks
        write(tmp_path, job.id, 3)
        finish(db)
        await asyncio.gather(*(reader.task for reader in readers))
        assert all(reader.lines == [1, 2, 3] for reader in readers)
        ended = ["job", "change submitted", "metrics", "metrics"]
        assert all(reader.said[:4] == ended and reader.said[-1] == "job" for reader in readers)
        assert all(reader.got[-1].value.job.artifact == "digits@1" for reader in readers)
        assert hub.looks - before < 100  # a few rounds of one group, not of a thousand
        assert hub.groups == 0
        hub.close()

    asyncio.run(scenario())


def test_who_comes_from_another_point_gets_what_is_missing_and_joins(db, tmp_path):
    job = submit(db, train()).job
    write(tmp_path, job.id, *range(5))

    async def scenario() -> None:
        hub = Hub(db, tmp_path, look_s=SOON)
        first = Reader(hub, job.id)
        await until(lambda: len(first.lines) == 5)
        place = next(n.cursor for n in first.got if n.what == "metrics" and n.value["step"] == 2)
        second = Reader(hub, job.id, cursors={job.id: place})
        await until(lambda: second.lines == [3, 4] and hub.groups == 1)
        only_new = Reader(hub, job.id, only_new=True)
        with_log = Reader(hub, job.id, with_log=True)
        await until(lambda: with_log.lines == list(range(5)) and hub.groups == 2)  # a log is read for its own
        (tmp_path / job.id / "log.txt").write_text("hello\n")
        write(tmp_path, job.id, 5)
        finish(db)
        await asyncio.gather(*(reader.task for reader in (first, second, only_new, with_log)))
        assert (first.lines, second.lines, only_new.lines) == ([*range(6)], [3, 4, 5], [5])
        assert [n.value for n in with_log.got if n.what == "log"] == ["hello\n"]
        assert "log" not in [n.what for n in first.got]
        hub.close()

    asyncio.run(scenario())


def test_a_reader_of_no_log_keeps_the_place_in_the_log_that_it_came_with(db, tmp_path):
    job = submit(db, train()).job
    write(tmp_path, job.id, 1)

    async def scenario() -> None:
        hub = Hub(db, tmp_path, look_s=SOON)
        readers = [Reader(hub, job.id, cursors={job.id: Cursor(log_offset=n)}) for n in range(3)]
        await until(lambda: all(reader.lines == [1] for reader in readers) and hub.groups == 1)
        finish(db)
        await asyncio.gather(*(reader.task for reader in readers))
        for n, reader in enumerate(readers):
            assert {notice.cursor.log_offset for notice in reader.got} == {n}
        hub.close()

    asyncio.run(scenario())


def test_a_slow_reader_is_left_behind_and_still_gets_everything_once(db, tmp_path, monkeypatch):
    monkeypatch.setattr(hubs, "_BACKLOG", 2)
    job = submit(db, train()).job
    write(tmp_path, job.id, 0)

    async def scenario() -> None:
        hub = Hub(db, tmp_path, look_s=SOON)
        quick = Reader(hub, job.id)
        slow, got = hub.follow(job.id, Options()), []
        got.append(await anext(slow))
        for step in range(1, 8):
            write(tmp_path, job.id, step)
            await until(lambda step=step: quick.lines[-1:] == [step])
        assert hub.groups == 1  # nobody waits for the slow one
        finish(db)
        async for notice in slow:
            got.append(notice)
        await quick.task
        assert [n.value["step"] for n in got if n.what == "metrics"] == quick.lines == [*range(8)]
        changes = [n.value.what for n in got if n.what == "change"]
        assert changes == ["submitted", "claimed", "succeeded"]
        hub.close()

    asyncio.run(scenario())


def test_pictures_go_to_those_who_want_them(db, tmp_path):
    job = submit(db, train()).job
    samples = tmp_path / job.id / "samples"
    samples.mkdir(parents=True)
    (samples / "00000001.png").write_bytes(PNG)

    async def scenario() -> None:
        hub = Hub(db, tmp_path, look_s=SOON)
        plain, wants = Reader(hub, job.id), Reader(hub, job.id, with_samples=True)
        finish(db)
        await asyncio.gather(plain.task, wants.task)
        assert [n.value.data for n in plain.got if n.what == "sample"] == [b""]
        assert [n.value.data for n in wants.got if n.what == "sample"] == [PNG]
        hub.close()

    asyncio.run(scenario())


def test_all_stages_of_a_pipeline_are_told_to_each(db, tmp_path):
    whole = submit(db, train("student"), convert("{student}", "onnx"), pipeline=True)

    async def scenario() -> None:
        hub = Hub(db, tmp_path, look_s=SOON)
        readers = [Reader(hub, whole.job.id) for _ in range(3)]
        await until(lambda: all(len(reader.got) >= 3 for reader in readers))
        requests.cancel(db, whole.job.id)
        await asyncio.gather(*(reader.task for reader in readers))
        wanted = {whole.job.id, *(stage.id for stage in whole.stages)}
        assert all({notice.job_id for notice in reader.got} == wanted for reader in readers)
        hub.close()

    asyncio.run(scenario())


def test_an_unknown_job_is_not_found_and_who_leaves_costs_nothing(db, tmp_path):
    job = submit(db, train()).job

    async def scenario() -> None:
        hub = Hub(db, tmp_path, look_s=SOON)
        with pytest.raises(NotFound, match="no job has the id"):
            await anext(hub.follow("nobody", Options()))
        readers = [Reader(hub, job.id) for _ in range(3)]
        await until(lambda: all(reader.got for reader in readers))
        for reader in readers:
            reader.task.cancel()
        await asyncio.gather(*(reader.task for reader in readers), return_exceptions=True)
        assert hub.groups == 0
        await until(lambda: hub._poller is None or hub._poller.done())
        later = Reader(hub, job.id)  # and the poller starts again
        await until(lambda: bool(later.got))
        later.task.cancel()
        hub.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("instead", ["nothing", "a folder", "another table"])
def test_a_job_table_that_goes_away_ends_the_watch(db, tmp_path, instead):
    job = submit(db, train()).job
    path = Path(str(db.engine.url.database))

    async def scenario() -> None:
        hub = Hub(db, tmp_path / "runs", look_s=SOON)
        reader = Reader(hub, job.id)
        await until(lambda: bool(reader.got))  # its connection stays open
        for file in path.parent.glob(f"{path.name}*"):
            file.unlink()
        if instead == "a folder":
            path.mkdir()
        if instead == "another table":
            Database.open(f"sqlite:///{path}").close()
        with pytest.raises(NotFound if instead == "another table" else Unavailable):
            await asyncio.wait_for(reader.task, 30)
        hub.close()

    asyncio.run(scenario())
