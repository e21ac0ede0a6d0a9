"""ONNX Runtime: the denoiser's exported graph, sampled in NumPy. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from distill_core.artifacts import Manifest
from distill_core.diffusion.guidance import guide
from distill_core.diffusion.image_to_image import Beginning
from distill_core.diffusion.routing import ROUTER
from distill_core.diffusion.sampling import sample
from distill_core.errors import ArtifactError, ConfigError, Unavailable
from distillery_sampler.backends.base import Generator, noise
from distillery_sampler.backends.experts import Denoisers, Feed, Graph
from distillery_sampler.backends.tokens import PromptTokens
from distillery_sampler.beginnings import beginning, given_pictures, with_known_pixels
from distillery_sampler.requests import ImageItem, ImageKey

TEXT_ENCODER = "text_encoder.onnx"
DECODER, ENCODER = "decoder.onnx", "encoder.onnx"  # of latent models
NEGATIVE_EMBEDS, NASA_SCALE = "negative_prompt_embeds", "nasa_scale"  # inputs of a graph that can be steered


class OnnxGenerator(Generator):
    """The graphs in `folder` of the denoiser whose own folder is `model`."""

    name = "onnxruntime"

    def __init__(self, model: Path, folder: Path, manifest: Manifest, *, threads: int) -> None:
        assert manifest.image and manifest.cond and manifest.sampler, "`choose` has refused others"  # noqa: PT018
        self.image, self.cond, self.sampler = manifest.image, manifest.cond, manifest.sampler
        self._steerable = False
        self._denoisers = Denoisers(
            folder, model / ROUTER, manifest, lambda path: self._opened(open_session(path, threads))
        )
        self._decoder = open_session(folder / DECODER, threads) if (folder / DECODER).exists() else None
        self._encoder = open_session(folder / ENCODER, threads) if (folder / ENCODER).exists() else None
        self._text = self._tokens = None
        if self.cond.kind == "prompt":
            self._text = open_session(folder / TEXT_ENCODER, threads)
            self._tokens = PromptTokens(model / "tokenizer", self.cond.max_tokens or 77)

    def generate(self, key: ImageKey, items: Sequence[ImageItem]) -> np.ndarray:
        shape = self.image.channels, self.image.height, self.image.width
        cond = self._condition(key, items)
        null = self._null(key, items) if key.guidance != 1 and cond else None
        parts = self._denoisers.parts(cond, len(items))

        def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
            if null is None:
                return self._x0(x, sigma, cond, parts)
            both = {name: np.concatenate([value, null[name]]) for name, value in cond.items()}
            x0 = self._x0(np.concatenate([x, x]), sigma, both, np.concatenate([parts, parts]))
            with_cond, without = np.split(x0, 2)
            return guide(with_cond, without, np.float32(key.guidance))

        x0 = sample(
            denoise,
            self.sampler,
            lambda draw: noise(items, draw, shape),
            key.num_steps,
            self._beginning(key, items),
        )
        pictures = _run(self._decoder, {"x0": x0}) if self._decoder else x0
        return with_known_pixels(np.clip(pictures, -1, 1), items)

    def _beginning(self, key: ImageKey, items: Sequence[ImageItem]) -> Beginning | None:
        if key.begin is None:
            return None
        y = given_pictures(items)
        if self._decoder is not None:
            if self._encoder is None:
                raise ConfigError(
                    "this export cannot read pictures, as it was made before that was possible; convert the "
                    "model again, or leave image out",
                    field="image",
                )
            y = _run(self._encoder, {"picture": y})
        return beginning(key.begin, y, items)

    def _x0(self, x: np.ndarray, sigma: float, cond: Feed, parts: np.ndarray) -> np.ndarray:
        level = np.full(len(x), sigma, dtype=np.float32)
        feed = {"x_sigma": x.astype(np.float32, copy=False), "sigma": level, **cond}
        return self._denoisers(feed, parts)

    def _opened(self, session: onnxruntime.InferenceSession) -> Graph:
        """A denoiser's graph; where it can be steered, plain requests steer it by nothing."""
        if NASA_SCALE not in {node.name for node in session.get_inputs()}:
            return partial(_run, session)
        self._steerable = True

        def run(feed: Feed) -> np.ndarray:
            batch = len(feed["x_sigma"])
            off = {NEGATIVE_EMBEDS: feed["prompt_embeds"], NASA_SCALE: np.zeros(batch, np.float32)}
            return _run(session, {**off, **feed})

        return run

    def _condition(self, key: ImageKey, items: Sequence[ImageItem]) -> Feed:
        if self.cond.kind == "class_label":
            return {"class_label": np.array([item.class_label for item in items], dtype=np.int64)}
        if self.cond.kind == "prompt":
            cond = {"prompt_embeds": self._embed([item.prompt or "" for item in items])}
            return {**cond, **self._steering(items)} if key.negative == "attention" else cond
        return {}

    def _steering(self, items: Sequence[ImageItem]) -> Feed:
        if not self._steerable:
            raise ConfigError(
                "this export cannot turn away from a negative prompt, as it was made before that was possible; "
                "convert the model again, or leave negative_prompts out",
                field="negative_prompts",
            )
        scales = [item.negative_scale if item.negative else 0.0 for item in items]
        embeds = self._embed([item.negative for item in items])
        return {NEGATIVE_EMBEDS: embeds, NASA_SCALE: np.array(scales, np.float32)}

    def _null(self, key: ImageKey, items: Sequence[ImageItem]) -> Feed:
        if self.cond.kind == "prompt":
            negative = key.negative == "guidance"
            return {"prompt_embeds": self._embed([item.negative if negative else "" for item in items])}
        return {"class_label": np.full(len(items), self.cond.null_label, dtype=np.int64)}

    def _embed(self, prompts: list[str]) -> np.ndarray:
        assert self._text is not None
        assert self._tokens is not None
        return _run(self._text, {"input_ids": self._tokens(prompts)})


def _run(session: onnxruntime.InferenceSession, feed: dict[str, Any]) -> np.ndarray:
    return session.run(None, feed)[0]


def open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """A session on the best provider this onnxruntime has.

    Raises:
        ArtifactError: the file is missing or no valid ONNX graph. Unavailable: the provider did not start.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry(
        "session.intra_op.allow_spinning", "0"
    )  # spinning pools fight over cores
    options.log_severity_level = 3
    wanted = [p for p in ("CUDAExecutionProvider",) if p in onnxruntime.get_available_providers()]
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=[*wanted, "CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ArtifactError(f"{path.name} cannot be loaded: {str(error).splitlines()[0]}") from None
    if wanted and session.get_providers()[: len(wanted)] != wanted:  # it falls back to the CPU without a word
        raise Unavailable(
            f"onnxruntime could not start {wanted[0]}; check the driver, or install onnxruntime"
        )
    return session
