"""Imported models are served: a pipeline and a LoRA over it, while the sampler runs."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import torch
from safetensors.torch import save_file

from distill_core import api
from distill_core.context import Context
from distill_core.kinds.loading import load_artifact
from distill_core.networks.adapters import plain
from distill_core.networks.generation import generate
from distill_core.networks.lora_formats.reading import parts_of
from distillery_sampler.engine.engine import Engine
from distillery_sampler.engine.requests import GenerateRequest
from distillery_sampler.metrics import Metrics
from distillery_sampler.models.watcher import watch_store
from distillery_sampler.settings import SamplerSettings
from tests.helpers import tiny_text_to_image

PROMPTS = ("abc", "d")


def kohya_file(base: object, folder, seed: int):
    """A LoRA of the cross-attention's keys."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for path, shape in parts_of(base)["network"].shapes.items():
        if path.endswith("attn2.to_k"):
            name = f"lora_unet_{path.replace('.', '_')}"
            tensors[f"{name}.lora_down.weight"] = torch.randn(2, shape[1], generator=generator)
            tensors[f"{name}.lora_up.weight"] = torch.randn(shape[0], 2, generator=generator)
            tensors[f"{name}.alpha"] = torch.tensor(3.0)
    file = folder / f"style{seed}.safetensors"
    save_file(tensors, file)
    return file


def expected(where: Context, ref: str) -> np.ndarray:
    """What the library makes of a version in two steps."""
    denoiser = plain(load_artifact(where.store, ref, where.cache))
    cond = denoiser.encode_prompts(list(PROMPTS))
    return generate(denoiser, cond, len(PROMPTS), seed=7, num_steps=2, guidance=3.0).numpy()


async def ask(engine: Engine, name: str) -> np.ndarray:
    request = GenerateRequest(name, prompts=PROMPTS, seed=7, num_steps=2, guidance=3.0)
    pictures, _ = await engine.generate(request)
    return np.stack([picture.pixels for picture in pictures])


def test_a_running_sampler_serves_what_is_imported_and_swaps_in_what_is_imported_again(tmp_path):
    torch.set_num_threads(1)
    where = api.context(tmp_path / "store", tmp_path / "cache")
    pipeline = tiny_text_to_image(tmp_path / "pipeline")

    def published(source, name: str, base: str | None = None) -> str:
        return api.import_model(source, api.Wish(name, base, steps=2), where).manifest.ref

    async def run() -> None:
        settings = SamplerSettings(instances=1, max_batch=4, backend="torch", poll_s=0.05)
        engine = Engine(where.store, tmp_path / "served", settings, Metrics())
        watching = asyncio.create_task(watch_store(engine.models, settings.poll_s))
        assert await asyncio.to_thread(published, pipeline, "mine") == "mine@1"
        plain_pictures = await ask(engine, "mine")
        np.testing.assert_allclose(plain_pictures, expected(where, "mine@1"), atol=1e-4)

        base = load_artifact(where.store, "mine", where.cache)
        assert await asyncio.to_thread(published, kohya_file(base, tmp_path, 1), "style", "mine") == "style@1"
        styled = await ask(engine, "style")
        np.testing.assert_allclose(styled, expected(where, "style@1"), atol=1e-4)
        assert np.abs(styled - plain_pictures).max() > 1e-2

        assert await asyncio.to_thread(published, kohya_file(base, tmp_path, 2), "style", "mine") == "style@2"
        wanted, deadline = expected(where, "style@2"), time.monotonic() + 120
        while np.abs(await ask(engine, "style") - wanted).max() > 1e-4:
            assert time.monotonic() < deadline, "the new version was never swapped in"
        assert np.abs(wanted - styled).max() > 1e-2
        watching.cancel()
        await engine.close()

    asyncio.run(run())
