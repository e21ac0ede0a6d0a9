"""The sampler's own settings, from `DISTILLERY_SAMPLER_*`; addresses, TLS and tokens are the shared ones."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from distill_core.errors import ConfigError


class SamplerSettings(BaseSettings):
    """Limits and tuning of one sampler process."""

    model_config = SettingsConfigDict(env_prefix="DISTILLERY_SAMPLER_", frozen=True, env_ignore_empty=True)

    preload: tuple[str, ...] = ()  # models loaded before the server reports SERVING, as a JSON list
    backend: Literal["auto", "onnxruntime", "torch"] = "auto"  # auto: ONNX where the model has it
    device: str = "cpu"  # of the torch backend
    poll_s: float = Field(2.0, gt=0)  # how often the store is asked for new versions
    max_models: int = Field(8, ge=1)  # loaded at once; above it the one longest unused is dropped
    instances: int | None = Field(None, ge=1, le=256)  # threads a model; unset: the process's CPU cores
    max_batch: int | None = Field(None, ge=1, le=1024)  # images; unset: measured when a model is loaded
    max_delay_s: float = Field(0.0, ge=0, le=1)  # wait for a fuller batch; only ever helps large devices
    max_queue_images: int = Field(256, ge=1)  # waiting, per model; above it calls are refused at once
    max_concurrent: int = Field(1024, ge=1)  # calls in flight
    max_images: int = Field(256, ge=1)  # in one request
    max_prompt_chars: int = Field(2000, ge=1)
    max_side: int = Field(4096, ge=1)  # width and height of a view
    max_pixels: int = Field(2**21, ge=1)  # of a view
    max_views: int = Field(1000, ge=1)  # in one path
    max_reply_bytes: int = Field(32 * 2**20, ge=1024)  # of one message; more goes through the streams
    grace_s: float = Field(30.0, ge=0)  # for calls in flight when the process is told to stop


def load_sampler_settings(**values: object) -> SamplerSettings:
    """Settings from the environment, with `values` above it.

    Raises:
        ConfigError: a variable has a value that is not allowed; the sentence names it.
    """
    try:
        return SamplerSettings(**values)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        said = first["msg"][0].lower() + first["msg"][1:]
        message = f"DISTILLERY_SAMPLER_{name.upper()} = {first.get('input')!r} is not allowed: {said}"
        raise ConfigError(message, field=name) from None
