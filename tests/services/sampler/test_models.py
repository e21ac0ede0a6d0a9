"""Models in the sampler: compared with their manifests, kept under a memory limit, run by the export that is wanted."""

from __future__ import annotations

import asyncio
import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.errors import ArtifactError, ConfigError, DistilleryError, Overloaded
from distill_core.probe import ImageProbe
from distillery_sampler.backends.fixed import Padded
from distillery_sampler.backends.onnx_backend import Session
from distillery_sampler.backends.opening import choices
from distillery_sampler.engine.engine import Engine
from distillery_sampler.engine.requests import GenerateRequest, ImageItem, ImageKey
from distillery_sampler.metrics import Metrics
from distillery_sampler.models.memory import default_limit, readable, weight_bytes
from distillery_sampler.models.tuning import Layout, layouts
from distillery_sampler.settings import SamplerSettings, load_sampler_settings
from tests.services.sampler.helpers import answer, class_means, publish_denoiser

FIXED = {"instances": 1, "max_batch": 4}  # no timing


@pytest.fixture
def store(tmp_path) -> ArtifactStore:
    store = ArtifactStore(tmp_path / "store")
    publish_denoiser(store, tmp_path / "one")
    return store


def run(
    store: ArtifactStore, tmp_path: Path, use: Callable[[Engine], Awaitable[None]], **settings: object
) -> None:
    async def inside() -> None:
        own = load_sampler_settings(**{**FIXED, **settings})
        engine = Engine(store, tmp_path / "cache", own, Metrics())
        try:
            await use(engine)
        finally:
            await engine.close()

    asyncio.run(inside())


async def ask(engine: Engine, ref: str, label: int = 3) -> np.ndarray:
    pictures, _ = await engine.generate(GenerateRequest(ref, class_labels=(label,), seed=7))
    return pictures[0].pixels


def test_a_package_that_is_missing_is_named_with_what_brings_it(store, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else find(name))

    async def use(engine: Engine) -> None:
        with pytest.raises(DistilleryError, match=r"onnx is not installed.*\[sampler\]"):
            await ask(engine, "digits")

    run(store, tmp_path, use)


def publish_big(store: ArtifactStore, folder: Path, name: str, mib: int = 4) -> Manifest:
    """A model whose export has `mib` MiB that nothing reads."""
    publish_denoiser(ArtifactStore(folder / "other"), folder / "model", name=name)
    draft = ArtifactStore(folder / "other").manifest(name)
    (folder / "model" / "exports" / "onnx-fp32" / "more.data").write_bytes(bytes(mib * 2**20))
    return store.publish(folder / "model", draft)


# -- the probe picture ----------------------------------------------------------------------------------------


def with_parity(store: ArtifactStore, folder: Path, means: np.ndarray, *, name: str = "checked") -> Manifest:
    """A model with `means` in its graph, whose manifest says that class 3 looks as in `class_means`."""
    published = publish_denoiser(ArtifactStore(folder / "other"), folder / "model", name=name, means=means)
    sample = ImageProbe.of(class_means()[3], class_label=3)
    return store.publish(folder / "model", published.model_copy(update={"parity": sample}))


def test_weights_swapped_under_a_rehashed_manifest_are_refused_and_the_old_version_stays(store, tmp_path):
    with_parity(store, tmp_path / "right", class_means())

    async def use(engine: Engine) -> None:
        before = await ask(engine, "checked")
        with_parity(store, tmp_path / "wrong", -class_means())
        await engine.models.refresh()
        while (await engine.models.get("checked@2")).state in ("available", "loading"):
            await asyncio.sleep(0.01)
        refused = await engine.models.get("checked@2")
        assert refused.state == "failed"
        assert "answers differently than when it was published" in refused.message
        np.testing.assert_array_equal(await ask(engine, "checked"), before)
        with pytest.raises(ArtifactError, match="probe picture is off by"):
            await ask(engine, "checked@2")

    run(store, tmp_path, use)


def test_a_call_is_shed_only_where_no_loaded_model_would_be_done_in_time(store, tmp_path):
    publish_denoiser(store, tmp_path / "two", name="idle")

    async def use(engine: Engine) -> None:
        await ask(engine, "digits")
        assert engine.models.too_late(0.01) is None
        batcher = (await engine.models.acquire("digits")).batcher
        batcher.seconds_per_cost = 100.0
        futures = batcher.submit(ImageKey(1, 1.0), [ImageItem(1, class_label=1)] * 64)
        assert "longer than the call's deadline" in str(engine.models.too_late(10.0))
        refused = {"model": "digits", "version": "1", "backend": "onnxruntime", "reason": "deadline"}
        registry = engine.metrics.registry
        assert registry.get_sample_value("distillery_rejected_total", refused) == 1
        await asyncio.gather(*futures)
        await ask(engine, "idle")
        batcher.seconds_per_cost = 100.0
        futures = batcher.submit(ImageKey(1, 1.0), [ImageItem(1, class_label=1)] * 64)
        assert engine.models.too_late(10.0) is None  # the other one would be
        await asyncio.gather(*futures)

    run(store, tmp_path, use)


def test_an_older_manifest_without_a_sample_is_served(store, tmp_path):
    assert store.manifest("digits").parity is None

    async def use(engine: Engine) -> None:
        await ask(engine, "digits")

    run(store, tmp_path, use)


def test_a_scene_is_compared_too(tmp_path):
    import torch

    from distill_core.artifacts import SceneSpec
    from distill_core.kinds.base import image_probe_of
    from distill_core.networks.fields import build_field
    from distill_core.radiance.scenes.scene import Scene, load_scene, save_scene
    from distill_core.recipe.tables import NetworkConfig

    spec, store = SceneSpec(field="", bound=1.3, radius=3.0), ArtifactStore(tmp_path / "store")
    samples = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        field = build_field(NetworkConfig(name="mlp", args={"width": 16, "layers": 2}), spec.bound)
        for value in field.parameters():
            torch.nn.init.normal_(value.data, std=0.7)
        folder = tmp_path / f"scene{seed}"
        save_scene(Scene(field, torch.ones(4, 4, 4, dtype=torch.bool), spec, 32), folder)
        samples.append(image_probe_of(load_scene(folder)))
        for name, sample in (("right", samples[seed]), ("wrong", samples[0])):
            store.publish(
                folder,
                Manifest(
                    name=f"{name}{seed}", kind="field", card={"scene": spec.model_dump()}, parity=sample
                ),
            )

    async def use(engine: Engine) -> None:
        for good in ("right0", "right1", "wrong0"):
            assert (await engine.models.load(good)).state == "ready"
        with pytest.raises(ArtifactError, match="answers differently than when it was published"):
            await engine.models.load("wrong1")

    run(store, tmp_path, use)


# -- memory ---------------------------------------------------------------------------------------------------


def test_the_longest_unused_model_goes_when_memory_is_full(store, tmp_path):
    for name in ("a", "b", "c"):
        publish_big(store, tmp_path / name, name, mib=16)

    async def use(engine: Engine) -> None:
        for name in ("a", "b", "a", "c"):
            await ask(engine, name)
        assert {model.manifest.name for model in engine.models.loaded()} == {"a", "c"}
        info = await engine.models.get("a")
        assert info.memory >= 16 * 2**20
        assert (info.instances, info.threads) == (1, layouts(engine.settings, on_gpu=False)[0].threads)

    run(store, tmp_path, use, max_memory="44MiB")  # opening such a session takes far less than its files


def test_a_model_larger_than_the_limit_is_refused_in_a_sentence(store, tmp_path):
    publish_big(store, tmp_path / "giant", "giant", mib=8)

    async def use(engine: Engine) -> None:
        with pytest.raises(ArtifactError, match=r"giant@1 takes about 8 MiB, more than the 2 MiB"):
            await ask(engine, "giant")
        await ask(engine, "digits")

    run(store, tmp_path, use, max_memory="2MiB")


def test_preloaded_models_are_never_dropped(store, tmp_path):
    for name in ("second", "third"):
        publish_denoiser(store, tmp_path / name, name=name)

    async def use(engine: Engine) -> None:
        for name in ("digits", "second", "third"):
            await ask(engine, name)
        assert {model.manifest.name for model in engine.models.loaded()} == {"digits", "third"}

    run(store, tmp_path, use, max_models=2, preload=("digits",))

    async def full(engine: Engine) -> None:
        await ask(engine, "digits")
        await ask(engine, "second")
        with pytest.raises(Overloaded, match="busy or preloaded.*DISTILLERY_SAMPLER_MAX_MODELS"):
            await ask(engine, "third")

    run(store, tmp_path, full, max_models=2, preload=("digits", "second@1"))


def test_a_replaced_version_is_the_first_to_go(store, tmp_path):
    publish_denoiser(store, tmp_path / "second", name="second")

    async def use(engine: Engine) -> None:
        await ask(engine, "second")
        await ask(engine, "digits")
        publish_denoiser(store, tmp_path / "two", means=-class_means())
        await engine.models.refresh()
        while (await engine.models.get("digits")).manifest.version == 1:
            await asyncio.sleep(0.01)
        assert [model.manifest.ref for model in engine.models.loaded()] == [
            "second@1",
            "digits@1",
            "digits@2",
        ]
        publish_denoiser(store, tmp_path / "third", name="third")
        await ask(engine, "third")  # `digits@1` was used last, and goes
        assert [model.manifest.ref for model in engine.models.loaded()] == ["second@1", "digits@2", "third@1"]

    run(store, tmp_path, use, max_models=3)


def test_the_default_limit_is_a_share_of_what_the_process_may_use(tmp_path):
    limit = tmp_path / "memory.max"
    limit.write_text(f"{2**30}\n")
    assert default_limit("cpu", [limit]) == int(0.8 * 2**30)
    limit.write_text("max\n")
    assert default_limit("cpu", [limit, tmp_path / "absent"]) > 2**28


def test_sizes_are_read_with_their_units_and_others_refused():
    assert load_sampler_settings(max_memory="1.5 GiB").max_memory == 3 * 2**29
    assert load_sampler_settings(max_memory="2000000").max_memory == 2_000_000
    with pytest.raises(ConfigError, match="DISTILLERY_SAMPLER_MAX_MEMORY = '4 apples' is not allowed"):
        load_sampler_settings(max_memory="4 apples")
    with pytest.raises(ConfigError, match="DISTILLERY_SAMPLER_BUCKETS.*ascending"):
        load_sampler_settings(buckets=(4, 2))
    with pytest.raises(ConfigError, match="DISTILLERY_SAMPLER_TARGETS.*onnx"):
        load_sampler_settings(targets=("onnx",))
    assert readable(3 * 2**29) == "1.5 GiB"


# -- exports --------------------------------------------------------------------------------------------------


def with_targets(store: ArtifactStore, folder: Path, *targets: str) -> Manifest:
    """A model with the same graph as several exports."""
    made = publish_denoiser(ArtifactStore(folder / "other"), folder / "model", name="many")
    report = made.exports["onnx-fp32"]
    exports = folder / "model" / "exports"
    for target in targets:
        if target != "onnx-fp32":
            shutil.copytree(exports / "onnx-fp32", exports / target)
    reports = {target: report.model_copy(update={"target": target}) for target in targets}
    return store.publish(folder / "model", made.model_copy(update={"exports": reports}))


def test_the_first_wanted_export_that_a_model_has_is_used(store, tmp_path):
    manifest = with_targets(store, tmp_path / "many", "onnx-fp32", "onnx-fp16")
    found = choices(manifest, SamplerSettings(targets=("onnx-int8", "onnx-fp16", "onnx-fp32")))
    assert found == [("onnxruntime", "onnx-fp16", "fp16")]
    assert choices(manifest, SamplerSettings()) == [("onnxruntime", "onnx-fp32", "fp32")]
    assert choices(manifest, SamplerSettings(targets=("onnx-int8",))) == [("torch", None, "fp32")]
    assert choices(manifest, SamplerSettings(backend="torch", precision="bf16")) == [("torch", None, "bf16")]
    with pytest.raises(
        ArtifactError, match="has no onnx-int8 export; run: distillery convert .* --target onnx-int8"
    ):
        choices(manifest, SamplerSettings(targets=("onnx-int8",), backend="onnxruntime"))
    with pytest.raises(ArtifactError, match="backend tensorrt runs none of the targets onnx-fp32"):
        choices(manifest, SamplerSettings(backend="tensorrt"))


def test_after_engines_come_the_exports_that_run_where_they_do_not(store, tmp_path):
    manifest = with_targets(store, tmp_path / "many", "onnx-fp32", "onnx-fp16", "trt-fp16")
    every = ("trt-bf16", "trt-fp16", "onnx-fp16", "onnx-fp32")
    engine, half = ("tensorrt", "trt-fp16", "fp16"), ("onnxruntime", "onnx-fp16", "fp16")
    assert choices(manifest, SamplerSettings(targets=every)) == [engine, half]
    assert choices(manifest, SamplerSettings(targets=every[::-1])) == [("onnxruntime", "onnx-fp32", "fp32")]
    assert choices(manifest, SamplerSettings(targets=every, backend="tensorrt")) == [engine]


def test_the_chosen_export_is_the_one_that_runs(store, tmp_path):
    made = with_targets(store, tmp_path / "many", "onnx-fp32", "onnx-int8")
    shutil.rmtree(Path(store.url) / "many" / "versions" / "1" / "exports" / "onnx-fp32")
    assert weight_bytes(made, "onnx-int8") == weight_bytes(made, "onnx-fp32") > 1000
    kept = {k: v for k, v in made.files.items() if "fp32" not in k}
    (Path(store.url) / "many" / "versions" / "1" / "manifest.json").write_text(
        made.model_copy(update={"files": kept}).model_dump_json()
    )
    (pictures,) = answer(store, tmp_path, GenerateRequest("many", class_labels=(3,)), targets=("onnx-int8",))
    assert float((pictures[0] * class_means()[3]).sum()) > 1


# -- fixed sizes ----------------------------------------------------------------------------------------------


def test_padded_batches_answer_bit_for_bit_and_their_filling_is_counted(store, tmp_path):
    labels = tuple(range(7))
    wanted = GenerateRequest("digits", class_labels=labels, seed=1)
    (plain,) = answer(store, tmp_path, wanted)
    found: dict[str, float] = {}

    async def use(engine: Engine) -> None:
        pictures, _ = await engine.generate(wanted)
        np.testing.assert_array_equal(np.stack([picture.pixels for picture in pictures]), plain)
        (model,) = engine.models.loaded()
        assert isinstance(model.backend, Padded)
        value = engine.metrics.registry.get_sample_value
        labels = dict(zip(("model", "version", "backend"), model.stats.labels, strict=True))
        found["padding"] = value("distillery_padding_images_total", labels) or 0.0

    run(store, tmp_path, use, max_batch=5, buckets=(4,))
    assert found == {"padding": 5.0}  # 5 and 2 images, in batches of 4, 4 and 4


def test_bound_buffers_answer_as_plain_calls_do(store):
    path = Path(store.url) / "digits" / "versions" / "1" / "exports" / "onnx-fp32" / "denoiser.onnx"
    plain, bound = Session(path, 1), Session(path, 1, bound_to="cpu")
    rng = np.random.default_rng(0)
    for batch in (2, 3, 2):
        feed = {
            "x_sigma": rng.normal(size=(batch, 1, 8, 8)),  # double: made float32 on the way
            "sigma": np.full(batch, 80.0, np.float32),
            "class_label": np.arange(batch, dtype=np.int64),
        }
        np.testing.assert_array_equal(bound(feed), plain(feed))
    assert len(bound._bindings) == 2


# -- layouts --------------------------------------------------------------------------------------------------


def test_settings_leave_open_what_is_timed(monkeypatch):
    monkeypatch.setattr("distillery_sampler.models.tuning.cores", lambda: 8)
    assert layouts(SamplerSettings(), on_gpu=False) == [Layout(8, 1), Layout(1, 8)]
    assert layouts(SamplerSettings(), on_gpu=True) == [Layout(1, 1)]
    assert layouts(SamplerSettings(instances=2), on_gpu=False) == [Layout(2, 4)]
    assert layouts(SamplerSettings(threads=2), on_gpu=False) == [Layout(4, 2)]
    assert layouts(SamplerSettings(instances=3, threads=1), on_gpu=False) == [Layout(3, 1)]


# -- the allocator --------------------------------------------------------------------------------------------

HOLES = """
import sys
from distillery_sampler.models.memory import limit_malloc_arenas, resident

if sys.argv[1] == "tidy":
    limit_malloc_arenas()
del (large := [bytearray(30 * 2**20)])[:]  # glibc takes pieces up to this size from its pool from now on
pieces = [bytearray(b"x") * 2**20 for _ in range(100)]
before = resident()
del pieces[::2]  # each hole has a neighbour
print((before - resident()) // 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
@pytest.mark.parametrize(("how", "least", "most"), [("tidy", 45, 60), ("as it is", -5, 10)])
def test_what_is_freed_goes_back_to_the_system_with_a_tidy_allocator(how, least, most):
    done = subprocess.run([sys.executable, "-c", HOLES, how], capture_output=True, text=True, check=True)
    assert least <= int(done.stdout) <= most


FAULTS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from resource import RUSAGE_THREAD, getrusage
from distillery_sampler.models.memory import TORCH_LARGE, limit_malloc_arenas

if sys.argv[1] == "tidy":
    limit_malloc_arenas(TORCH_LARGE)

def faults():
    before = getrusage(RUSAGE_THREAD).ru_minflt
    for _ in range(20):
        del (pieces := [bytearray(b"x") * 2**20 for _ in range(3)])[:]
    return getrusage(RUSAGE_THREAD).ru_minflt - before

for _ in range(2):  # the second thread's pool is not the main one
    with ThreadPoolExecutor(1) as pool:
        pool.submit(faults).result()
        print(pool.submit(faults).result())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
@pytest.mark.parametrize(("how", "least", "most"), [("tidy", 0, 1000), ("as it is", 10_000, 20_000)])
def test_a_model_thread_asks_for_the_same_memory_only_once(how, least, most):
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    assert least <= max(map(int, done.stdout.split())) <= most


# -- the collector --------------------------------------------------------------------------------------------

SETTLED = """
import gc
from distillery_sampler.server import freeze_garbage_collector

freeze_garbage_collector()
looked_at = gc.get_objects()
print(gc.get_freeze_count(), len(looked_at), gc.get_threshold()[0])
"""


def test_what_is_there_at_the_start_is_left_out_of_later_collections():
    done = subprocess.run([sys.executable, "-c", SETTLED], capture_output=True, text=True, check=True)
    frozen, looked_at, threshold = map(int, done.stdout.split())
    assert frozen > 50_000  # the imported modules alone
    assert looked_at < 1000
    assert threshold == 10_000


FREED = """
import gc, weakref
from distillery_sampler.models.memory import trim_heap, freeze_garbage_collector

class Model: ...

model = Model()
model.itself = model  # only a collection frees it
seen = weakref.ref(model)
freeze_garbage_collector()
del model
gc.collect()
print(seen() is None)
trim_heap()
print(seen() is None)
"""


def test_a_model_that_was_there_at_the_start_is_freed_when_it_leaves():
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
