"""Which versions are loaded, which one answers for a name or an alias, and how one replaces another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import structlog

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.errors import ArtifactError, DistilleryError, NotFound, Overloaded, Unavailable
from distillery_sampler.backends.shared import SharedWeights
from distillery_sampler.loading import LoadedModel, open_model, start_model
from distillery_sampler.metrics import Metrics
from distillery_sampler.requests import ModelInfo
from distillery_sampler.settings import SamplerSettings

Key = tuple[str, int]  # name, version
_log = structlog.get_logger("distillery.sampler")


class Registry:
    """The loaded models of one process. All methods run on the event loop; loading happens in threads."""

    def __init__(
        self, store: ArtifactStore, cache: Path, settings: SamplerSettings, metrics: Metrics
    ) -> None:
        self.store, self.settings, self.metrics = store, settings, metrics
        self._weights = SharedWeights(lambda ref: store.fetch(ref, cache))
        self._loaded: dict[Key, LoadedModel] = {}
        self._loading: dict[Key, asyncio.Task[LoadedModel]] = {}
        self._failed: dict[Key, str] = {}
        self._served: dict[tuple[str, str], int] = {}  # (name, alias) -> the version that answers
        self._retiring: set[asyncio.Task[None]] = set()
        self._manifests: dict[Key, Manifest] = {}  # versions never change
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def acquire(self, ref: str) -> AsyncIterator[LoadedModel]:
        """The model that answers for `name[@version|alias]`, loaded if need be, kept alive inside the block.

        Raises:
            NotFound, ConfigError: no such model. ArtifactError: it is damaged. Overloaded: no room for it.
        """
        model = await self._find(ref)
        while model not in self._loaded.values():  # dropped for another model while this task slept
            model = await self._find(ref)
        with model.used():
            yield model

    async def load(self, ref: str) -> ModelInfo:
        """Load a version now, also one that failed before."""
        name, version = await asyncio.to_thread(self.store.resolve, ref)
        self._failed.pop((name, version), None)
        await self._find(ref)
        return await self.get(f"{name}@{version}")

    async def unload(self, ref: str) -> None:
        """Free a version when its requests are done. A later request loads it again."""
        name, version = await self._resolve(ref)
        if (name, version) not in self._loaded:
            raise NotFound(f"{name}@{version} is not loaded", field="model")
        await self._retire((name, version))

    async def get(self, ref: str) -> ModelInfo:
        """One version."""
        name, version = await self._resolve(ref)
        aliases = await asyncio.to_thread(self.store.aliases, name)
        return await self._info((name, version), aliases)

    async def infos(self, *, all_versions: bool = False) -> list[ModelInfo]:
        """The loaded versions and each model's latest; with `all_versions` every one in the store."""
        found = []
        for name in await asyncio.to_thread(self.store.names):
            versions = await asyncio.to_thread(self.store.versions, name)
            aliases = await asyncio.to_thread(self.store.aliases, name)
            for version in versions:
                active = any(
                    (name, version) in group for group in (self._loaded, self._loading, self._failed)
                )
                if all_versions or active or version == versions[-1]:
                    found.append(await self._info((name, version), aliases))
        return found

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return at the next load, unload or swap, or after `timeout_s`."""
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait(), timeout_s)
            except TimeoutError:
                return

    def loaded(self) -> list[LoadedModel]:
        """The models that answer now."""
        return list(self._loaded.values())

    async def refresh(self) -> None:
        """Follow the store's aliases: load what they point at now beside the old, swap, drain the old."""
        for (name, alias), version in list(self._served.items()):
            aliases = await asyncio.to_thread(self.store.aliases, name)
            wanted = aliases.get(alias, version)
            if wanted == version or (name, wanted) in self._failed:
                continue
            try:
                await self._load((name, wanted))
            except DistilleryError as error:
                _log.error(
                    "new version refused, the old one stays", model=name, version=wanted, error=str(error)
                )
                continue
            self._served[(name, alias)] = wanted
            _log.info("version swapped", model=name, alias=alias, old=version, new=wanted)
            await self._retire_unused((name, version))

    async def close(self) -> None:
        """Free all models."""
        for key in list(self._loaded):
            await self._retire(key)
        await asyncio.gather(*self._retiring, return_exceptions=True)

    # -- inside ---------------------------------------------------------------------------------------------

    async def _resolve(self, ref: str) -> Key:
        """The version that answers for `ref` here; the store decides where none does yet."""
        name, _, wanted = ref.partition("@")
        served = self._served.get((name, wanted or "latest"))
        if served is not None:
            return name, served
        return await asyncio.to_thread(self.store.resolve, ref)

    async def _find(self, ref: str) -> LoadedModel:
        key = await self._resolve(ref)
        model = self._loaded.get(key) or await self._load(key)
        wanted = ref.partition("@")[2] or "latest"
        if wanted.isdecimal():
            model.pinned = True
        else:
            self._served.setdefault((key[0], wanted), key[1])
        return model

    async def _load(self, key: Key) -> LoadedModel:
        if key in self._loaded:
            return self._loaded[key]
        if key in self._failed:
            raise ArtifactError(self._failed[key], field="model")
        if key not in self._loading:
            await self._make_room()
        if key not in self._loading:  # still: making room let other callers in
            self._loading[key] = asyncio.create_task(self._load_now(key))
            self._loading[key].add_done_callback(lambda task: self._end_loading(key, task))
        return await asyncio.shield(self._loading[key])  # a caller who leaves does not stop it for the others

    def _end_loading(self, key: Key, task: asyncio.Task[LoadedModel]) -> None:
        del self._loading[key]
        if not task.cancelled():
            task.exception()  # marks it as seen: every caller may have left

    async def _load_now(self, key: Key) -> LoadedModel:
        name, version = key
        await self._announce()
        started = time.perf_counter()
        try:
            opened = await asyncio.to_thread(
                open_model, self.store, f"{name}@{version}", self._weights, self.settings
            )
        except Unavailable:
            raise  # not the model's fault: the next request tries again
        except Exception as error:
            raise await self._refuse(key, error) from None
        model = start_model(opened, self.metrics, self.settings)
        self._loaded[key] = model
        seconds = time.perf_counter() - started
        self.metrics.model_load_seconds.labels(name).observe(seconds)
        self.metrics.model_reload.labels(name, "loaded").inc()
        self.metrics.model_info.labels(*self._labels(model)).set(1)
        _log.info(
            "model loaded", model=model.manifest.ref, backend=model.backend.name, seconds=round(seconds, 3)
        )
        await self._announce()
        return model

    async def _refuse(self, key: Key, error: Exception) -> ArtifactError:
        """Remember a version that cannot be loaded: each new try would fail alike."""
        said = str(error)
        if not isinstance(error, DistilleryError):
            _log.exception("model cannot be loaded", model=key[0], version=key[1], exc_info=error)
            said = f"{key[0]}@{key[1]} cannot be loaded ({type(error).__name__}); the sampler's log says why"
        self._failed[key] = said
        self.metrics.model_reload.labels(key[0], "refused").inc()
        await self._announce()
        return ArtifactError(said, field="model")

    async def _make_room(self) -> None:
        while len(self._loaded) + len(self._loading) >= self.settings.max_models:
            idle = [key for key, model in self._loaded.items() if not model.users]
            if not idle:
                raise Overloaded(
                    f"{self.settings.max_models} models are loaded and all are busy; try again soon, "
                    "or raise DISTILLERY_SAMPLER_MAX_MODELS",
                    retry_after_s=1.0,
                )
            await self._retire(min(idle, key=lambda key: self._loaded[key].last_used))

    async def _retire_unused(self, key: Key) -> None:
        served = any((name, version) == key for (name, _), version in self._served.items())
        model = self._loaded.get(key)
        if model and not served and not model.pinned:
            await self._retire(key)

    async def _retire(self, key: Key) -> None:
        model = self._loaded.pop(key)
        self._served = {alias: v for alias, v in self._served.items() if (alias[0], v) != key}
        self.metrics.model_info.remove(*self._labels(model))
        task = asyncio.create_task(model.retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        await self._announce()

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _labels(self, model: LoadedModel) -> tuple[str, ...]:
        return (*model.stats.labels, model.manifest.kind, model.manifest.method)

    async def _info(self, key: Key, aliases: dict[str, int]) -> ModelInfo:
        names = tuple(sorted(alias for alias, version in aliases.items() if version == key[1]))
        try:
            manifest = await self._manifest(key)
        except ArtifactError as error:  # the others can still be listed
            broken = Manifest(name=key[0], version=key[1], kind="model")
            return ModelInfo(broken, "failed", names, message=str(error))
        if model := self._loaded.get(key):
            return ModelInfo(manifest, "ready", names, model.backend.name, model.batcher.max_batch)
        state = "loading" if key in self._loading else "failed" if key in self._failed else "available"
        return ModelInfo(manifest, state, names, message=self._failed.get(key, ""))

    async def _manifest(self, key: Key) -> Manifest:
        if key not in self._manifests:
            self._manifests[key] = await asyncio.to_thread(self.store.manifest, f"{key[0]}@{key[1]}")
        return self._manifests[key]
