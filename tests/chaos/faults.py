"""The faults. Each is done to a running world at a moment that the seed chooses, and undone before it returns.

A worker is supervisor and pool in one process (services/trainer/README.md), so these three die together.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import psutil
import redis

from distill_core.errors import Unavailable
from distill_service.jobs.broker import broker_url
from distill_service.jobs.celery_app import make_app, wake
from tests.chaos.world import SHORT, WORKERS, World

QUEUES = ("train", "eval", "convert")
TRAINERS = [name for name, queues in WORKERS.items() if "train" in queues]
_PATIENCE_S = 60.0  # for the chance that a fault needs


class NotNow(Exception):
    """The fault had no chance: nothing of its kind runs."""


@dataclass(frozen=True)
class Fault:
    """A kind of fault. `missing(world)` says why it cannot be done there; empty if it can."""

    name: str
    do: Callable[[World, Random], None]
    missing: Callable[[World], str] = lambda world: ""


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@contextlib.contextmanager
def frozen(*pids: int) -> Iterator[None]:
    """These processes stand still for the block."""
    for pid in pids:
        _signal(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            _signal(pid, signal.SIGCONT)


def _job(world: World, rng: Random, *kinds: str) -> int:
    """A job process of these kinds, at any moment of its life."""
    deadline = time.monotonic() + _PATIENCE_S
    while not (running := world.witness.running(*kinds)):
        if time.monotonic() > deadline:
            raise NotNow
        time.sleep(0.02)
    chosen = rng.choice(running)
    time.sleep(rng.random() * 2.0)
    return chosen.pid


def job_signal(number: signal.Signals, *kinds: str) -> Callable[[World, Random], None]:
    """Send a signal to a job's process."""

    def do(world: World, rng: Random) -> None:
        _signal(_job(world, rng, *kinds), number)

    return do


def freeze_job(world: World, rng: Random) -> None:
    """A job's process stands still; its supervisor goes on."""
    with frozen(_job(world, rng, "train", "convert", "evaluate")):
        time.sleep(0.5 + 2 * rng.random())


def kill_while_saving(world: World, rng: Random) -> None:
    """The trainer is killed while a checkpoint is half-written."""
    _kill_when(lambda: list(world.settings.runs.glob("*/checkpoints/.partial-*")), world, rng)


def kill_while_publishing(world: World, rng: Random) -> None:
    """The publisher is killed between the claim of a version's number and its manifest."""
    store = Path(world.settings.store_url)

    def publishing() -> bool:
        claims = sorted(store.glob("*/versions/*/.claim"), key=lambda path: path.stat().st_mtime)[-4:]
        return any(not claim.with_name("manifest.json").exists() for claim in claims)

    _kill_when(publishing, world, rng)


def _kill_when(moment: Callable[[], object], world: World, rng: Random) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        with contextlib.suppress(OSError):  # what was listed may be gone
            if moment():
                break
        if time.monotonic() > deadline:
            raise NotNow
        time.sleep(0.002)
    for line in world.witness.running("train", "convert"):
        _signal(line.pid, signal.SIGKILL)


def service_signal(number: signal.Signals, *names: str) -> Callable[[World, Random], None]:
    """Send a signal to one of these services; its keeper starts it again when it has ended."""

    def do(world: World, rng: Random) -> None:
        _signal(_pid(world, rng.choice(names)), number)

    return do


def _pid(world: World, name: str) -> int:
    """The process of a service; one that is being started again is waited for."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return world.pid(name)
        except LookupError:
            if time.monotonic() > deadline:
                raise NotNow from None
        time.sleep(0.1)


def freeze_service(seconds: float, *names: str) -> Callable[[World, Random], None]:
    """One of these services stands still for about so long."""

    def do(world: World, rng: Random) -> None:
        with frozen(_pid(world, rng.choice(names))):
            time.sleep(seconds * (0.8 + 0.4 * rng.random()))

    return do


def kill_all(world: World, _rng: Random) -> None:
    """Everything on the machine at once, as a power cut does."""
    for process in world.processes():
        with contextlib.suppress(psutil.Error):
            process.kill()


def lose_messages(world: World, _rng: Random) -> None:
    """Every message that waits is gone."""
    folder = world.state / "broker" / "messages"
    for message in folder.glob("*.msg") if folder.is_dir() else ():
        message.unlink(missing_ok=True)
    if world.broker != "filesystem":
        with _redis(world) as client:
            client.flushall()


def break_messages(world: World, rng: Random) -> None:
    """A message that was cut off while it was written."""
    if world.broker == "filesystem":
        name = f"{time.time_ns()}_broken.{rng.choice(QUEUES)}.msg"
        (world.state / "broker" / "messages" / name).write_bytes(b'{"body": "W1')
        return
    with _redis(world) as client:
        client.lpush(rng.choice(QUEUES), '{"body": "W1')


def lose_redis(world: World, rng: Random) -> None:
    """Redis dies and what it kept is gone too."""
    service_signal(signal.SIGKILL, "redis")(world, rng)
    for file in (world.folder / "redis").rglob("*.*"):
        if file.is_file():
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def _redis(world: World) -> Iterator[redis.Redis]:
    _pid(world, "redis")
    url = broker_url(world.settings).replace("redis+socket://", "unix://")
    try:
        with redis.Redis.from_url(url, socket_timeout=2, socket_connect_timeout=2) as client:
            yield client
    except (redis.RedisError, OSError):
        raise NotNow from None


def double_messages(world: World, rng: Random) -> None:
    """Ten wake-ups for each queue, with and without work for them."""
    app = make_app(broker_url(world.settings))
    with contextlib.suppress(Unavailable):
        for _ in range(10):
            wake(app, QUEUES)
    app.close()


def fill_disk(world: World, rng: Random) -> None:
    """No byte is free where jobs, table, messages and store lie, for some seconds."""
    ballast = world.folder / "disk" / "ballast"
    with ballast.open("wb") as file, contextlib.suppress(OSError):
        free = os.statvfs(ballast.parent)
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)
    try:
        _fill(ballast, rng.randrange(1 << 15))
        time.sleep(1 + 3 * rng.random())
    finally:
        ballast.unlink()


def _fill(file: Path, less: int) -> None:
    """Take every page, then give `less` bytes back."""
    with file.open("ab", buffering=0) as ballast, contextlib.suppress(OSError):
        while ballast.write(bytes(4096)):
            pass
    os.truncate(file, max(0, file.stat().st_size - less))


def limit_files(world: World, rng: Random) -> None:
    """A job's process may write no file of more than some kilobytes: its store fails in the middle of a publish."""
    pid = _job(world, rng, "train", "convert")
    with contextlib.suppress(psutil.Error):
        size = rng.choice([256, 1024, 4096, 16384])
        psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (size, psutil.RLIM_INFINITY))


def refuse_publish(world: World, rng: Random) -> None:
    """A model's folder in the store is taken away while jobs publish, and comes back."""
    names = [path for path in Path(world.settings.store_url).glob("field-*/versions")]
    if not names:
        raise NotNow
    chosen = rng.choice(names)
    hidden = chosen.with_name("versions-gone")
    os.replace(chosen, hidden)
    chosen.write_bytes(b"a file where the folder should be")
    try:
        time.sleep(1 + 3 * rng.random())
    finally:
        chosen.unlink()
        os.replace(hidden, chosen)


def crash_database(world: World, rng: Random) -> None:
    """PostgreSQL dies without a checkpoint and is away for a moment."""
    assert world.postgres is not None
    world.postgres.crash()
    time.sleep(2 * rng.random())
    world.postgres.start()


def set_clock(world: World, rng: Random) -> None:
    """The clock that leases are read on jumps by up to a day, and some seconds later back."""
    seconds = rng.choice([-86_400, -3600, -60, 60, 3600, 86_400])
    with contextlib.suppress(Unavailable):
        world.set_clock(seconds)
        time.sleep(2 + 3 * rng.random())
        world.set_clock(-seconds)


def _needs_disk(world: World) -> str:
    return (
        "" if world.own_disk else "fill_disk: this user cannot mount a small disk; limit_files stands for it"
    )


def _needs_redis(world: World) -> str:
    return "redis faults: this broker is a folder" if world.broker == "filesystem" else ""


def _needs_postgres(world: World) -> str:
    return "" if world.postgres else "crash_database: this world keeps its jobs in SQLite"


_LONG_S = SHORT["lease_s"] + 2 * SHORT["reap_s"]  # long enough for others to take the jobs over
_ALL = ("train", "convert", "evaluate")
FAULTS = (
    Fault("kill_trainer", job_signal(signal.SIGKILL, "train")),
    Fault("stop_trainer", job_signal(signal.SIGTERM, "train")),
    Fault("kill_converter", job_signal(signal.SIGKILL, "convert")),
    Fault("kill_job", job_signal(signal.SIGKILL, *_ALL)),
    Fault("freeze_job", freeze_job),
    Fault("kill_while_saving", kill_while_saving),
    Fault("kill_while_publishing", kill_while_publishing),
    Fault("kill_worker", service_signal(signal.SIGKILL, *TRAINERS)),
    Fault("kill_converter_worker", service_signal(signal.SIGKILL, "converter")),
    Fault("preempt_worker", service_signal(signal.SIGTERM, *WORKERS)),
    Fault("freeze_worker", freeze_service(2.0, *WORKERS)),
    Fault("freeze_worker_past_lease", freeze_service(_LONG_S, *TRAINERS)),
    Fault("kill_api", service_signal(signal.SIGKILL, "api")),
    Fault("freeze_api", freeze_service(2.0, "api")),
    Fault("kill_all", kill_all),
    Fault("kill_redis", service_signal(signal.SIGKILL, "redis"), _needs_redis),
    Fault("kill_redis_and_its_data", lose_redis, _needs_redis),
    Fault("freeze_redis", freeze_service(4.0, "redis"), _needs_redis),
    Fault("crash_database", crash_database, _needs_postgres),
    Fault("drop_messages", lose_messages),
    Fault("double_messages", double_messages),
    Fault("break_message", break_messages),
    Fault("fill_disk", fill_disk, _needs_disk),
    Fault("limit_files", limit_files),
    Fault("refuse_publish", refuse_publish),
    Fault("set_clock", set_clock),
)
