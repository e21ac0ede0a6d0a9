"""Immutable, versioned, checksummed models in a store (any fsspec URL). Imports no torch.

<root>/<name>/versions/<n>/.claim          exclusive: two publishers never get one number
                           manifest.json   written last: a version exists if and only if this file does
                           model_index.json, unet/ …, exports/<target>/ …, recipe.toml, preview.png,
                           README.md       the model card
<root>/<name>/aliases/<alias>.json         moved atomically
<root>/<name>/history/<time>-<alias>.json  every move of an alias
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from distill_core.artifacts.files import entry_of, inside, publishable, verify
from distill_core.artifacts.manifest import MANIFEST, AliasMove, FileEntry, Manifest
from distill_core.artifacts.model_card import CARD, model_card
from distill_core.artifacts.remote import RemoteFileSystem
from distill_core.artifacts.upgrade import upgraded
from distill_core.config import check_name, is_reserved_alias
from distill_core.errors import ArtifactError, ConfigError, NotFound, Unavailable, nearest
from distill_core.files.paths import user_path


class ArtifactStore:
    """A store of models at a local folder or any fsspec URL (`s3://bucket/prefix`)."""

    def __init__(self, url: str | Path) -> None:
        self.url = str(url)
        try:
            self.fs, root = _opened(self.url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"artifact store {self.url!r} cannot be opened: {error}") from None
        self.root = root.rstrip("/")
        self.local = "file" in (
            (self.fs.protocol,) if isinstance(self.fs.protocol, str) else self.fs.protocol
        )
        if not self.local:
            self.fs = RemoteFileSystem(self.fs, self.url)

    # -- reading ------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Names of all models with at least one complete version."""
        return [name for name in self._children("") if self.versions(name)]

    def versions(self, name: str) -> list[int]:
        """Complete versions of a model, ascending."""
        check_name(name, what="model", field="model")
        return [
            n for n in self._numbers(name) if self._exists(self._path(name, "versions", str(n)), MANIFEST)
        ]

    def aliases(self, name: str) -> dict[str, int]:
        """Alias -> version; `latest` is always the highest complete version."""
        check_name(name, what="model", field="model")
        moved = {}
        for child in self._children(f"{name}/aliases"):
            if child.endswith(".json"):
                moved[child.removesuffix(".json")] = self._read_move(name, "aliases", child).version
        versions = self.versions(name)
        return {**moved, **({"latest": versions[-1]} if versions else {})}

    def resolve(self, ref: str) -> tuple[str, int]:
        """`name`, `name@3` or `name@alias` as (name, version).

        Raises:
            ConfigError: not of that form. NotFound: no such model, version or alias.
        """
        name, _, version = ref.partition("@")
        check_name(name, what="model", field="model")
        versions = self.versions(name)
        if not versions:
            raise NotFound(f"no model is called {name!r}{nearest(name, self.names())}", field="model")
        if version.isdecimal():
            if len(version) > 18 or int(version) not in versions:
                shown = ", ".join(map(str, versions[-8:]))
                raise NotFound(f"{name} has no version {version}; it has {shown}", field="version")
            return name, int(version)
        aliases = self.aliases(name)
        alias = version or "latest"
        if alias not in aliases:
            raise NotFound(f"{name} has no alias {alias!r}{nearest(alias, aliases)}", field="version")
        return name, aliases[alias]

    def manifest(self, ref: str) -> Manifest:
        """The manifest of a version."""
        name, version = self.resolve(ref)
        values = self._read_json(name, "versions", str(version), MANIFEST)
        try:
            return Manifest.parse(upgraded(values))
        except ConfigError as error:
            raise ArtifactError(f"manifest of {name}@{version} cannot be read: {error}") from None

    def fetch(self, ref: str, cache: Path | None = None) -> Path:
        """A local folder with the verified files of a version; a remote store is copied into `cache` first.

        Raises:
            ArtifactError: a file is missing or its checksum differs; the message names the file.
        """
        manifest = self.manifest(ref)
        source = self._path(manifest.name, "versions", str(manifest.version))
        if self.local:
            verify(Path(source), manifest)
            return Path(source)
        cache = cache or Path(tempfile.gettempdir()) / "distillery-models"
        target = (
            cache / hashlib.sha256(self.url.encode()).hexdigest()[:12] / manifest.name / str(manifest.version)
        )
        if _whole(target, manifest):
            return target
        partial = self._download(source, manifest, _made(target.parent))
        try:
            os.replace(partial, target)
        except OSError:  # another process was first
            shutil.rmtree(partial, ignore_errors=True)
        return target

    def _download(self, source: str, manifest: Manifest, beside: Path) -> Path:
        """A new folder in `beside` with a version's files; it is verified before anybody can take it for good."""
        partial = Path(tempfile.mkdtemp(prefix=".fetch-", dir=beside))
        try:
            for path in manifest.files:
                local = partial / inside(path)
                local.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):  # which `verify` says in a sentence
                    self.fs.get_file(f"{source}/{path}", str(local))
            (partial / MANIFEST).write_text(manifest.model_dump_json(), encoding="utf-8")
            verify(partial, manifest)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return partial

    def read_bytes(self, ref: str, path: str) -> bytes:
        """One verified file of a version, e.g. its preview."""
        manifest = self.manifest(ref)
        if path not in manifest.files:
            raise NotFound(f"{manifest.ref} has no file {path!r}{nearest(path, manifest.files)}")
        data: bytes = self.fs.cat_file(self._path(manifest.name, "versions", str(manifest.version), path))
        if hashlib.sha256(data).hexdigest() != manifest.files[path].sha256:
            raise ArtifactError(
                f"{manifest.ref}: checksum of {path} differs from its manifest; publish it again"
            )
        return data

    def published_with(self, name: str, key: str) -> Manifest | None:
        """The version that was published with this key."""
        for version in reversed(self.versions(name)):
            try:
                manifest = self.manifest(f"{name}@{version}")
            except ArtifactError:  # another version's damage must not keep this one from being published
                continue
            if manifest.job == key:
                return manifest
        return None

    # -- writing ------------------------------------------------------------------------------------------------

    def publish(self, folder: Path, manifest: Manifest, *, key: str = "") -> Manifest:
        """Publish `folder` as the next version. The same non-empty `key` (a job's id) never publishes twice.

        Raises:
            ArtifactError: the folder holds a format that can execute code, or a link that leaves it.
            Unavailable: the store cannot be written.
        """
        files = {path: entry_of(folder / path) for path in publishable(folder) if path != CARD}
        try:
            published = self.published_with(manifest.name, key) if key else None
            if published is not None:
                return published
            version = self._claim(manifest.name, key)
            target = self._path(manifest.name, "versions", str(version))
            for path in files:
                self._put(folder / path, f"{target}/{path}")
            card = model_card(manifest.model_copy(update={"version": version}), _read(folder / CARD)).encode()
            self._write_atomically(f"{target}/{CARD}", card)
            files[CARD] = FileEntry(size=len(card), sha256=hashlib.sha256(card).hexdigest())
            complete = manifest.model_copy(
                update={
                    "version": version,
                    "created": datetime.now(UTC).isoformat(timespec="seconds"),
                    "files": files,
                }
            )
            complete = Manifest.parse(complete.model_dump())
            self._write_atomically(f"{target}/{MANIFEST}", complete.model_dump_json(indent=1).encode())
        except OSError as error:
            raise Unavailable(f"cannot publish to {self.url}: {error.strerror or error}") from error
        return complete

    def withdraw(self, name: str, key: str) -> None:
        """Remove what an interrupted `publish` with this key left, for a caller that has nothing to publish any more.

        Raises:
            Unavailable: the store cannot be written.
        """
        try:
            number = self._claimed(name, key)
            folder = self._path(name, "versions", str(number))
            if number is not None and not self._exists(folder, MANIFEST):
                self._remove(folder)
        except OSError as error:
            raise Unavailable(f"cannot remove from {self.url}: {error.strerror or error}") from error

    def set_alias(self, name: str, alias: str, version: int, *, who: str = "") -> AliasMove:
        """Move an alias to a version, atomically, and keep the move in the history."""
        check_name(alias, what="alias", field="alias")
        if is_reserved_alias(alias):
            raise ConfigError(f"alias {alias!r} is reserved; choose another name, e.g. 'prod'", field="alias")
        version = self.manifest(f"{name}@{version}").version  # a version that cannot be read is no target
        move = AliasMove(
            alias=alias,
            version=version,
            previous=self.aliases(name).get(alias),
            who=who,
            when=datetime.now(UTC).isoformat(timespec="microseconds"),
        )
        data = move.model_dump_json().encode()
        self._write_atomically(self._path(name, "history", f"{time.time_ns()}-{alias}.json"), data)
        self._write_atomically(self._path(name, "aliases", f"{alias}.json"), data)
        return move

    def history(self, name: str) -> list[AliasMove]:
        """All moves of a model's aliases, oldest first."""
        check_name(name, what="model", field="model")
        return [self._read_move(name, "history", child) for child in self._children(f"{name}/history")]

    # -- inside -------------------------------------------------------------------------------------------------

    def _path(self, *parts: str) -> str:
        return "/".join([self.root, *parts])

    def _children(self, path: str) -> list[str]:
        try:
            entries = self.fs.ls(self._path(path) if path else self.root, detail=False)
        except FileNotFoundError:
            return []
        return sorted(PurePosixPath(entry).name for entry in entries)

    def _read_json(self, *parts: str) -> dict[str, Any]:
        try:
            values = json.loads(self.fs.cat_file(self._path(*parts)))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ArtifactError(f"{'/'.join(parts)} in {self.url} is damaged: {error}") from None
        if not isinstance(values, dict):
            raise ArtifactError(f"{'/'.join(parts)} in {self.url} is damaged: it holds no table")
        return values

    def _read_move(self, *parts: str) -> AliasMove:
        try:
            return AliasMove.parse(self._read_json(*parts))
        except ConfigError as error:
            raise ArtifactError(
                f"{'/'.join(parts)} in {self.url} is damaged: {error}; remove it and set the alias again"
            ) from None

    def _claim(self, name: str, key: str) -> int:
        """The next free number, taken by an exclusive create. A number left half-published by `key` is taken again."""
        if key and (own := self._claimed(name, key)) is not None:
            return own
        base, taken = self._path(name, "versions"), self._numbers(name)
        used = (f"{base}/{number}" for number in reversed(taken))  # a folder alone is what a kill left
        last = next((path for path in used if self._exists(path, ".claim", MANIFEST)), "0")
        number = int(last.rpartition("/")[2]) + 1
        while True:
            try:
                self._create(f"{base}/{number}/.claim", key.encode() or b"-")
                return number
            except FileExistsError:
                number += 1

    def _claimed(self, name: str, key: str) -> int | None:
        """The number that was taken with this key."""
        for number in self._numbers(name):
            claim = self._path(name, "versions", str(number), ".claim")
            if self.fs.exists(claim) and self.fs.cat_file(claim).decode() == key:
                return number
        return None

    def _numbers(self, name: str) -> list[int]:
        """All numbers that have a folder, published or not, ascending."""
        return sorted(int(child) for child in self._children(f"{name}/versions") if child.isdecimal())

    def _remove(self, folder: str) -> None:
        """Remove a folder without a manifest, its claim first: who tries again then takes a number of its own."""
        if self.fs.exists(f"{folder}/.claim"):
            self.fs.rm_file(f"{folder}/.claim")
        if self.local:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(folder)
            return
        for path in self.fs.find(folder):  # a recursive `rm` takes the folder's name for a pattern
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(path)

    def _exists(self, folder: str, *names: str) -> bool:
        return any(self.fs.exists(f"{folder}/{name}") for name in names)

    def _create(self, target: str, data: bytes) -> None:
        """Write a file that must not exist; of several who try at once, one succeeds."""
        if not self.local:
            self.fs.pipe_file(target, data, mode="create")
            return
        path = Path(target)  # fsspec's own looks first and then writes, which is not exclusive on a disk
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.link(temporary, path)  # whole or not at all: an empty claim would be nobody's for ever
        finally:
            Path(temporary).unlink(missing_ok=True)

    def _put(self, source: Path, target: str) -> None:
        if self.local:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        else:
            self.fs.put_file(str(source), target)

    def _write_atomically(self, target: str, data: bytes) -> None:
        if not self.local:
            self.fs.pipe_file(target, data)  # one PUT is atomic
            return
        path = Path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _opened(url: str) -> tuple[Any, str]:
    """The file system and the root in it; a folder of this machine is no URL, whatever its name."""
    if "://" in url:
        opened: tuple[Any, str] = fsspec.core.url_to_fs(url, use_listings_cache=False)
        return opened
    return fsspec.filesystem("file"), os.path.abspath(user_path(url))


def _whole(folder: Path, manifest: Manifest) -> bool:
    """Whether a copy is there and undamaged; a damaged one is put away, so that it is fetched again."""
    if not (folder / MANIFEST).exists():
        return False
    try:
        verify(folder, manifest)
    except ArtifactError:
        away = Path(tempfile.mkdtemp(prefix=".damaged-", dir=folder.parent))
        with contextlib.suppress(OSError):  # another process was first
            os.replace(folder, away)
        shutil.rmtree(away, ignore_errors=True)
        return False
    return True


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # none, or no text: the card says what the manifest knows
        return ""


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
