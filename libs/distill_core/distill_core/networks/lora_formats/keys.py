"""Keys of LoRA files, taken apart: which model of a pipeline, which of its layers, and which factor of that.

    lora_unet_mid_block_attentions_0_proj_in.lora_down.weight  ->  unet, mid_block_attentions_0_proj_in, down

Names of layers stay as they are written; `names` knows which layer of a network each of them means.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from distill_core.errors import ArtifactError

Role = Literal["down", "up", "alpha"]
NETWORK, TEXT = "network", "text_encoder"  # parts; further text encoders are text_encoder_2, text_encoder_3

PREFIXES = (
    ("unet.", NETWORK, "diffusers"),
    ("transformer.", NETWORK, "diffusers"),
    ("text_encoder.", TEXT, "diffusers"),
    ("text_encoder_2.", f"{TEXT}_2", "diffusers"),
    ("text_encoder_3.", f"{TEXT}_3", "diffusers"),
    ("lora_unet_", NETWORK, "kohya"),
    ("lora_transformer_", NETWORK, "kohya"),
    ("lora_te_", TEXT, "kohya"),
    ("lora_te1_", TEXT, "kohya"),
    ("lora_te2_", f"{TEXT}_2", "kohya"),
    ("lora_te3_", f"{TEXT}_3", "kohya"),
    ("diffusion_model.", NETWORK, "ComfyUI"),
    ("text_encoders.clip_l.transformer.", TEXT, "ComfyUI"),
    ("text_encoders.clip_g.transformer.", f"{TEXT}_2", "ComfyUI"),
    ("text_encoders.t5xxl.transformer.", f"{TEXT}_t5", "ComfyUI"),
    ("base_model.model.", NETWORK, "peft"),
)  # none of them: the network's own names, as `save_lora_adapter` of diffusers writes them
ENDINGS: dict[str, Role] = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".alpha": "alpha",
}
OTHERS = {
    "DoRA": re.compile(r"\.(dora_scale|lora_magnitude_vector(\.\w+)*)$"),
    "LoHa": re.compile(r"\.hada_\w+$"),
    "LoKr": re.compile(r"\.lokr_\w+$"),
    "LoCon-CP": re.compile(r"\.lora_mid\.weight$"),
}  # kinds of adapters whose product is no pair of matrices
OF_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True)
class Key:
    """A key's meaning."""

    part: str
    layer: str  # as it is written
    role: Role
    style: str  # whose keys are like this


def parsed(keys: Iterable[str], where: str) -> dict[str, Key]:
    """The meaning of each key of the file `where`.

    Raises:
        ArtifactError: adapters of another kind, with their number, or keys that are not understood, the first by name.
    """
    keys = sorted(keys)
    _refuse_others(keys, where)
    meanings = {key: _parsed(key) for key in keys}
    unknown = [key for key, meaning in meanings.items() if meaning is None]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ArtifactError(
            f"{where} holds {unknown[0]}{more}, which no LoRA is known to have; known are the keys of diffusers, "
            "kohya, peft and ComfyUI"
        )
    return {key: meaning for key, meaning in meanings.items() if meaning is not None}


def is_lora(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is meant as a LoRA, or as an adapter of another kind."""
    ends = tuple(end for end in ENDINGS if end != ".alpha")
    return any(key.endswith(ends) or any(kind.search(key) for kind in OTHERS.values()) for key in keys)


def _refuse_others(keys: list[str], where: str) -> None:
    for kind, ending in OTHERS.items():
        layers = {ending.sub("", key) for key in keys if ending.search(key)}
        if layers:
            raise ArtifactError(
                f"{where} holds {len(layers)} layers of {kind}, and only plain LoRA is read; merge it into its base "
                "with the program that made it, and import that"
            )


def _parsed(key: str) -> Key | None:
    ending = next((end for end in sorted(ENDINGS, key=len, reverse=True) if key.endswith(end)), None)
    if ending is None:
        return None
    stem = key.removesuffix(ending)
    prefix, part, style = next(
        (row for row in PREFIXES if stem.startswith(row[0])), ("", NETWORK, "diffusers")
    )
    layer = stem.removeprefix(prefix)
    if ending.startswith("_lora."):
        style, layer = "older diffusers", _of_processor(layer, part)
    elif ".lora" in ending and style == "diffusers" and "lora_" not in ending.replace("lora_linear", ""):
        style = "older diffusers"
    return Key(part, layer, ENDINGS[ending], style)


def _of_processor(layer: str, part: str) -> str:
    """The layer that a factor of an attention processor adapts: `x.processor.to_out` is `x.to_out.0`."""
    head, _, name = layer.replace(".processor", "").rpartition(".")
    if part != NETWORK:
        return f"{head}.{OF_TEXT.get(name, name)}"
    return f"{head}.to_out.0" if name == "to_out" else f"{head}.{name}"
