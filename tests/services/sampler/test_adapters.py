"""Many adapters over one base: loaded once, answered side by side, freed with the last."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.errors import ArtifactError
from distill_core.kinds.cards import described
from distill_core.kinds.loading import load_artifact
from distill_core.networks.adapters import LoraDenoiser
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.networks.generation import generate
from distill_core.recipe.tables import LoraConfig, NetworkConfig
from distillery_sampler.backends.shared import SharedWeights
from distillery_sampler.client import SamplerClient, generate_request, tensor_from
from distillery_sampler.engine.engine import Engine
from distillery_sampler.engine.requests import GenerateRequest
from distillery_sampler.metrics import Metrics
from distillery_sampler.settings import SamplerSettings
from tests.services.sampler.helpers import SamplerProcess

ADAPTERS = tuple(f"adapter{k}" for k in range(5))
STRANGERS = ("stranger0", "stranger1", "stranger2")
LABELS = (3, 1, 4)
WHOLE_MB = 60  # the teacher's weights, about


def publish_teacher(store: ArtifactStore, folder: Path, *, layers: int, width: int) -> None:
    """A DiT with random weights, called as its folder is."""
    network = {
        "num_layers": layers,
        "num_attention_heads": 8,
        "attention_head_dim": width // 8,
        "patch_size": 4,
    }
    torch.manual_seed(0)
    teacher = build_denoiser(
        NetworkConfig(name="DiTTransformer2DModel", args=network),
        parameterisation="edm",
        shape=(1, 8, 8),
        num_classes=10,
        num_steps=2,
    )
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    teacher.save(folder)
    store.publish(folder, Manifest(name=folder.name, **described(teacher)))


def publish_adapter(store: ArtifactStore, folder: Path, name: str, seed: int) -> None:
    """An adapter with random factors, without its base."""
    lora = LoraDenoiser(load_artifact(store, "teacher", folder), LoraConfig(rank=2, alpha=2.0))
    torch.manual_seed(seed)
    with torch.no_grad():
        for value in lora.parameters():
            value.normal_(std=0.3)
    lora.form = "adapter"
    lora.save(folder)
    store.publish(folder, Manifest(name=name, **described(lora)))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ArtifactStore:
    """A teacher of 15 million weights, and five adapters of 25 thousand."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("adapters")
    store = ArtifactStore(root / "store")
    publish_teacher(store, root / "teacher", layers=3, width=512)
    for name in STRANGERS:
        publish_teacher(store, root / name, layers=3, width=64)
    for seed, name in enumerate(ADAPTERS):
        publish_adapter(store, root / name, name, seed)
    return store


def expected(store: ArtifactStore, ref: str) -> np.ndarray:
    """What the library makes of a version."""
    denoiser = load_artifact(store, ref, Path(store.url))
    return generate(denoiser, {"class_label": torch.tensor(LABELS)}, len(LABELS), seed=7).numpy()


def places(engine: Engine) -> dict[int, int]:
    """Memory of all loaded weights: where -> bytes."""
    found = {}
    for model in engine.models.loaded():
        denoiser = model.backend._denoiser
        for value in getattr(denoiser, "adapted", denoiser).parameters():
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return found


async def ask(engine: Engine, name: str) -> np.ndarray:
    pictures, _ = await engine.generate(GenerateRequest(name, class_labels=LABELS, seed=7))
    return np.stack([picture.pixels for picture in pictures])


def test_adapters_cost_their_factors_alone_and_the_base_goes_with_the_last(store, tmp_path):
    async def run() -> None:
        settings = SamplerSettings(instances=1, max_batch=4, backend="torch")
        engine = Engine(store, tmp_path, settings, Metrics())
        names = (*ADAPTERS, "teacher")
        answers = await asyncio.gather(
            *(ask(engine, name) for name in names)
        )  # all loaded at the same moment
        for name, pictures in zip(names, answers, strict=True):
            np.testing.assert_allclose(pictures, expected(store, name), atol=1e-4)
        assert min(np.abs(one - answers[-1]).max() for one in answers[:-1]) > 1e-2

        held = places(engine)
        whole = sum(value.nbytes for value in load_artifact(store, "teacher", tmp_path).parameters())
        factors = [sum(v.nbytes for v in lora_of(engine, name).parameters()) for name in ADAPTERS]
        assert sum(held.values()) == whole + sum(factors)
        assert sum(factors) < whole / 50

        base = weakref.ref(next(iter(lora_of(engine, ADAPTERS[0]).adapted.network.pos_embed.parameters())))
        for name in ("teacher", *ADAPTERS[1:]):
            await engine.models.unload(name)
        gc.collect()
        assert base() is not None, "an adapter still needs it"
        np.testing.assert_allclose(await ask(engine, ADAPTERS[0]), answers[0], atol=1e-4)
        await engine.models.unload(ADAPTERS[0])
        await engine.close()
        gc.collect()
        assert base() is None

    asyncio.run(run())


def test_models_that_are_loaded_at_the_same_moment_do_not_disturb_each_other(store, tmp_path):
    async def run() -> None:
        engine = Engine(
            store, tmp_path, SamplerSettings(instances=1, max_batch=1, backend="torch"), Metrics()
        )
        names = (*ADAPTERS[:2], "teacher", *STRANGERS)
        answers = await asyncio.gather(*(ask(engine, name) for name in names))
        await engine.close()
        for name, pictures in zip(names, answers, strict=True):
            np.testing.assert_allclose(
                pictures, expected(store, name), atol=1e-3
            )  # of other threads and batches; another model is 0.1 away

    asyncio.run(run())


def lora_of(engine: Engine, name: str) -> LoraDenoiser:
    return next(m.backend._denoiser for m in engine.models.loaded() if m.manifest.name == name)


def test_two_that_want_one_model_at_the_same_moment_load_it_once():
    class Model:
        pass

    async def run() -> tuple[int, set[int]]:
        loads, shared = [], SharedWeights(lambda ref: Path(ref))
        started = asyncio.Event()
        loop = asyncio.get_running_loop()

        def load() -> Model:
            loop.call_soon_threadsafe(started.set)
            loads.append(1)
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0.1), loop).result()
            return Model()

        jobs = [asyncio.create_task(asyncio.to_thread(shared.get, "a@1", "cpu", load)) for _ in range(4)]
        models = await asyncio.gather(*jobs)
        return len(loads), {id(model) for model in models}

    loads, models = asyncio.run(run())
    assert (loads, len(models)) == (1, 1)


def test_an_adapter_whose_base_is_missing_is_refused_with_its_name(store, tmp_path):
    alone = ArtifactStore(tmp_path / "store")
    alone.publish(store.fetch("adapter0"), store.manifest("adapter0"))

    async def run() -> None:
        engine = Engine(alone, tmp_path, SamplerSettings(instances=1, max_batch=1), Metrics())
        with pytest.raises(ArtifactError, match="is an adapter over teacher@1, which is missing"):
            await ask(engine, "adapter0")
        info = await engine.models.get("adapter0")
        assert info.state == "failed"
        await engine.close()

    asyncio.run(run())


def resident_mb(process: SamplerProcess) -> float:
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024


def answer(client: SamplerClient, name: str) -> tuple[str, np.ndarray]:
    """Which version answered, and its pictures (B, C, H, W)."""
    request = generate_request(name, class_labels=LABELS, seed=7, with_tensor=True)
    reply = client.call_generate(request)
    return reply.summary.model, tensor_from(reply.tensor)


def test_over_the_wire_adapters_are_models_like_others_and_new_versions_are_swapped_in(store, tmp_path):
    shutil.copytree(store.url, tmp_path / "store")
    own = ArtifactStore(tmp_path / "store")
    environment = {
        "DISTILLERY_SAMPLER_PRELOAD": json.dumps([ADAPTERS[0]]),
        "DISTILLERY_SAMPLER_BACKEND": "torch",
        "DISTILLERY_SAMPLER_MAX_BATCH": "4",
        "DISTILLERY_SAMPLER_INSTANCES": "1",
    }
    with SamplerProcess(own.url, environment) as process, process.client() as client:
        first = resident_mb(process)
        for name in ADAPTERS:
            version, pictures = answer(client, name)
            assert version == f"{name}@1"
            np.testing.assert_allclose(pictures, expected(own, name), atol=1e-4)

        publish_adapter(own, tmp_path / "new", "adapter1", seed=100)
        deadline = time.monotonic() + 240
        while (found := answer(client, "adapter1"))[0] != "adapter1@2":
            assert time.monotonic() < deadline, "the new version was never swapped in"
        np.testing.assert_allclose(found[1], expected(own, "adapter1@2"), atol=1e-4)
        np.testing.assert_allclose(answer(client, "adapter1@1")[1], expected(own, "adapter1@1"), atol=1e-4)
        grown = resident_mb(process) - first  # each model's own threads take some, too
        assert grown < 2 * WHOLE_MB, "five models more would be five bases more, if each had its own"
