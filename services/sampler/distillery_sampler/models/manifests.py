"""Manifests of the store's versions, read once: a version never changes."""

from __future__ import annotations

import asyncio

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.errors import ArtifactError, NotFound
from distill_core.kinds.cards import generator_card

Key = tuple[str, int]  # name, version
KEPT = 64


class Manifests:
    """The manifests of a store's versions."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._kept: dict[Key, Manifest] = {}

    async def get(self, key: Key) -> Manifest:
        """One version's.

        Raises:
            NotFound: there is no such version. ArtifactError: it is damaged.
        """
        if key not in self._kept:
            manifest = await asyncio.to_thread(self._store.manifest, f"{key[0]}@{key[1]}")
            while len(self._kept) >= KEPT:
                self._kept.pop(next(iter(self._kept)))  # the oldest: it can be read again
            self._kept[key] = manifest
        return self._kept[key]

    async def base(self, manifest: Manifest) -> Manifest | None:
        """The version that an adapter adapts; None where a version needs no other.

        Raises:
            ArtifactError: it is not in the store.
        """
        card = generator_card(manifest)
        if manifest.form != "adapter" or not card.base:
            return None
        name, _, version = card.base.partition("@")
        try:
            return await self.get((name, int(version)))
        except NotFound:
            raise ArtifactError(
                f"{manifest.ref} is an adapter over {card.base}, which is missing; publish it in this store"
            ) from None
