"""Looks at a world after its faults: what was lost, run twice, half-published, left behind or changed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import select

from distill_core.artifacts import ArtifactStore, verify
from distill_core.errors import DistilleryError
from distill_service.jobs.table import Job, State
from tests.chaos.work import Feeder, Reference, weights_digest
from tests.chaos.world import World


@dataclass
class Verdict:
    """Counts that must be zero, then what it rests on. `said` has a sentence for each that is not."""

    jobs_lost: int = 0
    run_twice: int = 0
    published_twice: int = 0
    half_published: int = 0
    orphans: int = 0
    weights_differ: int = 0
    jobs: int = 0
    attempts: int = 0
    resumed: int = 0  # attempts that went on from a checkpoint
    models: int = 0  # whose weights were compared
    resent: int = 0  # submissions that were sent again
    restarts: int = 0  # of services
    said: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not any((self.jobs_lost, self.run_twice, self.published_twice, self.half_published)) and not (
            self.orphans or self.weights_differ
        )

    def __add__(self, other: Verdict) -> Verdict:
        return Verdict(**{name: getattr(self, name) + getattr(other, name) for name in vars(self)})


def judge(world: World, feeder: Feeder, reference: Reference) -> Verdict:
    """Judge a world whose jobs have ended or had the time to, and stop it."""
    found = Verdict(resent=feeder.resent)
    rows = _rows(world)
    _judge_jobs(found, rows, feeder)
    _judge_processes(found, world, rows)
    _judge_store(found, ArtifactStore(world.settings.store_url), rows, reference)
    return found


def _rows(world: World) -> list[Job]:
    assert world.db is not None
    with world.db.read() as session:
        return list(session.scalars(select(Job).order_by(Job.seq)))


def _judge_jobs(found: Verdict, rows: list[Job], feeder: Feeder) -> None:
    keys = Counter(row.idempotency_key for row in rows if row.idempotency_key)
    for key, job_id in feeder.jobs.items():
        if keys[key] != 1 or not job_id:
            found.jobs_lost += 1
            found.said.append(f"{key} is {keys[key]} times in the table")
    for row in rows:
        if row.state != State.SUCCEEDED:
            found.jobs_lost += 1
            found.said.append(
                f"job {row.id} ({row.kind}) ended as {row.state}: {row.error.get('message', '')}"
            )
    found.jobs = sum(row.kind != "pipeline" for row in rows)


def _judge_processes(found: Verdict, world: World, rows: list[Job]) -> None:
    found.run_twice = world.witness.twice()
    found.attempts = world.witness.attempts().total()
    found.resumed = sum(_resumptions(world.settings.runs / row.id) for row in rows)
    running = world.witness.running("train", "convert", "evaluate")
    over = {row.id for row in rows if row.state == State.SUCCEEDED}
    strays = [f"{line.kind} job {line.job}, process {line.pid}" for line in running if line.job in over]
    left = world.stop()
    strays += [" ".join(process.cmdline())[:200] for process in left if process.is_running()]
    found.orphans = len(strays)
    found.said += [f"left behind: {stray}" for stray in strays]
    found.restarts = sum(service.restarts for service in world.services.values())
    assert not world.processes() or found.orphans


def _resumptions(run_dir: Path) -> int:
    try:
        return (run_dir / "log.txt").read_text(errors="replace").count("resumed from step")
    except OSError:
        return 0


def _judge_store(found: Verdict, store: ArtifactStore, rows: list[Job], reference: Reference) -> None:
    publishers: Counter[str] = Counter()
    for name in store.names():
        complete = store.versions(name)
        folders = Path(store.root, name, "versions").iterdir()
        half = [
            folder for folder in folders if not folder.name.isdecimal() or int(folder.name) not in complete
        ]
        found.half_published += len(half)
        found.said += [f"half-published: {name}@{folder.name}, {_claim_of(folder, rows)}" for folder in half]
        for number in complete:
            _judge_version(found, store, f"{name}@{number}", publishers, reference)
    twice = [job for job, count in publishers.items() if count > 1 and job != "reference"]
    found.published_twice = len(twice)
    found.said += [f"published twice: by job {job}" for job in twice]
    shown = {manifest for row in rows if row.kind == "train" and (manifest := row.artifact)}
    missing = shown - {f"{name}@{number}" for name in store.names() for number in store.versions(name)}
    found.half_published += len(missing)
    found.said += [f"reported but not in the store: {ref}" for ref in missing]


def _claim_of(folder: Path, rows: list[Job]) -> str:
    try:
        key = (folder / ".claim").read_text()
    except OSError:
        return "claimed by nobody"
    kind = next((f"{row.kind} job, {row.state}, {row.artifact}" for row in rows if row.id == key), "no job")
    return f"claimed by {key} ({kind})"


def _judge_version(
    found: Verdict, store: ArtifactStore, ref: str, publishers: Counter[str], reference: Reference
) -> None:
    try:
        manifest = store.manifest(ref)
        verify(Path(store.root, manifest.name, "versions", str(manifest.version)), manifest)
    except DistilleryError as error:
        found.half_published += 1
        found.said.append(str(error))
        return
    publishers[manifest.job] += 1
    found.models += 1
    if weights_digest(manifest) != reference.weights[manifest.name]:
        found.weights_differ += 1
        found.said.append(f"weights of {ref} (job {manifest.job}) differ from an undisturbed run's")
