"""Clients of the sampler, for programs that want pictures or views; they import neither torch nor the server.

with SamplerClient("127.0.0.1:50052") as sampler:
digits = sampler.generate("digits", class_labels=range(10), seed=1)
to_pil(digits[0]).save("zero.png")

async with AsyncSamplerClient("127.0.0.1:50052") as sampler:
digits = await sampler.generate("digits", class_labels=range(10), seed=1)
"""

from distillery_sampler.client.aio import AsyncSamplerClient
from distillery_sampler.client.messages import (
    GenerateOptions,
    SeenView,
    ViewOptions,
    cut_prompts,
    generate_request,
    outputs_of,
    picture_from,
    predict_request,
    to_pil,
    view_options,
)
from distillery_sampler.client.sync import SamplerClient
from distillery_sampler.v1.wire import tensor_from

__all__ = [
    "AsyncSamplerClient",
    "GenerateOptions",
    "SamplerClient",
    "SeenView",
    "ViewOptions",
    "cut_prompts",
    "generate_request",
    "outputs_of",
    "picture_from",
    "predict_request",
    "tensor_from",
    "to_pil",
    "view_options",
]
