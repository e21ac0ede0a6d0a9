"""The graphs that a denoiser is exported as: modules with positional tensors, and fixed inputs for each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill_core.artifacts import CondSpec, Manifest
from distill_core.diffusion.noise import unit_normals
from distill_core.diffusion.sampling import SamplerSpec
from distill_core.errors import ArtifactError, out_of_memory
from distill_core.kinds.base import Models
from distill_core.kinds.cards import generator_card
from distill_core.kinds.loading import load_model
from distill_core.networks.adapters import plain
from distill_core.networks.diffusers_denoiser import DiffusersDenoiser
from distill_core.networks.routed import RoutedDenoiser
from distill_core.networks.steering import NEGATIVE
from distill_core.networks.text import TextEncoder
from distillery_converter.calibration import COUNT, Arrays, CalibrationTrajectory

SEED = 20_260_101  # of the fixed inputs
EXAMPLE_BATCH = 2  # to trace with: a batch of 1 would be baked in as a constant, silently
TIME = "time"  # input of a graph whose levels have times of their own
DATA_STD = 0.5  # of the stand-in for data that the fixed inputs are noised from, as in Karras et al. 2022

EVALUATION_ERRORS = (RuntimeError, ValueError, TypeError, ArithmeticError, AttributeError, LookupError)


@dataclass(frozen=True)
class Graph:
    """One network to export: `module(*inputs.values())` is one tensor, or a tuple of them; all have the batch first."""

    name: str  # file stem
    module: nn.Module
    outputs: tuple[str, ...]
    inputs: Callable[[int], Arrays]  # fixed inputs for a batch of this size
    served: Callable[[int], list[Arrays]] | None = None  # see `feeds`; None: the fixed inputs are such
    trajectory: CalibrationTrajectory | None = None  # of a denoiser
    makes_pictures: bool = False  # the output is pixels in [-1, 1]
    whole: nn.Module | None = None  # the network in `module` that is lowered in one; None: part by part
    halved: Callable[[Path, Path], None] | None = None  # writes the float32 file's layers in float16
    frees: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # see `kinds.base.Graph`
    classes: str = ""  # the output whose largest entry is the answer

    def run(self, inputs: Arrays) -> np.ndarray:
        """The first output of `predict`."""
        return self.predict(inputs)[0]

    def predict(self, inputs: Arrays) -> tuple[np.ndarray, ...]:
        """All outputs as PyTorch computes them, on the CPU.

        Raises:
            ArtifactError: it cannot, as the model's weights and settings do not fit together.
        """
        try:
            with torch.inference_mode():
                outputs = self.module(*tensors(inputs))
                return tuple(one.numpy() for one in (outputs if isinstance(outputs, tuple) else (outputs,)))
        except EVALUATION_ERRORS as error:
            if out_of_memory(error):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ArtifactError(f"the model's {self.name} cannot be evaluated: {reason}") from error

    def feeds(self, seed: int) -> list[Arrays]:
        """Batches of `COUNT` items as serving feeds them, others for another seed."""
        return self.served(seed) if self.served is not None else [self.inputs(COUNT)]


class DenoiserGraph(nn.Module):
    """x_sigma, sigma, the condition and a time as positional tensors; all preconditioning is inside."""

    def __init__(self, denoiser: DiffusersDenoiser, cond: Sequence[str]) -> None:
        super().__init__()
        self.denoiser, self.cond = denoiser, tuple(cond)

    def forward(
        self,
        x_sigma: Tensor,
        sigma: Tensor,
        first: Tensor | None = None,  # by name: the exporter takes no variable number of tensors
        second: Tensor | None = None,
        third: Tensor | None = None,
        fourth: Tensor | None = None,
    ) -> Tensor:
        given = [value for value in (first, second, third, fourth) if value is not None]
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


class TextEncoderGraph(nn.Module):
    """Token ids to prompt_embeds."""

    def __init__(self, text: TextEncoder) -> None:
        super().__init__()
        self.model = text.model

    def forward(self, input_ids: Tensor) -> Tensor:
        prompt_embeds: Tensor = self.model(input_ids)[0]
        return prompt_embeds


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
    graphs = denoiser_graphs(experts, manifest)
    denoiser = experts[0]  # decoder and text encoder are the same for all
    if denoiser.text is not None and denoiser.text.masked:
        raise ArtifactError(
            "models whose text_encoder/config.json says use_attention_mask are not converted yet: their graph would "
            "need the mask beside the tokens; serve it with torch",
            field="artifact",
        )
    if denoiser.text is not None and not isinstance(denoiser.text, TextEncoder):
        raise ArtifactError(
            f"prompts of a {type(denoiser.network).__name__} are encoded in a way that no graph takes yet; serve it "
            "with torch",
            field="artifact",
        )
    if denoiser.codec is not None:
        ends = functools.lru_cache(maxsize=2)(functools.partial(_ends, graphs[0]))
        graphs += [decoder_graph(denoiser, ends), encoder_graph(denoiser, ends)]
    if denoiser.text is not None:
        graphs.append(text_graph(denoiser.text, denoiser.cond.examples))
        tokenizer = folder / "tokenizer" / "tokenizer.json"  # the form that is read without transformers
        if not tokenizer.is_file():
            denoiser.text.tokenizer.save_pretrained(tokenizer.parent)
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
        cond = {name: fixed_condition(name, denoiser.cond, batch, classes) for name in conditions}
        told = {TIME: times} if sampler.timed else {}
        return {"x_sigma": x_sigma, "sigma": sigma, **cond, **told}

    trajectory = CalibrationTrajectory(
        sampler,
        shape,
        lambda count: served_condition(denoiser, conditions, count, classes),
        lambda count: {name: value.cpu().numpy() for name, value in denoiser.null_cond(count).items()},
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
    if denoiser.cond.kind == "prompt":
        steered = () if sampler.guidable else (f"{NEGATIVE}prompt_embeds", "nasa_scale")
        return ("prompt_embeds", *steered)
    return ("class_label",) if denoiser.cond.kind == "class_label" else ()


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


def text_graph(text: TextEncoder, examples: Sequence[str] = ()) -> Graph:
    """The graph from token ids to prompt_embeds, for text-to-image models; `examples` are prompts of its kind."""
    vocabulary = text.model.config.vocab_size

    def served(seed: int) -> list[Arrays]:
        if not examples:
            return [{"input_ids": fixed_tokens(COUNT, text.max_tokens, vocabulary, seed=seed)}]
        prompts = [examples[(index + seed) % len(examples)] for index in range(COUNT)]
        tokens = text.tokenizer(prompts, padding="max_length", max_length=text.max_tokens, truncation=True)
        return [{"input_ids": np.asarray(tokens["input_ids"], dtype=np.int64)}]

    def inputs(batch: int) -> Arrays:
        return {"input_ids": fixed_tokens(batch, text.max_tokens, vocabulary)}

    return Graph("text_encoder", TextEncoderGraph(text), ("prompt_embeds",), inputs, served=served)


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


def fixed_condition(name: str, cond: CondSpec, batch: int, classes: tuple[int, ...] = ()) -> np.ndarray:
    """Class labels int64 (batch,) that run through `classes` or all, embeddings float32 (batch, T, D), or scales."""
    if name == "nasa_scale":
        return np.arange(batch, dtype=np.float32) % 3 / 2  # 0, 0.5, 1
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
        return {name: fixed_condition(name, denoiser.cond, count, classes) for name in names}
    examples, text = denoiser.cond.examples, denoiser.text
    with torch.inference_mode():
        if examples or text is None:
            prompts = [examples[index % len(examples)] if examples else "" for index in range(count)]
            embeds = denoiser.encode_prompts(prompts)["prompt_embeds"]
        else:
            assert isinstance(text, TextEncoder), "`load_graphs` has refused others"
            tokens = fixed_tokens(count, text.max_tokens, text.model.config.vocab_size)
            embeds = text.model(torch.from_numpy(tokens))[0]
    # A plain request's negative prompt counts nothing, as the sampler feeds it.
    off = {f"{NEGATIVE}prompt_embeds": embeds.numpy(), "nasa_scale": np.zeros(count, np.float32)}
    return {name: embeds.numpy() if name == "prompt_embeds" else off[name] for name in names}


def fixed_tokens(batch: int, length: int, vocabulary: int, *, seed: int = SEED) -> np.ndarray:
    """Token ids int64 (batch, length), spread over the vocabulary; the last one closes every prompt."""
    uniform = np.vectorize(math.erf)(noise(batch, (length,), draw=4, seed=seed) / math.sqrt(2)) * 0.5 + 0.5
    tokens: np.ndarray = np.minimum((uniform * vocabulary).astype(np.int64), vocabulary - 1)
    tokens[:, -1] = vocabulary - 1
    return tokens


def tensors(arrays: Arrays) -> tuple[Tensor, ...]:
    """The arrays as torch tensors, in order."""
    return tuple(torch.from_numpy(array) for array in arrays.values())
