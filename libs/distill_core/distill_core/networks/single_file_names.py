"""Names that the parts of Stable Diffusion have in single-file checkpoints, by the names of diffusers and transformers.

Each parameter is found under one name there; what is not the same tensor is turned, cut or squeezed as `Entry` says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import Tensor

from distill_core.networks.lora_formats.names import original_names


@dataclass(frozen=True)
class Entry:
    """Place of one parameter in a checkpoint."""

    name: str
    taken: Callable[[Tensor], Tensor] = lambda value: value


Entries = dict[str, Entry]

CODEC = (
    (r"\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r".down.\1.block.\2."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.(\d+)\.", r".up.\1.block.\2."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)
OPEN_CLIP = (
    (r"^embeddings\.token_embedding\.", "token_embedding."),
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.self_attn\.[qkv]_proj\.", ".attn.in_proj_"),
)


def unet_entries(keys: Collection[str]) -> Entries:
    """Parameters of a UNet2DConditionModel, whose blocks the first code counts through."""
    layers = {key.rpartition(".")[0] for key in keys}
    first = {paths[0]: name for name, paths in original_names(layers).items()}
    return {key: Entry(f"{first[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}") for key in keys}


def codec_entries(keys: Collection[str]) -> Entries:
    """Parameters of an AutoencoderKL; the first code counts its decoder's blocks from the other end."""
    last = max(int(match[1]) for key in keys if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", key)))
    entries = {}
    for key in keys:
        turned = re.sub(r"(?<=decoder\.up_blocks\.)\d+", lambda match: str(last - int(match[0])), key)
        entries[key] = Entry(_renamed(turned, CODEC), _as_matrix if _is_attention(key) else _same)
    return entries


def clip_entries(keys: Collection[str]) -> Entries:
    """Parameters of a CLIPTextModel, which its own program wrote."""
    return {key: Entry(f"text_model.{key.removeprefix('text_model.')}") for key in keys}


def open_clip_entries(keys: Collection[str]) -> Entries:
    """Parameters of a CLIP text model that OpenCLIP wrote: query, key and value are one matrix."""
    entries = {}
    for key in keys:
        if key == "text_projection.weight":
            entries[key] = Entry("text_projection", _transposed)
            continue
        name = _renamed(key.removeprefix("text_model."), OPEN_CLIP)
        third = re.search(r"\.self_attn\.([qkv])_proj\.", key)
        entries[key] = Entry(name, _third("qkv".index(third[1])) if third else _same)
    return entries


def _renamed(key: str, rules: Collection[tuple[str, str]]) -> str:
    for pattern, name in rules:
        key = re.sub(pattern, name, key)
    return key


def _is_attention(key: str) -> bool:
    return re.search(r"\.attentions\.0\.to_(q|k|v|out\.0)\.weight$", key) is not None


def _same(value: Tensor) -> Tensor:
    return value


def _transposed(value: Tensor) -> Tensor:
    return value.T.contiguous()


def _as_matrix(value: Tensor) -> Tensor:
    """A convolution of one pixel as the matrix that it is."""
    return value.flatten(2).squeeze(2) if value.ndim == 4 and value.shape[2:].numel() == 1 else value


def _third(number: int) -> Callable[[Tensor], Tensor]:
    return lambda value: value.chunk(3)[number].contiguous()
