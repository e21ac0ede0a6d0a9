"""The files of a version: which may be published, what their entries say, and whether they are as published."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

from distill_core.artifacts.manifest import MANIFEST, FileEntry, Manifest
from distill_core.errors import ArtifactError

FORBIDDEN_SUFFIXES = (
    ".pkl",
    ".pickle",
    ".pt",
    ".pth",
    ".ckpt",
    ".bin",
    ".npy",
)  # formats that can execute code


def verify(folder: Path, manifest: Manifest) -> None:
    """Compare every file of `folder` with the manifest's sizes and checksums."""
    for path, entry in manifest.files.items():
        file = folder / inside(path)
        if not file.is_file():
            raise ArtifactError(f"{manifest.ref}: file {path} is missing; publish the model again")
        if entry_of(file) != entry:
            raise ArtifactError(
                f"{manifest.ref}: checksum of {path} differs from its manifest; publish the model again"
            )


def inside(path: str) -> str:
    """The path as a manifest has it; ArtifactError if it leaves the version's folder."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts:
        raise ArtifactError(f"a manifest names the file {path!r}, which leaves the model's folder")
    return path


def publishable(folder: Path) -> list[str]:
    """Every file below `folder`, as paths in it; ArtifactError for a link or a format that can execute code."""
    paths = []
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder).as_posix()
        if file.is_symlink():
            raise ArtifactError(f"{path} is a link; a published model holds files only")
        if file.is_file() and path not in (MANIFEST, ".claim"):
            if file.suffix in FORBIDDEN_SUFFIXES:
                raise ArtifactError(
                    f"{path} is refused: {file.suffix} files can execute code; save it as safetensors"
                )
            paths.append(path)
    return paths


def entry_of(file: Path) -> FileEntry:
    """The manifest's entry of a file: its size and checksum."""
    with file.open("rb") as stream:
        return FileEntry(size=file.stat().st_size, sha256=hashlib.file_digest(stream, "sha256").hexdigest())
