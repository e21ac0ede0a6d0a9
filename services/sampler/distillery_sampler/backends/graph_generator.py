"""A denoiser's exported graphs, whatever runs them, sampled in NumPy. Imports neither torch nor a runtime."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from distill_core.artifacts import Manifest
from distill_core.diffusion.guidance import guide_by
from distill_core.diffusion.image_to_image import InitImage
from distill_core.diffusion.noise import noise_of
from distill_core.diffusion.routing import ROUTER
from distill_core.diffusion.sampling import sample
from distill_core.diffusion.super_resolution import LOW_RESOLUTION
from distill_core.errors import ConfigError
from distill_core.kinds.cards import generator_card
from distillery_sampler.backends.base import Generator
from distillery_sampler.backends.experts import Experts, Feed, Graph
from distillery_sampler.backends.tokens import PromptTokens, reading_of
from distillery_sampler.engine.init_images import init_image_of, init_pictures, with_known_pixels
from distillery_sampler.engine.requests import ImageItem, ImageKey

DENOISER, TEXT_ENCODER = "denoiser", "text_encoder"
DECODER, ENCODER = "decoder", "encoder"  # of latent models
TIME = "time"  # input of a graph whose levels have times of their own
NEGATIVE_EMBEDS, NASA_SCALE = "negative_prompt_embeds", "nasa_scale"  # inputs of a graph that can be steered
EMBEDDED_GUIDANCE = "embedded_guidance"  # input of a graph that is told a scale of guidance


class RunningGraph(Protocol):
    """A graph that is loaded: a function of its named inputs, batch first; its first output is float32."""

    inputs: tuple[str, ...]

    def __call__(self, feed: Feed, /) -> np.ndarray: ...

    def named(self, feed: Feed, /) -> Feed:
        """All outputs by name, in their own types."""


class GraphGenerator(Generator):
    """The graphs in `folder` of the denoiser whose own folder is `model`.

    `open_graph` loads the file of one, e.g. `decoder.onnx`; `suffix` is what such files end with.
    `target` is the export that they were made of, where that is elsewhere.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        manifest: Manifest,
        open_graph: Callable[[Path], RunningGraph],
        *,
        name: str,
        suffix: str,
        on_gpu: bool = False,
        target: str = "",
    ) -> None:
        self.name, self.on_gpu = name, on_gpu
        self._files = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        card = generator_card(manifest)
        assert card.image and card.cond and card.sampler, "`choose` has refused others"  # noqa: PT018
        self.image, self.cond, self.sampler = card.image, card.cond, card.sampler
        self._steerable = False

        def open_denoiser(path: Path) -> Graph:
            return self._steered(open_graph(path))

        if card.partition is None:
            graph = open_denoiser(folder / f"{DENOISER}{suffix}")
            self._route: Callable[[Feed, int], Graph] = lambda _cond, _batch: graph
        else:
            experts = (folder, model / ROUTER, manifest.ref, card.partition, open_denoiser)
            self._route = Experts(*experts, suffix=suffix).route

        def companion(stem: str) -> RunningGraph | None:
            path = folder / f"{stem}{suffix}"
            return open_graph(path) if path.exists() else None

        self._decoder, self._encoder = companion(DECODER), companion(ENCODER)
        self._text = self._tokens = None
        if self.cond.kind == "prompt":
            self._text = open_graph(folder / f"{TEXT_ENCODER}{suffix}")
            source = model / "exports" / target if target else folder
            self._tokens = PromptTokens(model, reading_of(source, self.cond))

    def generate(self, key: ImageKey, items: Sequence[ImageItem]) -> np.ndarray:
        shape = self.image.channels, self.image.height, self.image.width
        cond = self._condition(key, items)
        null = self._null(key, items) if key.guidance != 1 and cond else None
        graph = self._route(cond, len(items))

        def denoise(x: np.ndarray, *level: float) -> np.ndarray:
            if null is None:
                return self._x0(graph, x, level, cond)
            both = {name: np.concatenate([value, null.get(name, value)]) for name, value in cond.items()}
            x0 = self._x0(graph, np.concatenate([x, x]), level, both)
            with_cond, without = np.split(x0, 2)
            rule, scale, sigma = self.cond.guidance_rule, np.float32(key.guidance), np.float32(level[0])
            guided: np.ndarray = guide_by(rule, with_cond, without, scale, x, sigma)
            return guided

        x0 = sample(
            denoise,
            self.sampler,
            lambda draw: noise_of(items, draw, shape),
            key.num_steps,
            self._init_image(key, items),
        )
        pictures = np.clip(self._decoder({"x0": x0}) if self._decoder else x0, -1, 1)
        return pictures if key.init_image is None else with_known_pixels(pictures, items)

    def cuts(self, prompt: str) -> bool:
        return self._tokens is not None and self._tokens.cuts(prompt)

    def held(self) -> dict[Hashable, int]:
        return {id(self): self._files}

    def _init_image(self, key: ImageKey, items: Sequence[ImageItem]) -> InitImage | None:
        if key.init_image is None:
            return None
        y = init_pictures(items)
        if self._decoder is not None:
            if self._encoder is None:
                raise ConfigError(
                    "this export cannot read pictures, as it was made before that was possible; convert the "
                    "model again, or leave image out",
                    field="image",
                )
            y = self._encoder({"picture": y})
        return init_image_of(key.init_image, y, items)

    def _x0(self, graph: Graph, x: np.ndarray, level: Sequence[float], cond: Feed) -> np.ndarray:
        """x0 at a level: sigma, and the time that goes with it. A graph takes it where sigma does not tell it."""
        told = dict(zip(("sigma", TIME) if self.sampler.timed else ("sigma",), level))
        levels = {name: np.full(len(x), value, dtype=np.float32) for name, value in told.items()}
        return graph({"x_sigma": x.astype(np.float32, copy=False), **levels, **cond})

    def _steered(self, graph: RunningGraph) -> Graph:
        """A denoiser's graph; where it can be steered, plain requests steer it by nothing."""
        if NASA_SCALE not in graph.inputs:
            return graph
        self._steerable = True

        def run(feed: Feed) -> np.ndarray:
            batch = len(feed["x_sigma"])
            off = {NEGATIVE_EMBEDS: feed["prompt_embeds"], NASA_SCALE: np.zeros(batch, np.float32)}
            return graph({**off, **feed})

        return run

    def _condition(self, key: ImageKey, items: Sequence[ImageItem]) -> Feed:
        if self.cond.kind == "class_label":
            return {"class_label": np.array([item.class_label for item in items], dtype=np.int64)}
        if self.cond.kind == "prompt":
            cond = self._embed([item.prompt or "" for item in items])
            if self.cond.embedded_guidance is not None:
                told = np.full(len(items), self.cond.embedded_guidance, np.float32)
                cond = {**cond, EMBEDDED_GUIDANCE: told}
            return {**cond, **self._steering(items)} if key.negative == "attention" else cond
        if self.cond.kind == LOW_RESOLUTION:
            return {LOW_RESOLUTION: init_pictures(items)}
        return {}

    def _steering(self, items: Sequence[ImageItem]) -> Feed:
        if not self._steerable:
            raise ConfigError(
                "this export cannot turn away from a negative prompt: its network has no cross-attention for it, or "
                "it was made before that was possible; convert the model again, or leave negative_prompts out",
                field="negative_prompts",
            )
        scales = [item.negative_scale if item.negative else 0.0 for item in items]
        embeds = self._embed([item.negative for item in items])["prompt_embeds"]
        return {NEGATIVE_EMBEDS: embeds, NASA_SCALE: np.array(scales, np.float32)}

    def _null(self, key: ImageKey, items: Sequence[ImageItem]) -> Feed:
        if self.cond.kind == "prompt":
            prompts = [item.negative if key.negative == "guidance" else "" for item in items]
            null = self._embed(prompts, negative=True)
            assert self._tokens is not None
            none = np.array([self._tokens.zero_null and not prompt for prompt in prompts])
            return {name: _zeroed(value, none) for name, value in null.items()}
        return {"class_label": np.full(len(items), self.cond.null_label, dtype=np.int64)}

    def _embed(self, prompts: list[str], *, negative: bool = False) -> Feed:
        assert self._text is not None
        assert self._tokens is not None
        return self._text.named(self._tokens(prompts, negative=negative))


def _zeroed(value: np.ndarray, none: np.ndarray) -> np.ndarray:
    """`value` (B, ...) with zeros in the items where `none` (B,) is."""
    zeroed: np.ndarray = np.where(none.reshape(-1, *[1] * (value.ndim - 1)), value.dtype.type(0), value)
    return zeroed
