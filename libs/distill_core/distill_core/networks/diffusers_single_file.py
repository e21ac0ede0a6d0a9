"""Single-file checkpoints of Stable Diffusion 1.x, 2.x and XL, unpacked to the folder of a pipeline.

A file holds weights alone. Settings, tokenizers and the parts that it lacks come from the folder of a pipeline of the
same kind; nothing is fetched. Every tensor of the file is used, known to be none of the model's, or named in an error.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distill_core.errors import ArtifactError
from distill_core.files.json_tables import read_table
from distill_core.networks.foreign.index import INDEX, SLOTS
from distill_core.networks.foreign.weights import opened_safetensors
from distill_core.networks.foreign_configs import check_numbers
from distill_core.networks.single_file_names import (
    Entries,
    Entry,
    clip_entries,
    codec_entries,
    open_clip_entries,
    unet_entries,
)

SIDECAR = "distillery.json"
UNET, UNET_BARE = "model.diffusion_model.", ""
SHOWN = 5  # names in an error
OTHERS = {
    "SD 3": r"(^|\.)joint_blocks\.0\.",
    "FLUX": r"(^|\.)double_blocks\.0\.",
    "Sana": r"(^|\.)blocks\.0\.cross_attn\.q_linear\.",
    "Z-Image": r"(^|\.)layers\.0\.adaLN_modulation\.0\.",
    "ControlNet": r"^control_model\.",
    "SDXL's refiner": r"^conditioner\.embedders\.0\.model\.",
}  # models whose single files are not read, by a layer of theirs
NOT_THE_MODEL = re.compile(
    r"^model_ema\.|^first_stage_model\.loss\.|^denoiser\.|^(log_)?(one_minus_|sqrt_|posterior_|betas|alphas_)"
    r"|^(global_step|v_pred|ztsnr|lvlb_weights|scale_factor|logvar)$|\.position_ids$|\.logit_scale$"
    r"|^cond_stage_model\.model\.(text_projection|attn_mask)$|^sqrt_recip|\.attn_mask$"
)  # of the training, or constants
UNREAD_LAYER = r"^cond_stage_model\.model\.transformer\.resblocks\.{}\."  # SD 2 reads the last layer but one


@dataclass(frozen=True)
class Checkpoint:
    """A single file whose parts were recognised."""

    file: Path
    family: str  # in words
    parts: tuple[str, ...]  # folders of a pipeline that it has the weights of
    marks: frozenset[str]  # v_pred, ztsnr: what the network predicts, and that its noise ends without signal
    extra: int = 0  # weights of an average beside, which are left out


@dataclass(frozen=True)
class _Part:
    folder: str
    prefix: str
    entries: Callable[[Collection[str]], Entries]


_SLOTS = (
    _Part("unet", UNET, unet_entries),
    _Part("vae", "first_stage_model.", codec_entries),
    _Part("text_encoder", "cond_stage_model.transformer.", clip_entries),
    _Part("text_encoder", "cond_stage_model.model.", open_clip_entries),
    _Part("text_encoder", "conditioner.embedders.0.transformer.", clip_entries),
    _Part("text_encoder_2", "conditioner.embedders.1.model.", open_clip_entries),
)
_BARE = (
    _Part("unet", UNET_BARE, unet_entries),
    _Part("unet", "", lambda keys: {key: Entry(key) for key in keys}),
)


def recognised(file: Path) -> Checkpoint | None:
    """The checkpoint in a safetensors file, by its tensors' names; None if it is none of Stable Diffusion.

    Raises:
        NotFound, ArtifactError: no such file, a pickle, or of a model whose single files are not read.
    """
    with opened_safetensors(file) as opened:
        names = set(opened.keys())
        other = next(
            (kind for kind, mark in OTHERS.items() if any(map(re.compile(mark).search, names))), None
        )
        if other is not None:
            raise ArtifactError(
                f"{file} is a checkpoint of {other}, whose single files are not read; import a pipeline's folder"
            )
        found = _parts_in(names)
        if not found:
            return None
        scaled = next((name for name in names if re.search(r"scale_weight$|^scaled_fp8$", name)), None)
        if scaled is not None:
            raise ArtifactError(
                f"{file} keeps its weights divided by scales ({scaled}), which is not read; import the file in fp16"
            )
        unet = next(part for part in found if part.folder == "unet")
        width = next(
            (opened.get_slice(n).get_shape()[1] for n in names if n.endswith("attn2.to_k.weight")), None
        )
        _check_shown(file, opened, unet)
    return Checkpoint(
        file,
        _family(names, width),
        tuple(part.folder for part in found),
        frozenset(names & {"v_pred", "ztsnr"}),
        sum(name.startswith("model_ema.") for name in names),
    )


def _parts_in(names: set[str]) -> list[_Part]:
    if f"{UNET}input_blocks.0.0.weight" in names:
        return [part for part in _SLOTS if any(name.startswith(part.prefix) for name in names)]
    if "input_blocks.0.0.weight" in names:
        return [_BARE[0]]
    return [_BARE[1]] if {"conv_in.weight", "time_embedding.linear_1.weight"} <= names else []


def _family(names: set[str], width: int | None) -> str:
    if any(re.search(r"(label_emb|add_embedding)\.", name) for name in names):
        return "Stable Diffusion XL"
    if any(name.startswith("cond_stage_model.model.") for name in names) or width == 1024:
        return "Stable Diffusion 2.x"
    if any(name.startswith("cond_stage_model.transformer.") for name in names) or width == 768:
        return "Stable Diffusion 1.x"
    return "Stable Diffusion"


def _check_shown(file: Path, opened: Any, unet: _Part) -> None:
    """Refuse a network that is shown more than the noised sample."""
    first, last = f"{unet.prefix}input_blocks.0.0.weight", f"{unet.prefix}out.2.weight"
    if first not in opened.keys():  # noqa: SIM118
        first, last = "conv_in.weight", "conv_out.weight"
    shown = opened.get_slice(first).get_shape()[1]
    made = opened.get_slice(last).get_shape()[0] if last in opened.keys() else shown  # noqa: SIM118
    if shown != made:
        raise ArtifactError(
            f"{file} is shown {shown} channels and makes {made}, as those do that paint into a picture or edit one; "
            "only networks that see the noised sample alone are read"
        )


def unpack(checkpoint: Checkpoint, config: Path, folder: Path) -> None:
    """Write the checkpoint as a pipeline's folder, with the settings, tokenizers and further parts of `config`.

    Raises:
        ArtifactError: a part that neither has, or weights that do not fit the settings, or that no part has.
    """
    used: set[str] = set()
    with opened_safetensors(checkpoint.file) as opened:
        names = set(opened.keys())
        own = _parts_in(names)
        _copy(config, folder, {part.folder for part in own})
        if checkpoint.marks:
            _mark(folder, checkpoint.marks)
        for part in own:
            used |= _write_part(checkpoint.file, opened, part, folder)
        ignored = {name for name in names - used if NOT_THE_MODEL.search(name)} | set(_unread(names - used))
        left = sorted(names - used - ignored)
    if left:
        raise ArtifactError(
            f"{checkpoint.file} holds {len(left)} tensors that {config} has no place for: {_listed(left)}"
        )


def _unread(names: Collection[str]) -> Iterator[str]:
    """Tensors of the text encoder's last layer, where the layers before are read."""
    numbers = [int(m[1]) for n in names if (m := re.match(UNREAD_LAYER.format(r"(\d+)"), n))]
    if len(set(numbers)) == 1:
        yield from (n for n in names if re.match(UNREAD_LAYER.format(numbers[0]), n))


def _copy(config: Path, folder: Path, own: Collection[str]) -> None:
    """The settings of a pipeline's folder, and its other parts, whose weights stay where they are."""
    for name in (INDEX, SIDECAR):
        if (config / name).is_file():
            shutil.copy(config / name, folder / name)
    for part in ("scheduler", *SLOTS):
        if part in own:
            if not (config / part / "config.json").is_file():
                raise ArtifactError(
                    f"{config} lacks {part}/config.json, the settings of a part of this checkpoint"
                )
            (folder / part).mkdir()
            shutil.copy(config / part / "config.json", folder / part / "config.json")
        elif (config / part).is_dir():
            (folder / part).symlink_to((config / part).resolve())


def _mark(folder: Path, marks: Collection[str]) -> None:
    """What the file says of its network, in the place of what the settings do."""
    (folder / SIDECAR).unlink(missing_ok=True)
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        table = read_table(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from None
    (folder / "scheduler").unlink()
    (folder / "scheduler").mkdir()
    table["prediction_type"] = "v_prediction"
    if "ztsnr" in marks:
        table |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    path.write_text(json.dumps(table))


def _write_part(file: Path, opened: Any, part: _Part, folder: Path) -> set[str]:
    """Write one part's weights under the names of its class; the names in the file that they had."""
    shapes = {key: value.shape for key, value in _empty(folder / part.folder).state_dict().items()}
    try:
        entries = part.entries(shapes)
    except (KeyError, ValueError, IndexError) as error:
        raise ArtifactError(
            f"{folder / part.folder} has settings that no such checkpoint has: {error}"
        ) from None
    names = set(opened.keys())
    lacking = sorted(entry.name for entry in entries.values() if part.prefix + entry.name not in names)
    if lacking:
        raise ArtifactError(
            f"{file} does not fit the settings of its {part.folder}: it lacks {len(lacking)} of {len(entries)} "
            f"tensors: {_listed(lacking)}"
        )
    tensors: dict[str, Tensor] = {
        key: entry.taken(opened.get_tensor(part.prefix + entry.name)) for key, entry in entries.items()
    }
    misfits = sorted(
        f"{entries[key].name} {tuple(value.shape)} for {tuple(shapes[key])}"
        for key, value in tensors.items()
        if value.shape != shapes[key]
    )
    if misfits:
        raise ArtifactError(
            f"{file} does not fit the settings of its {part.folder} in {len(misfits)} tensors: {_listed(misfits)}"
        )
    stem = "model" if part.folder.startswith("text_encoder") else "diffusion_pytorch_model"
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors, folder / part.folder / f"{stem}.safetensors", metadata={"format": "pt"})
    return {part.prefix + entry.name for entry in entries.values()}


def _empty(folder: Path) -> nn.Module:
    """The part that a folder's config describes, without memory for its weights."""
    import transformers

    check_numbers(folder)
    try:
        with torch.device("meta"):
            if folder.name.startswith("text_encoder"):
                name = "CLIPTextModelWithProjection" if folder.name.endswith("_2") else "CLIPTextModel"
                encoder: Any = getattr(transformers, name)
                return encoder(encoder.config_class.from_pretrained(folder, local_files_only=True))  # type: ignore[no-any-return]
            cls: Any = diffusers.UNet2DConditionModel if folder.name == "unet" else diffusers.AutoencoderKL
            return cls.from_config(cls.load_config(folder, local_files_only=True))  # type: ignore[no-any-return]
    except Exception as error:  # both libraries raise many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise ArtifactError(f"{folder.name}/config.json is damaged: {reason}") from error


def _listed(names: Collection[str]) -> str:
    return ", ".join(list(names)[:SHOWN]) + (" …" if len(names) > SHOWN else "")
