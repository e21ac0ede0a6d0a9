"""The graphs that a denoiser is exported as: modules with positional tensors, and fixed inputs for each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill_core.artifacts import CondSpec, Manifest
from distill_core.diffusion.noise import unit_normals
from distill_core.diffusion.sampling import SamplerSpec
from distill_core.diffusion.super_resolution import LOW_RESOLUTION, small_shape
from distill_core.kinds.base import Models
from distill_core.kinds.cards import generator_card
from distill_core.kinds.loading import load_model
from distill_core.networks.adapters import plain
from distill_core.networks.diffusers_denoiser import DiffusersDenoiser
from distill_core.networks.routed import RoutedDenoiser
from distill_core.networks.steering import NEGATIVE
from distillery_converter.calibration import Arrays, CalibrationTrajectory
from distillery_converter.graph import SEED, Graph
from distillery_converter.prompts import encoded, text_graph, write_tokenizers

TIME = "time"  # input of a graph whose levels have times of their own
DATA_STD = 0.5  # of the stand-in for data that the fixed inputs are noised from, as in Karras et al. 2022


class DenoiserGraph(nn.Module):
    """x_sigma, sigma, the condition and a time as positional tensors; all preconditioning is inside."""

    def __init__(self, denoiser: DiffusersDenoiser, cond: Sequence[str]) -> None:
        super().__init__()
        self.denoiser, self.cond = denoiser, tuple(cond)

    def forward(self, *inputs: Tensor) -> Tensor:
        x_sigma, sigma, *given = inputs
        for value in (sigma, *given):  # said here, as the exporter has a batch of its own for each input
            torch._check(value.shape[0] == x_sigma.shape[0])
        cond = dict(zip(self.cond, given, strict=True))
        time = cond.pop(TIME, None)
        x0: Tensor = self.denoiser(x_sigma, sigma, cond or None, time)
        return x0


class DecoderGraph(nn.Module):
    """x0 in the denoiser's own space to a picture in [-1, 1]."""

    def __init__(self, denoiser: DiffusersDenoiser) -> None:
        super().__init__()
        self.codec = denoiser.codec  # a part of this module, so that its weights are exported as weights
        self.decode = denoiser.decode

    def forward(self, x0: Tensor) -> Tensor:
        return self.decode(x0)


class EncoderGraph(nn.Module):
    """A picture in [-1, 1] to x0 in the denoiser's own space."""

    def __init__(self, denoiser: DiffusersDenoiser) -> None:
        super().__init__()
        self.codec = denoiser.codec
        self.encode = denoiser.encode

    def forward(self, picture: Tensor) -> Tensor:
        return self.encode(picture)


def load_graphs(folder: Path, manifest: Manifest, models: Models | None = None) -> list[Graph]:
    """All graphs of a model's folder: the denoiser or each expert, for text-to-image decoder, encoder and text encoder.

    Factors of an adapter are added into the weights of its base, which `models` finds.

    Raises:
        ArtifactError: the folder is damaged, no denoiser, or an adapter whose base cannot be loaded.
    """
    model: Any = plain(load_model(folder, models=models))
    experts: list[Any] = list(model.experts) if isinstance(model, RoutedDenoiser) else [model]
    for expert in experts:
        fuse_adapters(expert.network)
        expert.family.export(expert.network, expert.image, expert.cond)
    graphs = denoiser_graphs(experts, manifest)
    denoiser = experts[0]  # decoder and text encoder are the same for all
    if denoiser.codec is not None:
        ends = functools.lru_cache(maxsize=2)(functools.partial(_ends, graphs[0]))
        graphs += [decoder_graph(denoiser, ends), encoder_graph(denoiser, ends)]
    if denoiser.text is not None:
        graphs.append(text_graph(denoiser.text, denoiser.cond.examples))
        write_tokenizers(folder, denoiser.text)
    return graphs


def fuse_adapters(network: Any) -> None:
    """Add LoRA weights into the layers they adapt: a graph holds plain layers only."""
    if getattr(network, "_hf_peft_config_loaded", False):
        network.fuse_lora()
        network.unload_lora()


def denoiser_graphs(experts: list[DiffusersDenoiser], manifest: Manifest) -> list[Graph]:
    """`denoiser`, or for a routed model `expert-0` and so on: each is compared on what is routed to it."""
    card = generator_card(manifest)
    sampler, partition = card.sampler or experts[0].sampler, card.partition
    if partition is None:
        return [denoiser_graph(experts[0], sampler)]
    graphs = []
    for part, expert in enumerate(experts):
        classes = tuple(label for label, own in enumerate(partition.of_class) if own == part)
        graph = denoiser_graph(expert, sampler, classes=classes)
        graphs.append(replace(graph, name=f"expert-{part}"))
    return graphs


def denoiser_graph(
    denoiser: DiffusersDenoiser, sampler: SamplerSpec, *, classes: tuple[int, ...] = ()
) -> Graph:
    """The graph that every denoiser has; `classes` are those that it is asked for, () all."""
    conditions = condition_inputs(denoiser, sampler)
    shape = (denoiser.image.channels, denoiser.image.height, denoiser.image.width)

    def inputs(batch: int) -> Arrays:
        sigma, times = fixed_levels(sampler, shape, batch)
        x_sigma = DATA_STD * noise(batch, shape, draw=0) + sigma.reshape(-1, 1, 1, 1) * noise(
            batch, shape, draw=1
        )
        cond = fixed_conditions(denoiser, conditions, batch, classes)
        told = {TIME: times} if sampler.timed else {}
        return {"x_sigma": x_sigma, "sigma": sigma, **cond, **told}

    trajectory = CalibrationTrajectory(
        sampler,
        shape,
        lambda count: served_condition(denoiser, conditions, count, classes),
        lambda count: {name: value.cpu().numpy() for name, value in denoiser.null_cond(count).items()},
        rule=denoiser.cond.guidance_rule,
    )
    graph = Graph(
        "denoiser",
        DenoiserGraph(denoiser, (*conditions, TIME) if sampler.timed else conditions),
        ("x0",),
        inputs,
        trajectory=trajectory,
        whole=denoiser.network,
        makes_pictures=denoiser.codec is None,
    )
    return replace(graph, served=lambda seed: trajectory.recorded(graph.run, seed)[0])


def condition_inputs(denoiser: DiffusersDenoiser, sampler: SamplerSpec) -> tuple[str, ...]:
    """The graph's inputs beside x_sigma and sigma; a text student's attention can turn away from a negative prompt."""
    spec = denoiser.cond
    if spec.kind == "prompt":
        steered = not sampler.guidable and denoiser.family.steerable
        told = {
            "pooled_embeds": spec.pooled_dim is not None,
            "prompt_mask": spec.masked,
            "embedded_guidance": spec.embedded_guidance is not None,
            f"{NEGATIVE}prompt_embeds": steered,
            "nasa_scale": steered,
        }
        return ("prompt_embeds", *(name for name, wanted in told.items() if wanted))
    return (spec.kind,) if spec.kind in ("class_label", LOW_RESOLUTION) else ()


def _ends(graph: Graph, seed: int) -> np.ndarray:
    """x0 (B, C, H, W) at the end of a trajectory."""
    assert graph.trajectory is not None
    return graph.trajectory.recorded(graph.run, seed)[1]


def decoder_graph(denoiser: DiffusersDenoiser, ends: Callable[[int], np.ndarray]) -> Graph:
    """The graph from latents to pictures, for latent models; `ends` gives a seed's sampled latents."""
    shape = (denoiser.image.channels, denoiser.image.height, denoiser.image.width)
    return Graph(
        "decoder",
        DecoderGraph(denoiser),
        ("picture",),
        lambda batch: {"x0": noise(batch, shape, draw=2)},
        served=lambda seed: [{"x0": ends(seed)}],
        makes_pictures=True,
    )


def encoder_graph(denoiser: DiffusersDenoiser, ends: Callable[[int], np.ndarray]) -> Graph:
    """The graph from pictures to latents, for latent models whose requests begin from pictures."""
    shape = denoiser.image.picture

    def served(seed: int) -> list[Arrays]:
        with torch.inference_mode():
            return [{"picture": denoiser.decode(torch.from_numpy(ends(seed))).clamp(-1, 1).numpy()}]

    fixed = functools.partial(noise, shape=shape, draw=5)
    return Graph(
        "encoder",
        EncoderGraph(denoiser),
        ("x0",),
        lambda batch: {"picture": np.tanh(fixed(batch))},
        served=served,
    )


def noise(batch: int, shape: tuple[int, ...], *, draw: int, seed: int = SEED) -> np.ndarray:
    """Unit normal float32 (batch, *shape): item i is the same in a batch of any size."""
    return unit_normals([(seed, index) for index in range(batch)], draw, shape)


def fixed_levels(
    sampler: SamplerSpec, shape: tuple[int, int, int], batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Noise levels (batch,) where the model is used, and their times: a student's own, else spread over the sampler's.

    Times are of a foreign scheduler's levels, 0 elsewhere.
    """
    if sampler.scheduler is not None:
        steps = sampler.path(sampler.num_steps, shape[1:]).steps
        found = [(step.sigma, step.time or 0.0) for step in steps]
        found = [found[index * (len(found) - 1) // 3] for index in range(4)]
    elif sampler.kind == "few_step":
        found = [(sigma, 0.0) for sigma in sampler.sigmas]
    else:
        found = [(sigma, 0.0) for sigma in np.geomspace(sampler.sigma_max, sampler.sigma_min, 4).tolist()]
    sigmas, times = zip(*(found[index % len(found)] for index in range(batch)), strict=True)
    return np.asarray(sigmas, np.float32), np.asarray(times, np.float32)


def fixed_conditions(
    denoiser: DiffusersDenoiser, names: Sequence[str], batch: int, classes: tuple[int, ...] = ()
) -> Arrays:
    """Conditions by name, always the same; of a model that enlarges small pictures (batch, C, h, w) of noise."""
    found = {
        name: fixed_condition(name, denoiser.cond, batch, classes) for name in names if name != LOW_RESOLUTION
    }
    if LOW_RESOLUTION in names and denoiser.cond.factor is not None:
        shape = small_shape(denoiser.image.picture, denoiser.cond.factor)
        found[LOW_RESOLUTION] = np.tanh(noise(batch, shape, draw=8))
    return found


def fixed_condition(name: str, cond: CondSpec, batch: int, classes: tuple[int, ...] = ()) -> np.ndarray:
    """Class labels int64 (batch,) that run through `classes` or all, embeddings float32 (batch, T, D), or scales."""
    if name == "nasa_scale":
        return np.arange(batch, dtype=np.float32) % 3 / 2  # 0, 0.5, 1
    if name == "embedded_guidance":
        return np.float32(cond.embedded_guidance or 1.0) + np.arange(batch, dtype=np.float32) % 3
    if name == "pooled_embeds":
        return noise(batch, (cond.pooled_dim or 1,), draw=7)
    if name == "prompt_mask":
        tokens = cond.max_tokens or 1
        counts = 1 + (5 * np.arange(batch)[:, None] + tokens // 3) % tokens
        mask: np.ndarray = (np.arange(tokens) < counts).astype(np.int64)
        return mask
    if name == "class_label":
        labels = np.asarray(classes or range(cond.num_classes or 1), dtype=np.int64)
        return labels[np.arange(batch) % len(labels)]
    draw = 6 if name.startswith(NEGATIVE) else 3
    return noise(batch, (cond.max_tokens or 1, cond.embed_dim or 1), draw=draw)


def served_condition(
    denoiser: DiffusersDenoiser, names: Sequence[str], count: int, classes: tuple[int, ...] = ()
) -> Arrays:
    """Conditions of requests: every class in turn, or example prompts, or random words without them."""
    if "prompt_embeds" not in names:
        return fixed_conditions(denoiser, names, count, classes)
    with torch.inference_mode():
        found = encoded(denoiser.encode_prompts, denoiser.cond.examples, count)
    # A plain request's negative prompt counts nothing, as the sampler feeds it.
    found[f"{NEGATIVE}prompt_embeds"] = found["prompt_embeds"]
    scales = {"nasa_scale": 0.0, "embedded_guidance": denoiser.cond.embedded_guidance or 0.0}
    found |= {name: np.full(count, value, np.float32) for name, value in scales.items()}
    return {name: found[name] for name in names}
