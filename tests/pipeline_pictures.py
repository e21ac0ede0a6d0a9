"""Pictures of a tiny pipeline by our sampler and by diffusers' own call, from the same latents."""

from __future__ import annotations

import diffusers
import torch

from distill_core.diffusion.sampling import sample
from distill_core.networks.steering import with_negative

PROMPT, NEGATIVE, OTHER = "two red owls on a wall", "a dog", "snow"


def ours(denoiser, latents, steps, guidance, negative="", prompt=PROMPT, draw=None, **told):
    """Pictures (B, C, H, W) from 0 to 1 by our sampler."""
    cond = {**denoiser.encode_prompts([prompt] * len(latents)), **told}
    cond = with_negative(denoiser, cond, [negative or None] * len(latents))

    def denoise(x, sigma, time=None):
        level, times = x.new_full((len(x),), sigma), None if time is None else x.new_full((len(x),), time)
        return denoiser.guided(x, level, cond, guidance, times)

    with torch.no_grad():
        x0 = sample(denoise, denoiser.sampler, draw or (lambda k: latents), steps)
        return (denoiser.decode(x0) / 2 + 0.5).clamp(0, 1)


def theirs(pipeline, denoiser, latents, steps, guidance, negative="", prompt=PROMPT, **told):
    """The same by the pipeline's own call."""
    scales = {"guidance_scale": guidance}
    if isinstance(pipeline, (diffusers.FluxPipeline, diffusers.QwenImagePipeline)):
        scales = {"guidance_scale": 3.5, "true_cfg_scale": guidance}
        latents = pipeline._pack_latents(latents, *latents.shape)
    if isinstance(pipeline, diffusers.QwenImagePipeline):
        del scales["guidance_scale"]
    if isinstance(pipeline, diffusers.ZImagePipeline):
        scales = {"guidance_scale": guidance - 1}
    _, height, width = denoiser.image.picture
    negatives = {"negative_prompt": [negative] * len(latents)} if guidance != 1 else {}
    if isinstance(pipeline, diffusers.Flux2KleinPipeline):
        told, negatives = {**told, "prompt": [prompt] * len(latents)}, {}  # which is always the empty one
        return pipeline(
            num_inference_steps=steps,
            height=height,
            width=width,
            latents=latents,
            output_type="pt",
            **{**scales, **told},
        ).images
    return pipeline(
        [prompt] * len(latents),
        num_inference_steps=steps,
        height=height,
        width=width,
        latents=latents,
        output_type="pt",
        **{**scales, **denoiser.family.options, **negatives, **told},
    ).images


def psnr(one, two):
    """Peak signal to noise in dB."""
    error = (one.double() - two.double()).square().mean()
    return float(-10 * torch.log10(error.clamp_min(1e-20)))


def latents_of(denoiser):
    image = denoiser.image
    shape = 2, image.channels, image.height, image.width
    return torch.randn(shape, generator=torch.Generator().manual_seed(8))
