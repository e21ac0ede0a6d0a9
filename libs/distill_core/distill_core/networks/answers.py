"""What a model answers when it is published: the parity sample of its manifest, at the cost of one forward."""

from __future__ import annotations

import torch

from distill_core.errors import ConfigError
from distill_core.method import Cond
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.generation import generate
from distill_core.parity import SEED, ParitySample
from distill_core.radiance.renderer import Scene, parity_view, render


def parity_sample(model: object) -> ParitySample | None:
    """The sample of a denoiser or a scene; None for what no sampler serves."""
    if isinstance(model, Denoiser):
        return _denoiser_sample(model)
    return _scene_sample(model) if isinstance(model, Scene) else None


def _denoiser_sample(denoiser: Denoiser) -> ParitySample | None:
    device = next(denoiser.parameters()).device
    num_steps = min(denoiser.sampler.step_counts, default=1)
    label = prompt = None
    cond: Cond = {}
    if denoiser.cond.kind == "class_label":
        label = 0
        cond = {"class_label": torch.zeros(1, dtype=torch.long, device=device)}
    if denoiser.cond.kind == "prompt":
        prompt = next(iter(denoiser.cond.examples), "")
        try:
            cond = denoiser.encode_prompts([prompt])
        except ConfigError:  # without a text encoder
            return None
    (picture,) = generate(denoiser, cond, 1, seed=SEED, num_steps=num_steps, guidance=1.0)
    return ParitySample.of(picture.numpy(), seed=SEED, num_steps=num_steps, class_label=label, prompt=prompt)


def _scene_sample(scene: Scene) -> ParitySample | None:
    try:
        seen = render(scene, parity_view(scene.spec))
    except ConfigError:  # latents, no colours
        return None
    return ParitySample.of(seen.rgb.permute(2, 0, 1).float().cpu().numpy(), seed=SEED)
