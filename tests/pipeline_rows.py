"""The forms of a tiny pipeline beside diffusers' own pictures, in dB: rows of docs/pipelines.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import torch

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.diffusion.sampling import sample
from distill_core.kinds.cards import described
from distill_core.networks.adapters import LoraDenoiser
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.levels import few_step_sampler, student_levels
from distill_core.recipe.tables import LoraConfig
from distillery_converter.convert import convert
from distillery_sampler.engine.requests import GenerateRequest
from tests.pipeline_pictures import NEGATIVE, OTHER, PROMPT, latents_of, ours, psnr, theirs
from tests.services.sampler.helpers import answer
from tests.tiny_pipelines import BUILDERS

STEPS, GUIDANCE = 4, 5.0


def measured_row(name: str, scratch: Path, *, graphs: bool) -> dict[str, Any]:
    """The figures of one row; `other_prompt` is how near the picture of another prompt comes."""
    torch.set_num_threads(1)
    folder = BUILDERS[name](scratch / name)
    pipeline, denoiser = opened(folder), load_denoiser(folder)
    latents, negative = latents_of(denoiser), negative_of(pipeline)
    wanted = theirs(pipeline, denoiser, latents, STEPS, GUIDANCE, negative)
    made = ours(denoiser, latents, STEPS, GUIDANCE, negative)
    other = ours(denoiser, latents, STEPS, GUIDANCE, negative, OTHER)
    row: dict[str, Any] = {
        "network": type(denoiser.network).__name__,
        "pipeline": type(pipeline).__name__,
        "teacher": psnr(made, wanted),
        "student": student(folder, scratch / "student"),
        "lora": adapted(folder, scratch / "lora"),
        "other_prompt": psnr(other, made),
    }
    store = published(folder, scratch)
    if graphs:
        convert(store, "model", "onnx-fp32", work=scratch)
    requests = [request(version, latents, negative) for version in ((1, 2) if graphs else (1,))]
    for backend, pictures in zip(("torch", "onnx"), answer(store, scratch / "cache", *requests)):
        row[backend] = psnr(torch.from_numpy(pictures) / 2 + 0.5, wanted)
    return row


def opened(folder: Path) -> Any:
    """The folder's own pipeline."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def negative_of(pipeline: Any) -> str:
    """The negative prompt; klein's is always the empty one."""
    return "" if isinstance(pipeline, diffusers.Flux2KleinPipeline) else NEGATIVE


def published(folder: Path, scratch: Path) -> ArtifactStore:
    """A store whose `model@1` is the folder."""
    store = ArtifactStore(scratch / "store")
    store.publish(folder, Manifest(name="model", **described(load_denoiser(folder))))
    return store


def request(version: int, latents: torch.Tensor, negative: str) -> GenerateRequest:
    """The same pictures of the sampler: 1 is served by torch, 2 from graphs."""
    told = {"num_steps": STEPS, "guidance": GUIDANCE, "negative_prompts": (negative,) if negative else ()}
    return GenerateRequest(f"model@{version}", prompts=(PROMPT,) * 2, latents=latents.numpy(), **told)


@torch.no_grad()
def student(folder: Path, saved: Path) -> float | None:
    """A one-step student in plain diffusers, by the code of its card; None where no pipeline opens it."""
    denoiser = load_denoiser(folder)
    denoiser.sampler = few_step_sampler(denoiser, student_levels(denoiser, count=1))
    denoiser.save(saved)
    if not (saved / "model_index.json").exists():
        return None
    card = (saved / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", card, re.M | re.S)
    code = code.replace('from_pretrained(".")', f'from_pretrained("{saved}")').replace("images[0]", "images")
    variables: dict[str, Any] = {}
    exec(code.replace("**options", '**options, output_type="pt"'), variables)  # noqa: S102
    image, drawn = denoiser.image, torch.Generator().manual_seed(0)
    z = torch.randn(1, image.channels, image.height, image.width, generator=drawn)
    denoise = denoiser.bound(denoiser.encode_prompts(["a photograph"]), 1.0)
    x0 = sample(denoise, denoiser.sampler, lambda k: z, 1)
    return psnr(variables["picture"], (denoiser.decode(x0) / 2 + 0.5).clamp(0, 1))


def adapted(folder: Path, saved: Path) -> float | None:
    """A published adapter in the pipeline, which loads it by `load_lora_weights`; None where it has no such method."""
    denoiser, pipeline = load_denoiser(folder), opened(folder)
    if not hasattr(pipeline, "load_lora_weights"):
        return None
    lora = LoraDenoiser(denoiser, LoraConfig(rank=3, alpha=2.0))
    torch.manual_seed(5)
    with torch.no_grad():
        for value in lora.parameters():
            value.normal_(std=0.3)
    lora.form = "adapter"
    lora.save(saved)
    pipeline.load_lora_weights(saved)
    latents, negative = latents_of(denoiser), negative_of(pipeline)
    merged: Any = lora.merged()
    wanted = theirs(pipeline, denoiser, latents, STEPS, GUIDANCE, negative)
    assert psnr(ours(denoiser, latents, STEPS, GUIDANCE, negative), wanted) < 50, "an adapter without effect"
    return psnr(ours(merged, latents, STEPS, GUIDANCE, negative), wanted)
