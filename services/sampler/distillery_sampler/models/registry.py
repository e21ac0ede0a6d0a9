"""Registry of loaded versions: which one answers for a name or an alias, and how one replaces another."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import structlog

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.errors import ArtifactError, DistilleryError, NotFound, Overloaded, Unavailable
from distillery_sampler.backends.shared import SharedWeights
from distillery_sampler.engine.requests import ModelInfo
from distillery_sampler.metrics import Metrics
from distillery_sampler.models.eviction import ModelBudget
from distillery_sampler.models.loading import LoadedModel, open_model, start_model
from distillery_sampler.models.manifests import Key, Manifests
from distillery_sampler.models.memory import total, trim_heap
from distillery_sampler.models.tuning import Tuned
from distillery_sampler.settings import SamplerSettings

Alias = tuple[str, str]  # name, alias
UNLOADED = "it was unloaded; a request or a load brings it back"
MAX_DIGITS = 18  # of a version's number
_log = structlog.get_logger("distillery.sampler")


class Registry:
    """The loaded models of one process. All methods run on the event loop; loading happens in threads."""

    def __init__(
        self, store: ArtifactStore, cache: Path, settings: SamplerSettings, metrics: Metrics
    ) -> None:
        self.store, self.settings, self.metrics = store, settings, metrics
        self._weights = SharedWeights(lambda ref: store.fetch(ref, cache), cache)
        self._loaded: dict[Key, LoadedModel] = {}
        self._loading: dict[Key, asyncio.Task[LoadedModel]] = {}
        self._failed: dict[Key, str] = {}
        self._served: dict[Alias, int] = {}  # the version that answers
        self._pointed: dict[Alias, int] = {}  # where the store's alias pointed when it was last asked
        self._told: dict[Alias, int] = {}  # the version whose refusal was logged last
        self._following: set[asyncio.Task[None]] = set()
        self._tuned: dict[Key, Tuned] = {}  # found once for a version, and used when it is loaded again
        self._manifests = Manifests(store)
        self._budget = ModelBudget(settings, self._manifests)
        self._retiring: set[asyncio.Task[None]] = set()
        self._unloaded: set[Key] = set()  # by hand, and not asked for since
        self._changed = asyncio.Condition()

    async def acquire(self, ref: str) -> LoadedModel:
        """The model that answers for `name[@version|alias]`, loaded if need be; enter it before the next await.

        Raises:
            NotFound, ConfigError: no such model. ArtifactError: it is damaged. Overloaded: no room for it.
        """
        model = await self._find(ref)
        while model not in self._loaded.values():  # dropped for another model while this task slept
            model = await self._find(ref)
        return model

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
        self._unloaded.add((name, version))
        await self._retire((name, version))

    async def get(self, ref: str) -> ModelInfo:
        """One version."""
        name, version = await self._resolve(ref)
        aliases = await asyncio.to_thread(self.store.aliases, name)
        return await self._info((name, version), aliases)

    async def manifest(self, ref: str) -> Manifest:
        """The manifest of the version that answers for `ref`; where one does, the store is not asked."""
        return await self._manifests.get(await self._resolve(ref))

    async def infos(self, *, all_versions: bool = False) -> list[ModelInfo]:
        """The loaded versions and each model's latest; with `all_versions` every one in the store."""
        infos = []
        for name in await asyncio.to_thread(self.store.names):
            versions = await asyncio.to_thread(self.store.versions, name)
            aliases = await asyncio.to_thread(self.store.aliases, name)
            for version in versions:
                active = any(
                    (name, version) in group for group in (self._loaded, self._loading, self._failed)
                )
                if all_versions or active or version == versions[-1]:
                    infos.append(await self._info((name, version), aliases))
        return infos

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return at the next load, unload or swap, or after `timeout_s`."""
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait(), timeout_s)
            except TimeoutError:
                return

    def too_late(self, seconds_left: float) -> DistilleryError | None:
        """Refusal of a caller who has so long left, whatever they ask for: no model here would be done by then.

        A model that is not loaded yet would take longer still.
        """
        refusal = None
        for model in self._loaded.values():
            refusal = model.batcher.too_late(seconds_left)
            if refusal is None:
                return None
        if refusal is not None:
            model.stats.rejected("deadline")
        return refusal

    def loaded(self) -> list[LoadedModel]:
        """The models that answer now."""
        return list(self._loaded.values())

    async def refresh(self) -> None:
        """Follow the store's aliases. What is loaded is swapped in at once; the rest is loaded beside the old first.

        One model's loading, or damage in the store, does not keep the others' aliases from being followed.
        """
        for name in sorted({name for name, _ in self._served}):
            try:
                aliases = await asyncio.to_thread(self.store.aliases, name)
            except DistilleryError as error:
                _log.warning("a model's aliases cannot be read", model=name, error=str(error))
                continue
            for served, alias in list(self._served):
                if served == name:
                    await self._follow((name, alias), aliases.get(alias))
        await self._drop_replaced()
        for model in self._loaded.values():  # experts are read when they are first asked for
            self.metrics.show(model.stats.labels, model.figures())

    async def close(self) -> None:
        """Free all models."""
        for task in self._following:
            task.cancel()
        await asyncio.gather(*self._following, return_exceptions=True)
        for key in list(self._loaded):
            await self._retire(key)
        await asyncio.gather(*self._retiring, return_exceptions=True)

    # -- inside ---------------------------------------------------------------------------------------------

    async def _follow(self, alias: Alias, wanted: int | None) -> None:
        version = self._served.get(alias)
        if version is None or wanted is None:
            return
        key = (alias[0], wanted)
        if self._pointed.get(alias, wanted) != wanted:
            self._failed.pop(key, None)  # it was refused before the alias moved away: once more
        self._pointed[alias] = wanted
        if key in self._loaded:
            await self._swap(alias, wanted)
        elif wanted != version and key not in self._failed and key not in self._loading:
            task = asyncio.create_task(self._load_beside(alias, wanted))
            self._following.add(task)
            task.add_done_callback(self._following.discard)

    async def _load_beside(self, alias: Alias, wanted: int) -> None:
        name = alias[0]
        try:
            await self._load((name, wanted), stays=(name, self._served.get(alias, wanted)))
        except DistilleryError as error:
            again = self._told.get(alias) == wanted  # there was no room for it, and there is none yet
            say = _log.debug if again else _log.error
            say("new version refused, the old one stays", model=name, version=wanted, error=str(error))
            self._told[alias] = wanted
            return
        if self._pointed.get(alias) == wanted:  # it may have moved on, or back, meanwhile
            await self._swap(alias, wanted)
            await self._drop_replaced()

    async def _swap(self, alias: Alias, wanted: int) -> None:
        old, model = self._served.get(alias), self._loaded.get((alias[0], wanted))
        if old == wanted or old is None or model is None:
            return
        self._served[alias], model.replaced_at = wanted, None
        replaced = self._loaded.get((alias[0], old))
        if replaced is not None:
            replaced.replaced_at = time.monotonic()
        _log.info("version swapped", model=alias[0], alias=alias[1], old=old, new=wanted)
        await self._announce()

    async def _drop_replaced(self) -> None:
        """Free versions that no alias leads to, after the time in which one may be wanted back."""
        until = time.monotonic() - self.settings.keep_replaced_s
        for key, model in list(self._loaded.items()):
            gone = model.replaced_at is not None and model.replaced_at <= until
            if gone and not model.by_number and not self._is_served(key):
                await self._retire(key)

    def _is_served(self, key: Key) -> bool:
        return any((name, version) == key for (name, _), version in self._served.items())

    def _is_pinned(self, key: Key) -> bool:
        """Whether the version is one that `preload` names, by its number or by an alias that leads to it now."""
        for ref in self.settings.preload:
            name, _, alias = ref.partition("@")
            version = int(alias) if alias.isdecimal() else self._served.get((name, alias or "latest"))
            if (name, version) == key:
                return True
        return False

    async def _resolve(self, ref: str) -> Key:
        """The version that answers for `ref` here; the store decides where none does yet."""
        name, _, alias = ref.partition("@")
        served = self._served.get((name, alias or "latest"))
        if served is not None:
            return name, served
        if alias.isdecimal() and len(alias) <= MAX_DIGITS and (name, int(alias)) in self._loaded:
            return name, int(alias)
        return await asyncio.to_thread(self.store.resolve, ref)

    async def _find(self, ref: str) -> LoadedModel:
        key = await self._resolve(ref)
        model = self._loaded.get(key) or await self._load(key)
        alias = ref.partition("@")[2] or "latest"
        if alias.isdecimal():
            model.by_number = True
        elif self._served.setdefault((key[0], alias), key[1]) == key[1]:
            model.replaced_at = None
        return model

    async def _load(self, key: Key, *, stays: Key | None = None) -> LoadedModel:
        """The version, loaded if need be; `stays` is one that no room is made of."""
        if key in self._loaded:
            return self._loaded[key]
        if key in self._failed:
            raise ArtifactError(self._failed[key], field="model")
        if key not in self._loading:
            self._loading[key] = asyncio.create_task(self._load_now(key, stays))
            self._loading[key].add_done_callback(lambda task: self._end_loading(key, task))
        return await asyncio.shield(self._loading[key])  # a caller who leaves does not stop it for the others

    def _end_loading(self, key: Key, task: asyncio.Task[LoadedModel]) -> None:
        del self._loading[key]
        if not task.cancelled():
            task.exception()  # marks it as seen: every caller may have left

    async def _load_now(self, key: Key, stays: Key | None) -> LoadedModel:
        name, version = key
        ref = f"{name}@{version}"
        await self._announce()
        self._unloaded.discard(key)
        started = time.perf_counter()
        try:
            need = await self._budget.needed(key, self._loaded)
            await self._make_room(need, places=1, stays=stays)
            self._budget.reserve(key, need)
            opened = await asyncio.to_thread(
                open_model, self.store, ref, self._weights, self.settings, self._tuned.get(key)
            )
            self._budget.refuse_giant(opened.manifest, total([opened.backend.held()]))
        except (Unavailable, Overloaded):
            raise  # not the model's fault: the next request tries again
        except Exception as error:
            raise await self._refuse(key, error) from None
        finally:
            self._budget.release(key)
        self._tuned[key] = opened.tuned
        model = start_model(opened, self.metrics, self.settings)
        self._loaded[key] = model
        with contextlib.suppress(
            Overloaded
        ):  # it took more than its files: as far as others are idle, they go
            await self._make_room(0, places=0, stays=stays, but=key)
        seconds = time.perf_counter() - started
        self.metrics.model_load_seconds.labels(name).observe(seconds)
        self.metrics.model_reload.labels(name, "loaded").inc()
        self.metrics.model_info.labels(*self._labels(model)).set(1)
        figures = model.figures()
        self.metrics.show(model.stats.labels, figures)
        _log.info("model loaded", model=ref, seconds=round(seconds, 3), **figures)
        await self._announce()
        return model

    async def _refuse(self, key: Key, error: Exception) -> ArtifactError:
        """Remember a version that cannot be loaded: each new try would fail alike."""
        message = str(error)
        if not isinstance(error, DistilleryError):
            _log.exception("model cannot be loaded", model=key[0], version=key[1], exc_info=error)
            message = (
                f"{key[0]}@{key[1]} cannot be loaded ({type(error).__name__}); the sampler's log says why"
            )
        self._failed[key] = message
        self.metrics.model_reload.labels(key[0], "refused").inc()
        await self._announce()
        return ArtifactError(message, field="model")

    async def _make_room(
        self, need: int, *, places: int, stays: Key | None = None, but: Key | None = None
    ) -> None:
        """Free idle models until `places` more, of `need` bytes, fit; all but `stays` and `but`.

        Raises:
            Overloaded: what is left is busy or preloaded.
        """
        while not self._budget.fits(self._loaded, need, places):
            idle = {
                key: model
                for key, model in self._loaded.items()
                if not model.users and key not in (stays, but) and not self._is_pinned(key)
            }
            await self._retire(self._budget.next_evicted(idle))

    async def _retire(self, key: Key) -> None:
        model = self._loaded.pop(key)
        self._served = {alias: v for alias, v in self._served.items() if (alias[0], v) != key}
        self.metrics.model_info.remove(*self._labels(model))
        self.metrics.hide(model.stats.labels)
        self.metrics.on_retired(model.stats.labels)
        task = asyncio.create_task(self._drain(model))
        del model  # the task's alone: what a model held is given back when it ends
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        await self._announce()

    async def _drain(self, model: LoadedModel) -> None:
        await model.retire()
        del model
        await asyncio.to_thread(trim_heap)

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _labels(self, model: LoadedModel) -> tuple[str, ...]:
        return (*model.stats.labels, model.manifest.kind, model.manifest.method)

    async def _info(self, key: Key, aliases: dict[str, int]) -> ModelInfo:
        names = tuple(sorted(alias for alias, version in aliases.items() if version == key[1]))
        try:
            manifest = await self._manifests.get(key)
        except ArtifactError as error:  # the others can still be listed
            broken = Manifest(name=key[0], version=key[1], kind="model")
            return ModelInfo(broken, "failed", names, message=str(error))
        if model := self._loaded.get(key):
            return model.info(names)
        if key in self._loading or key in self._failed:
            state = "loading" if key in self._loading else "failed"
            return ModelInfo(manifest, state, names, message=self._failed.get(key, ""))
        try:
            need = await self._budget.needed(key, self._loaded)
        except DistilleryError as error:  # as a request for it would be told
            return ModelInfo(manifest, "failed", names, message=str(error))
        pinned = [model for other, model in self._loaded.items() if self._is_pinned(other)]
        why_not = UNLOADED if key in self._unloaded else self._budget.why_not(pinned, need)
        return ModelInfo(manifest, "available", names, message=why_not)
