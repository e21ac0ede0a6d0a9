"""From a pipeline and a LoRA in files to the LoRA's few-step twin, in our sampler and in plain diffusers."""

from __future__ import annotations

import asyncio

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from distill_core import api
from distill_core.kinds.cards import generator_card
from distill_core.networks.adapters import plain
from distill_core.networks.generation import generate
from distill_core.networks.lora_formats.reading import parts_of
from distill_core.recipe import load_recipe
from distillery_sampler.engine.engine import Engine
from distillery_sampler.engine.requests import GenerateRequest
from distillery_sampler.metrics import Metrics
from distillery_sampler.settings import SamplerSettings
from tests.helpers import edited, tiny_sdxl, tiny_text_to_image

KINDS = {"sd": tiny_text_to_image, "sdxl": tiny_sdxl}
SMALL = {
    "steps": 2,
    "batch_size": 2,
    "micro_batch": None,
    "threads": 1,
    "log_every": 1,
    "sample_every": 1000,
    "checkpoint_every": 1000,
    "config.critic_steps": 1,
    "student.lora.rank": 3,
    "optim.student.lr": 0.05,
    "optim.student.warmup_steps": 0,
    "evaluate": {"num_samples": 4, "batch_size": 4},
}


def write_lora(base, file) -> None:
    """A kohya file over some layers of `base`."""
    generator, tensors = torch.Generator().manual_seed(4), {}
    for path, shape in parts_of(base)["network"].shapes.items():
        if path.endswith(("to_v", "conv1")):
            name = f"lora_unet_{path.replace('.', '_')}"
            tensors[f"{name}.lora_down.weight"] = 0.3 * torch.randn(2, *shape[1:], generator=generator)
            tensors[f"{name}.lora_up.weight"] = torch.randn(
                shape[0], 2, *(1,) * (len(shape) - 2), generator=generator
            )
            tensors[f"{name}.alpha"] = torch.tensor(3.0)
    save_file(tensors, file)


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    """A store with base, style and the few-step twin; the base's folder, and the training's result."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp(request.param)
    where = api.context(root / "store", root / "cache")
    folder = KINDS[request.param](root / "pipeline")
    edited(folder, "scheduler", "scheduler_config.json", beta_start=0.00085, beta_end=0.012)
    api.import_model(folder, api.Wish("my-base", licence="openrail++"), where)
    write_lora(where.artifact("my-base"), root / "style.safetensors")
    api.import_model(root / "style.safetensors", api.Wish("my-style", "my-base@1"), where)
    (root / "prompts.txt").write_text("a cat\nthe dog\nabc\n")
    changes = {
        **SMALL,
        "data.path": str(root / "prompts.txt"),
        "teacher.artifact": "my-base@1",
        "teacher.adapters": [{"ref": "my-style@1", "scale": 0.8}],
        "publish.name": "twin",
    }
    recipe = load_recipe("task_lora_few_steps", changes)
    return where, folder, api.train(recipe, root / "run", where)


def test_the_recipe_has_the_steps_of_its_authors_on_stable_diffusions_schedule(trained):
    where, _, result = trained
    spec = generator_card(result.manifest).sampler
    times = where.artifact("my-base").schedule.network_time(torch.tensor(spec.sigmas))
    assert [round(float(time)) for time in times] == [999, 749, 499, 249]


def test_the_twin_is_one_lora_over_the_base_that_moved_from_the_style(trained):
    where, _, result = trained
    manifest = where.store.manifest("twin")
    assert (manifest.form, manifest.parents) == ("adapter", ("my-base@1", "my-style@1"))
    assert generator_card(manifest).base == "my-base@1"
    assert generator_card(manifest).sampler.num_steps == 4
    base, style, twin = (
        plain(api.load(ref, where)).network.state_dict() for ref in ("my-base", "my-style", "twin")
    )
    moved = [
        float((twin[name] - value - 0.8 * (style[name] - value)).abs().max()) for name, value in base.items()
    ]
    assert max(moved) > 1e-4, "two steps of training at this rate"
    assert sum(value > 1e-6 for value in moved) < len(moved), "biases and norms are the base's"


def test_the_sampler_serves_the_twin_over_its_base(trained, tmp_path):
    where, _, _ = trained
    twin = plain(api.load("twin", where))
    wanted = generate(twin, twin.encode_prompts(["a cat"]), 1, seed=7).numpy()

    async def run() -> np.ndarray:
        settings = SamplerSettings(instances=1, max_batch=1, backend="torch")
        engine = Engine(where.store, tmp_path, settings, Metrics())
        pictures, _ = await engine.generate(GenerateRequest("twin", prompts=("a cat",), seed=7))
        await engine.close()
        return np.stack([picture.pixels for picture in pictures])

    np.testing.assert_allclose(asyncio.run(run()), wanted, atol=1e-4)


def test_plain_diffusers_loads_the_twin_over_the_base(trained):
    where, folder, _ = trained
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(where.store.fetch("twin"))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    expected = plain(api.load("twin", where)).network.state_dict()
    for name, value in pipeline.unet.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5, msg=name)
