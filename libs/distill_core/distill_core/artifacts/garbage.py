"""Versions of a store that nothing needs, and uploads that were cut off: found, and removed. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from distill_core.artifacts import MANIFEST, ArtifactStore, Manifest
from distill_core.errors import ArtifactError, ConfigError, NotFound, Unavailable

UPLOAD_AGE_S = 86_400.0  # an upload that nobody has written to for a day has been given up


@dataclass(frozen=True)
class StoredVersion:
    """A version in a store. `claimed_by`: the key of an upload that was cut off, e.g. a job's id."""

    name: str
    version: int
    size: int  # bytes
    age_s: float
    claimed_by: str = ""

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class StoreGarbage:
    """Versions and uploads that may be removed, and the reasons for which other old versions are kept."""

    versions: tuple[StoredVersion, ...] = ()
    uploads: tuple[StoredVersion, ...] = ()
    kept: Mapping[str, str] | None = None  # name@version to a reason


def find_garbage(
    store: ArtifactStore, *, keep: int, older_than_s: float, needed: Mapping[str, str] | None = None
) -> StoreGarbage:
    """Versions older than `older_than_s` beyond the newest `keep` of their model that nothing refers to.

    An alias, a key of `needed` (a reference such as name@3 or name@prod; its value is the reason), and every kept
    version's parents and base are references. A version whose manifest cannot be read stays.
    """
    manifests, kept = _manifests(store)
    old = {ref: _age(manifest) for ref, manifest in manifests.items()}
    for name in {manifest.name for manifest in manifests.values()}:
        versions = store.versions(name)
        kept |= {f"{name}@{version}": "" for version in versions[-keep:]}
        kept |= {
            f"{name}@{v}": f"alias {alias}" for alias, v in store.aliases(name).items() if alias != "latest"
        }
    kept |= {ref: "" for ref, age in old.items() if age < older_than_s and ref not in kept}
    for ref, reason in (needed or {}).items():
        if (version := _resolved(store, ref)) is not None:
            kept[version] = reason
    _keep_parents(manifests, kept)
    gone = [m for ref, m in manifests.items() if ref not in kept]
    return StoreGarbage(
        tuple(StoredVersion(m.name, m.version, _size(m), old[m.ref]) for m in gone),
        tuple(_cut_off(store, max(older_than_s, UPLOAD_AGE_S))),
        {ref: reason for ref, reason in kept.items() if reason and old.get(ref, 0.0) >= older_than_s},
    )


def _manifests(store: ArtifactStore) -> tuple[dict[str, Manifest], dict[str, str]]:
    """Every version's manifest by its reference; and those that cannot be read, which are kept."""
    manifests, damaged = {}, {}
    for name in store.names():
        for version in store.versions(name):
            ref = f"{name}@{version}"
            try:
                manifests[ref] = store.manifest(ref)
            except ArtifactError:
                damaged[ref] = "its manifest cannot be read"
    return manifests, damaged


def _age(manifest: Manifest) -> float:
    try:
        return time.time() - datetime.fromisoformat(manifest.created).timestamp()
    except ValueError:  # no date: young for ever
        return 0.0


def _size(manifest: Manifest) -> int:
    return sum(entry.size for entry in manifest.files.values())


def _resolved(store: ArtifactStore, ref: str) -> str | None:
    try:
        name, version = store.resolve(ref)
    except (ConfigError, NotFound):
        return None
    return f"{name}@{version}"


def _keep_parents(manifests: Mapping[str, Manifest], kept: dict[str, str]) -> None:
    frontier = [ref for ref in kept if ref in manifests]
    while frontier:
        child = manifests[frontier.pop()]
        for parent in (*child.parents, str(child.card.get("base") or "")):
            if parent in manifests and parent not in kept:
                kept[parent] = f"parent of {child.ref}"
                frontier.append(parent)


def _cut_off(store: ArtifactStore, older_than_s: float) -> Iterable[StoredVersion]:
    """Numbers that were taken and never published, untouched for `older_than_s`."""
    for name in store._children(""):
        for child in store._children(f"{name}/versions"):
            folder = store._path(name, "versions", child)
            if not child.isdecimal() or store.fs.exists(f"{folder}/{MANIFEST}"):
                continue
            files = store.fs.find(folder, detail=True)
            age = time.time() - max((_written(store, path) for path in files), default=0.0)
            if age >= older_than_s and f"{folder}/{MANIFEST}" not in files:
                size = sum(int(info.get("size") or 0) for info in files.values())
                yield StoredVersion(name, int(child), size, age, _claimant(store, folder))


def _written(store: ArtifactStore, path: str) -> float:
    moment: Any = store.fs.modified(path)
    return float(moment.timestamp())


def _claimant(store: ArtifactStore, folder: str) -> str:
    try:
        claim: bytes = store.fs.cat_file(f"{folder}/.claim")
    except FileNotFoundError:
        return ""
    return claim.decode(errors="replace").strip("-")


def remove_version(store: ArtifactStore, version: StoredVersion, still_unneeded: Callable[[], bool]) -> bool:
    """Unpublish a version and remove its files. False: somebody has come to need it, and it is as it was.

    The manifest goes first: what is cut off in the middle is an upload that was never published.
    """
    folder = store._path(version.name, "versions", str(version.version))
    manifest = f"{folder}/{MANIFEST}"
    with _store_errors(store):
        if not still_unneeded():
            return False
        data = store.fs.cat_file(manifest)
        store.fs.rm_file(manifest)
        if not still_unneeded():  # it was named between the question and the removal
            store._write_atomically(manifest, data)
            return False
        store._remove(folder)
    return True


def remove_upload(store: ArtifactStore, upload: StoredVersion, still_unneeded: Callable[[], bool]) -> bool:
    """Remove what a cut-off upload left."""
    folder = store._path(upload.name, "versions", str(upload.version))
    with _store_errors(store):
        if not still_unneeded() or store.fs.exists(f"{folder}/{MANIFEST}"):
            return False
        store._remove(folder)
    return True


@contextmanager
def _store_errors(store: ArtifactStore) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(f"cannot remove from {store.url}: {error.strerror or error}") from None
