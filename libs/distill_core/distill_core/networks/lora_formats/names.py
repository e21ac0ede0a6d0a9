"""Names that programs have for the layers of a network: those of diffusers, and those of who published it first.

Stable Diffusion's first code counts blocks through (`input_blocks.4.1`), FLUX's keeps query, key and value in one layer
(`img_attn.qkv`), whose rows are those of several of diffusers' layers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

Names = Mapping[str, tuple[str, ...]]  # a written name -> the layers whose rows it holds, in order

RESNET = {
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
MIDDLE = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}
FLUX = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
SWAPPED = "norm_out.linear"  # of FLUX: its scale comes before its shift, and in the first code after it


def names_of(paths: Collection[str]) -> Names:
    """Every way of writing the layers of a network, with dots and, as kohya does, with underscores in their place."""
    dotted = {path: (path,) for path in paths} | original_names(paths)
    return {name.replace(".", "_"): layers for name, layers in dotted.items()} | dotted


def text_names(paths: Collection[str]) -> Names:
    """The same for a text encoder, whose layers lie below `text_model.` in some versions of transformers."""
    short = {path.removeprefix("text_model."): (path,) for path in paths}
    dotted = short | {f"text_model.{name}": layers for name, layers in short.items()}
    return {name.replace(".", "_"): layers for name, layers in dotted.items()} | dotted


def original_names(paths: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The names that the layers had first, where they are known: of Stable Diffusion's UNets, and of FLUX."""
    if is_flux(paths):
        return _flux(paths)
    if is_stable_diffusion(paths):
        blocks = _blocks(paths)
        return {name: (path,) for path in paths if (name := _of_unet(path, blocks)) is not None}
    return {}


def is_flux(paths: Collection[str]) -> bool:
    """Whether these are layers of a FLUX transformer."""
    return any(re.match(r"single_transformer_blocks\.\d+\.proj_mlp$", path) for path in paths)


def is_stable_diffusion(paths: Collection[str]) -> bool:
    """Whether these are layers of a UNet that reads prompts."""
    return "conv_in" in paths and any(".transformer_blocks." in path for path in paths)


def is_sdxl(paths: Collection[str]) -> bool:
    """Whether these are layers of a UNet that is told the picture's size."""
    return is_stable_diffusion(paths) and "add_embedding.linear_1" in paths


def _flux(paths: Collection[str]) -> dict[str, tuple[str, ...]]:
    names: dict[str, tuple[str, ...]] = {name: layers for name, layers in FLUX.items() if layers[0] in paths}
    for ours, theirs, table in (
        ("transformer_blocks", "double_blocks", DOUBLE),
        ("single_transformer_blocks", "single_blocks", SINGLE),
    ):
        for number in sorted({int(path.split(".")[1]) for path in paths if path.startswith(f"{ours}.")}):
            for name, layers in table.items():
                whole = tuple(f"{ours}.{number}.{layer}" for layer in layers)
                if set(whole) <= set(paths):
                    names[f"{theirs}.{number}.{name}"] = whole
    return names


@dataclass(frozen=True)
class _Block:
    """Place of a UNet's block in the count of the first code."""

    start: int
    resnets: int
    attends: bool


def _blocks(paths: Collection[str]) -> dict[str, _Block]:
    """The blocks of a UNet by name; each side is counted through in order, a downsampler with its block."""
    blocks = {}
    for side, following in (("down_blocks", 1), ("up_blocks", 0)):
        for number in sorted(set(_numbers(paths, rf"{side}\.(\d+)\."))):
            name = f"{side}.{number}"
            inside = [path.removeprefix(f"{name}.") for path in paths if path.startswith(f"{name}.")]
            resnets = 1 + max(_numbers(inside, r"resnets\.(\d+)\."))
            blocks[name] = _Block(following, resnets, any(p.startswith("attentions.") for p in inside))
            following += resnets + any(path.startswith("downsamplers.") for path in inside)
    return blocks


def _numbers(paths: Iterable[str], pattern: str) -> Iterator[int]:
    return (int(match[1]) for path in paths if (match := re.match(pattern, path)))


def _of_unet(path: str, blocks: Mapping[str, _Block]) -> str | None:
    parts = path.split(".")
    if path in UNET:
        return UNET[path]
    if parts[0] == "mid_block":
        return f"middle_block.{MIDDLE['.'.join(parts[1:3])]}.{_inner(parts[1], parts[3:])}"
    block, kind = blocks.get(".".join(parts[:2])), parts[2] if len(parts) > 2 else ""
    if block is None:
        return None
    side = {"down_blocks": "input_blocks", "up_blocks": "output_blocks"}[parts[0]]
    if kind == "downsamplers":
        return f"{side}.{block.start + block.resnets}.0.op"
    if kind == "upsamplers":
        return f"{side}.{block.start + block.resnets - 1}.{1 + block.attends}.conv"
    return f"{side}.{block.start + int(parts[3])}.{int(kind == 'attentions')}.{_inner(kind, parts[4:])}"


def _inner(kind: str, parts: list[str]) -> str:
    return RESNET[parts[0]] if kind == "resnets" else ".".join(parts)
