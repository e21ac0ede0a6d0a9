"""Words that pipelines of diffusers put around prompts, as diffusers itself has them: no config says them."""

from __future__ import annotations

import functools
import inspect
from typing import Any


@functools.cache
def sana_instruction() -> str:
    """What Sana's pipeline puts before each prompt, and before no negative one."""
    from diffusers.pipelines.sana.pipeline_sana import SanaPipeline

    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)


@functools.cache
def qwen_image_template() -> tuple[str, int]:
    """What Qwen-Image's pipeline puts a prompt into, and the number of first tokens that it leaves out then."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline

    parts: dict[str, Any] = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "transformer"))
    pipeline: Any = QwenImagePipeline(**parts)
    return pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx
