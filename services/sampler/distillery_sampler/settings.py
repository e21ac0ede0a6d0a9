"""The sampler's own settings, from `DISTILLERY_SAMPLER_*`; addresses, TLS and tokens are the shared ones."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from distill_core.errors import ConfigError

UNITS = {"": 1, "B": 1, **{f"{letter}iB": 2 ** (10 * (i + 1)) for i, letter in enumerate("KMGT")}}
UNITS |= {f"{letter}B": 1000 ** (i + 1) for i, letter in enumerate("KMGT")}


def read_bytes(value: Any) -> Any:
    """`4GiB`, `500 MB` or a plain number as bytes.

    Raises:
        ValueError: no number, or another unit.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", str(value))
    if not match or match[2] not in UNITS:
        raise ValueError("give a number of bytes, or one with KiB, MiB, GiB, TiB, KB, MB, GB or TB")
    return int(float(match[1]) * UNITS[match[2]])


ByteSize = Annotated[int, BeforeValidator(read_bytes)]
Target = Annotated[str, Field(pattern=r"^(onnx|trt)-(fp32|fp16|bf16|int8)$")]


class SamplerSettings(BaseSettings):
    """Limits and tuning of one sampler process."""

    model_config = SettingsConfigDict(env_prefix="DISTILLERY_SAMPLER_", frozen=True, env_ignore_empty=True)

    preload: tuple[str, ...] = ()  # loaded before SERVING is reported, and never dropped; a JSON list
    backend: Literal["auto", "onnxruntime", "tensorrt", "torch"] = "auto"  # auto: torch without an export
    targets: tuple[Target, ...] = ("onnx-fp32",)  # exports that are used; of several the first in this list
    device: str = "cpu"  # of the torch backend
    precision: Literal["fp32", "bf16"] = "fp32"  # of the torch backend's networks and decoders
    buckets: tuple[int, ...] | None = None  # batch sizes that run, others filled up; unset: on GPUs 1 to 32
    cuda_graphs: bool = True  # torch on a GPU: one recorded graph per bucket, replayed
    rewrite_graphs: bool = True  # ONNX on the CPU: what its kernels are slow at is written in another way
    poll_s: float = Field(2.0, gt=0)  # how often the store is asked for new versions
    max_models: int = Field(8, ge=1)  # loaded at once; above it the one longest unused is dropped
    max_memory: ByteSize | None = Field(
        None, ge=2**20
    )  # of all models, e.g. 4GiB; unset: 0.8 of what is there
    keep_replaced_s: float = Field(60.0, ge=0)  # a replaced version stays loaded, where there is room
    instances: int | None = Field(None, ge=1, le=256)  # threads a model; unset: the process's CPU cores
    threads: int | None = Field(None, ge=1, le=256)  # inside each of them; unset: the cores, shared out
    max_batch: int | None = Field(None, ge=1, le=1024)  # images; unset: measured when a model is loaded
    max_batch_s: float = Field(0.5, gt=0)  # no batch size is chosen that takes longer for one step
    max_delay_s: float = Field(0.0, ge=0, le=1)  # wait for a fuller batch; only ever helps large devices
    max_queue_images: int = Field(256, ge=1)  # waiting, per model; above it calls are refused at once
    max_concurrent: int = Field(1024, ge=1)  # calls in flight
    max_images: int = Field(256, ge=1)  # in one request
    max_prompt_chars: int = Field(2000, ge=1)  # characters of one prompt
    max_side: int = Field(4096, ge=1)  # width and height of a view
    max_pixels: int = Field(2**21, ge=1)  # of a view
    max_views: int = Field(1000, ge=1)  # in one path
    max_reply_bytes: int = Field(32 * 2**20, ge=1024)  # of one message; more goes through the streams
    grace_s: float = Field(30.0, ge=0)  # for calls in flight when the process is told to stop

    @field_validator("buckets")
    @classmethod
    def _ascending(cls, buckets: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if buckets is not None and (not buckets or min(buckets) < 1 or list(buckets) != sorted(set(buckets))):
            raise ValueError("give batch sizes from 1 on, ascending, e.g. [1, 2, 4, 8]")
        return buckets


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
        sentence = first["msg"][0].lower() + first["msg"][1:]
        message = f"DISTILLERY_SAMPLER_{name.upper()} = {first.get('input')!r} is not allowed: {sentence}"
        raise ConfigError(message, field=name) from None
