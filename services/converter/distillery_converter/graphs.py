"""The graphs that a denoiser is exported as: modules with positional tensors, and fixed inputs for each."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill_core.artifacts import CondSpec, Manifest
from distill_core.diffusion.noise import unit_normal
from distill_core.diffusion.sampling import SamplerSpec
from distill_core.networks.diffusers_io import DiffusersDenoiser, load_denoiser
from distill_core.networks.text import TextEncoder

Arrays = dict[str, np.ndarray]
SEED = 20_260_101  # of the fixed inputs
EXAMPLE_BATCH = 2  # to trace with: a batch of 1 would be baked in as a constant, silently
DATA_STD = 0.5  # of the stand-in for data that the fixed inputs are noised from, as in Karras et al. 2022


@dataclass(frozen=True)
class Graph:
    """One network to export: `module(*inputs.values())` is one tensor, every input has the batch first."""

    name: str  # file stem
    module: nn.Module
    output: str
    inputs: Callable[[int], Arrays]  # fixed inputs for a batch of this size


class DenoiserGraph(nn.Module):
    """x_sigma, sigma and the condition as positional tensors; all preconditioning is inside."""

    def __init__(self, denoiser: DiffusersDenoiser, cond: str | None) -> None:
        super().__init__()
        self.denoiser, self.cond = denoiser, cond

    def forward(self, x_sigma: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.denoiser(x_sigma, sigma, {self.cond: cond} if self.cond else None)


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


class TextEncoderGraph(nn.Module):
    """Token ids to prompt_embeds."""

    def __init__(self, text: TextEncoder) -> None:
        super().__init__()
        self.model = text.model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids)[0]


def load_graphs(folder: Path, manifest: Manifest) -> list[Graph]:
    """All graphs of a diffusers folder: the denoiser, and for text-to-image decoder, encoder and text encoder.

    Raises:
        ArtifactError: the folder is damaged, or no denoiser.
    """
    denoiser = load_denoiser(folder)
    fuse_adapters(denoiser.network)
    graphs = [denoiser_graph(denoiser, manifest.sampler or denoiser.sampler)]
    if denoiser.codec is not None:
        graphs += [decoder_graph(denoiser), encoder_graph(denoiser)]
    if denoiser.text is not None:
        graphs.append(text_graph(denoiser.text))
        tokenizer = folder / "tokenizer" / "tokenizer.json"  # the form that is read without transformers
        if not tokenizer.is_file():
            denoiser.text.tokenizer.save_pretrained(tokenizer.parent)
    return graphs


def fuse_adapters(network: Any) -> None:
    """Add LoRA weights into the layers they adapt: a graph holds plain layers only."""
    if getattr(network, "_hf_peft_config_loaded", False):
        network.fuse_lora()
        network.unload_lora()


def in_half(graph: Graph) -> Graph:
    """The graph with its network in float16; inputs, outputs and preconditioning stay float32.

    sigma**2 overflows float16. Decoder and text encoder are left as they are: they run once an image, and
    published decoders overflow it too.
    """
    if not isinstance(graph.module, DenoiserGraph):
        return graph
    module = copy.deepcopy(graph.module)
    module.denoiser.network.half().register_forward_pre_hook(_halved, with_kwargs=True)
    return replace(graph, module=module)


def _halved(
    _network: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The image and the prompt in float16; the time is embedded in float32 by the network itself."""
    if "encoder_hidden_states" in kwargs:
        kwargs = {**kwargs, "encoder_hidden_states": kwargs["encoder_hidden_states"].half()}
    return (args[0].half(), *args[1:]), kwargs


def denoiser_graph(denoiser: DiffusersDenoiser, sampler: SamplerSpec) -> Graph:
    """The graph that every denoiser has."""
    name = {"class_label": "class_label", "prompt": "prompt_embeds"}.get(denoiser.cond.kind)

    def inputs(batch: int) -> Arrays:
        shape = (denoiser.image.channels, denoiser.image.height, denoiser.image.width)
        sigma = fixed_sigmas(sampler, batch)
        x_sigma = DATA_STD * noise(batch, shape, draw=0) + sigma.reshape(-1, 1, 1, 1) * noise(
            batch, shape, draw=1
        )
        cond = {} if name is None else {name: fixed_condition(denoiser.cond, batch)}
        return {"x_sigma": x_sigma, "sigma": sigma, **cond}

    return Graph("denoiser", DenoiserGraph(denoiser, name), "x0", inputs)


def decoder_graph(denoiser: DiffusersDenoiser) -> Graph:
    """The graph from latents to pictures, for latent models."""
    shape = (denoiser.image.channels, denoiser.image.height, denoiser.image.width)
    return Graph(
        "decoder", DecoderGraph(denoiser), "picture", lambda batch: {"x0": noise(batch, shape, draw=2)}
    )


def encoder_graph(denoiser: DiffusersDenoiser) -> Graph:
    """The graph from pictures to latents, for latent models whose requests begin from pictures."""
    shape = denoiser.image.picture
    return Graph(
        "encoder",
        EncoderGraph(denoiser),
        "x0",
        lambda batch: {"picture": np.tanh(noise(batch, shape, draw=5))},
    )


def text_graph(text: TextEncoder) -> Graph:
    """The graph from token ids to prompt_embeds, for text-to-image models."""

    def inputs(batch: int) -> Arrays:
        return {"input_ids": fixed_tokens(batch, text.max_tokens, text.model.config.vocab_size)}

    return Graph("text_encoder", TextEncoderGraph(text), "prompt_embeds", inputs)


def noise(batch: int, shape: tuple[int, ...], *, draw: int) -> np.ndarray:
    """Unit normal float32 (batch, *shape): item i is the same in a batch of any size."""
    return np.stack([unit_normal(SEED, index, draw, shape) for index in range(batch)])


def fixed_sigmas(sampler: SamplerSpec, batch: int) -> np.ndarray:
    """Noise levels (batch,) where the model is used: a student's own, else spread over the sampler's."""
    if sampler.kind == "few_step":
        levels = list(sampler.sigmas)
    else:
        levels = np.geomspace(sampler.sigma_max, sampler.sigma_min, 4).tolist()
    return np.asarray([levels[index % len(levels)] for index in range(batch)], dtype=np.float32)


def fixed_condition(cond: CondSpec, batch: int) -> np.ndarray:
    """Class labels int64 (batch,) that walk through all classes, or embeddings float32 (batch, T, D)."""
    if cond.kind == "class_label":
        return np.arange(batch, dtype=np.int64) % (cond.num_classes or 1)
    return noise(batch, (cond.max_tokens or 1, cond.embed_dim or 1), draw=3)


def fixed_tokens(batch: int, length: int, vocabulary: int) -> np.ndarray:
    """Token ids int64 (batch, length), spread over the vocabulary; the last one closes every prompt."""
    uniform = np.vectorize(math.erf)(noise(batch, (length,), draw=4) / math.sqrt(2)) * 0.5 + 0.5
    tokens = np.minimum((uniform * vocabulary).astype(np.int64), vocabulary - 1)
    tokens[:, -1] = vocabulary - 1
    return tokens


def tensors(arrays: Arrays) -> tuple[Tensor, ...]:
    """The arrays as torch tensors, in order."""
    return tuple(torch.from_numpy(array) for array in arrays.values())
