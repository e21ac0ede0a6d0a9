"""Eviction of loaded models when another one needs their place: the longest unused, never a preloaded one."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping

from distill_core.artifacts import Manifest
from distill_core.errors import ArtifactError, Overloaded
from distill_core.kinds.cards import generator_card
from distillery_sampler.backends.opening import usable
from distillery_sampler.models.loading import LoadedModel
from distillery_sampler.models.manifests import Key, Manifests
from distillery_sampler.models.memory import default_limit, readable, total, weight_bytes
from distillery_sampler.settings import SamplerSettings

NO_ROOM = (
    "there is no room beside the preloaded models, which stay; preload fewer, or raise "
    "DISTILLERY_SAMPLER_MAX_MODELS or DISTILLERY_SAMPLER_MAX_MEMORY"
)


class ModelBudget:
    """Budget of loaded models: their number, and the memory of all together."""

    def __init__(self, settings: SamplerSettings, manifests: Manifests) -> None:
        self._settings, self._manifests = settings, manifests
        self._limit = settings.max_memory
        self._reserved: dict[Key, int] = {}  # bytes that models which are being loaded will need, about

    def limit(self) -> int:
        """Bytes for all models together; the first call may import torch to ask a GPU."""
        if self._limit is None:
            self._limit = default_limit(self._settings.device)
        return self._limit

    async def needed(self, key: Key, loaded: Mapping[Key, LoadedModel]) -> int:
        """Bytes that a version will need, by its files: its own weights, and its base's if that is not among `loaded`.

        Raises:
            NotFound, ArtifactError: it cannot be served, or is more than all models together may take.
            Unavailable: a package is missing.
        """
        manifest = await self._manifests.get(key)
        target = usable(manifest, self._settings)[0].target
        need = weight_bytes(manifest, target)
        if target is None and generator_card(manifest).base not in [
            model.manifest.ref for model in loaded.values()
        ]:
            base = await self._manifests.base(manifest)
            need += weight_bytes(base, None) if base else 0
        await asyncio.to_thread(self.refuse_giant, manifest, need)
        return need

    def why_not(self, pinned: Collection[LoadedModel], need: int) -> str:
        """Reason why no room of `need` bytes can be made while the `pinned` models stay; empty if it can."""
        places = len(pinned) < self._settings.max_models
        fits = places and total(model.held() for model in pinned) + need <= self.limit()
        return "" if fits or not pinned else NO_ROOM

    def refuse_giant(self, manifest: Manifest, need: int) -> None:
        """Refuse a model that has no place even alone."""
        if need > self.limit():
            raise ArtifactError(
                f"{manifest.ref} takes about {readable(need)}, more than the {readable(self.limit())} that all "
                "models may take here; raise DISTILLERY_SAMPLER_MAX_MEMORY, or serve it on a larger machine"
            )

    def reserve(self, key: Key, need: int) -> None:
        """Keep `need` bytes for a model that is being loaded, until `release`."""
        self._reserved[key] = need

    def release(self, key: Key) -> None:
        """The model is loaded, or was refused."""
        self._reserved.pop(key, None)

    def fits(self, loaded: dict[Key, LoadedModel], need: int, places: int) -> bool:
        """Whether `places` more models of `need` bytes in all may be there."""
        if len(loaded) + len(self._reserved) + places > self._settings.max_models:
            return False
        taken = total(model.held() for model in loaded.values()) + sum(self._reserved.values())
        return taken + need <= self.limit()

    def next_evicted(self, idle: dict[Key, LoadedModel]) -> Key:
        """Of models that may go the one that is missed least: replaced ones first, then the longest unused.

        Raises:
            Overloaded: there is none.
        """
        if not idle:
            raise Overloaded(
                f"there is room for {self._settings.max_models} models and {readable(self.limit())}, and all that "
                "are loaded are busy or preloaded; try again soon, or raise DISTILLERY_SAMPLER_MAX_MODELS or "
                "DISTILLERY_SAMPLER_MAX_MEMORY",
                retry_after_s=1.0,
            )
        return min(idle, key=lambda key: (idle[key].replaced_at is None, idle[key].last_used))
