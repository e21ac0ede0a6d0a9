"""Use of a saved denoiser in plain diffusers, in words and a few lines of code: a part of its model card.

Code holds numbers and class names alone; nothing that a user wrote.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distill_core.artifacts import SamplerSpec
from distill_core.artifacts.model_card import USAGE
from distill_core.diffusion.super_resolution import small_shape
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.diffusers_plain import PlainUse

UNCONDITIONAL = ("DDPMPipeline", "LDMPipeline")  # they take neither timesteps nor latents
RANDOM = "generator=torch.Generator().manual_seed(0)"


@dataclass(frozen=True)
class Place:
    """Place of the network's weights: in a sub-folder, of one of several experts, or an adapter alone."""

    inside: str = ""
    adapter: bool = False


def usage(
    denoiser: Denoiser, parts: dict[str, str], use: PlainUse, pipeline: str | None, place: Place
) -> str:
    """The section of the card.

    `parts` are class names by sub-folder, and `pipeline` the class that makes the sampler's pictures, if one does.
    """
    if pipeline is not None and not (place.adapter and pipeline in UNCONDITIONAL):
        code, notes = _by_pipeline(denoiser, use, pipeline, _opened(parts, place))
    elif place.adapter:  # diffusers loads adapters into its text-to-image networks alone
        code, notes = [], ["The folder `adapter/` is in peft's format; put it over the network of its base."]
    elif getattr(getattr(denoiser, "family", None), "pipeline", ""):
        code, notes = [], ["No pipeline of diffusers takes the steps of this model's sampler."]
    else:
        code, notes = _by_hand(denoiser, parts, place.inside)
    if place.inside:
        notes.append(
            "This is the expert of part 0; `partition` in manifest.json says which conditions are whose."
        )
    if denoiser.sampler.assumed:
        notes.append(f"Assumed when its folder was read: {denoiser.sampler.assumed}.")
    if denoiser.sampler.step_counts:
        counts = ", ".join(map(str, denoiser.sampler.step_counts))
        notes.append(f"It was trained for these numbers of steps: {counts}.")
    if denoiser.cond.nasa_scale is not None:
        notes.append(
            "A negative prompt steers this student's attention in Distillery's sampler; diffusers ignores it here."
        )
    if denoiser.image.tileable:
        notes.append(
            "Its pictures repeat without a seam in Distillery's sampler; diffusers pads them with zeros."
        )
    fenced = ["```python", *code, "```", ""] if code else []
    return "\n".join([USAGE, "", *fenced, *notes])


def _opened(parts: dict[str, str], place: Place) -> list[str]:
    """The lines that open the folder as a pipeline."""
    slot = "transformer" if "transformer" in parts else "unet"
    if place.adapter:
        scheduler = parts["scheduler"]
        return [
            f"from diffusers import DiffusionPipeline, {scheduler}",
            "",
            'pipeline = DiffusionPipeline.from_pretrained("BASE")  # the folder of the model that this adapts',
            'pipeline.load_lora_weights(".")  # this folder',
            f'pipeline.scheduler = {scheduler}.from_pretrained(".", subfolder="scheduler")',
        ]
    if place.inside:
        return [
            f"from diffusers import DiffusionPipeline, {parts[slot]}",
            "",
            f'expert = {parts[slot]}.from_pretrained(".", subfolder="{place.inside}{slot}")',
            f'pipeline = DiffusionPipeline.from_pretrained(".", {slot}=expert)',
        ]
    return [
        "from diffusers import DiffusionPipeline",
        "",
        'pipeline = DiffusionPipeline.from_pretrained(".")  # this folder',
    ]


def _family(denoiser: Denoiser) -> Any:
    """The family of a network in a folder of diffusers: others have no card of this kind."""
    return denoiser.family


def _by_pipeline(
    denoiser: Denoiser, use: PlainUse, pipeline: str, opened: list[str]
) -> tuple[list[str], list[str]]:
    spec, image = denoiser.sampler, denoiser.image
    steps, named = use.steps, use.steps.get(spec.num_steps, ())
    count = f"{use.named}={list(named)}" if named else f"num_inference_steps={spec.num_steps}"
    code = ["import torch", *opened]
    eta = f", eta={spec.scheduler.eta:g}" if spec.scheduler is not None and spec.scheduler.eta else ""
    if pipeline in UNCONDITIONAL:
        code.append(f"picture = pipeline({count}, {RANDOM}).images[0]")
    else:
        told, family = denoiser.cond.embedded_guidance, _family(denoiser)
        scale = family.plain_guidance(spec.guidance) if told is None else told
        guidance = f"{family.guidance_word}={scale:g}"
        more = "".join(f', "{key}": {value!r}' for key, value in family.options.items())
        code += [
            f"latents = torch.randn(1, {image.channels}, {image.height}, {image.width}, {RANDOM})",
            *family.plain_latents(image),
            f'options = {{"height": {image.picture[1]}, "width": {image.picture[2]}, "latents": latents{more}}}',
            f'picture = pipeline(prompt="a photograph", {count}, {guidance}{eta}, **options).images[0]',
        ]
    if not steps:
        return code, ["These are diffusers' own steps; Distillery's sampler takes others, to other pictures."]
    if spec.kind == "few_step":
        others = [f"{n}: `{use.named}={list(times)}`" for n, times in steps.items() if times]
        spaced = [str(n) for n, times in steps.items() if not times]
        notes = [f"The pictures of Distillery's sampler, for `num_inference_steps` of {', '.join(spaced)}."]
        if others and pipeline not in UNCONDITIONAL:
            notes.append(f"Other numbers of steps are told by their {use.named}. {'; '.join(others)}.")
        return code, notes if spaced else notes[1:]
    return code, ["The pictures of Distillery's sampler, for any number of steps."]


def _by_hand(denoiser: Denoiser, parts: dict[str, str], inside: str) -> tuple[list[str], list[str]]:
    """Part by part: no pipeline of diffusers calls this network as it was trained."""
    slot = "transformer" if "transformer" in parts else "unet"
    where = f'".", subfolder="{inside}{{}}"'
    codec = next((name for name in ("vae", "vqvae") if name in parts), None)
    used = {parts[slot], parts[codec or slot]}
    stepped = denoiser.sampler.kind == "scheduler"
    schedules = stepped or denoiser.schedule.kind != "flow"
    used |= {parts["scheduler"]} if schedules else set()
    code = ["import torch", f"from diffusers import {', '.join(sorted(used))}"]
    text = "text_encoder" in parts and "text_encoder_2" not in parts
    if text:
        code.append("from transformers import CLIPTextModel, CLIPTokenizer")
    code += ["", f"network = {parts[slot]}.from_pretrained({where.format(slot)})"]
    if schedules:
        code.append(f"scheduler = {parts['scheduler']}.from_pretrained({where.format('scheduler')})")
    if text:
        code += [
            'tokenizer = CLIPTokenizer.from_pretrained(".", subfolder="tokenizer")',
            f'tokens = tokenizer(["a photograph"] * 4, padding="max_length", max_length={denoiser.cond.max_tokens}, '
            'truncation=True, return_tensors="pt")',
            'encoder = CLIPTextModel.from_pretrained(".", subfolder="text_encoder")',
        ]
    if stepped:
        code += _stepped(denoiser, _arguments(denoiser, slot, text), slot)
    else:
        code += [*_denoise(denoiser, slot, text), "", *_sampled(denoiser)]
    if codec is not None:
        code += [
            f'codec = {parts[codec]}.from_pretrained(".", subfolder="{codec}")',
            "scale, shift = codec.config.scaling_factor, codec.config.get('shift_factor') or 0",
            *_moments(denoiser),
            "with torch.no_grad():",
            "    pictures = codec.decode(x0 / scale + shift).sample",
        ]
    notes = ["No pipeline of diffusers takes the steps of this model's sampler, so it opens part by part."]
    return code, notes


def _moments(denoiser: Denoiser) -> list[str]:
    codec = getattr(denoiser, "codec", None)
    if codec is None or codec.config.get("latents_mean") is None:
        return []
    return [
        "mean, std = (",
        "    torch.tensor(codec.config[name]).reshape(1, -1, 1, 1) for name in ('latents_mean', 'latents_std')",
        ")",
        "scale, shift = scale / std, mean",
    ]


def _denoise(denoiser: Denoiser, slot: str, text: bool) -> list[str]:
    """A function of the card, from a sample with noise of deviation sigma to x0 (docs/conventions.md)."""
    kind, out = denoiser.schedule.kind, _answer(slot, "x")
    arguments = _arguments(denoiser, slot, text)
    form = {
        "edm": (
            "scheduler.precondition_inputs(x, sigma)",
            "scheduler.precondition_noise(sigma)",
            "scheduler.precondition_outputs(x, output, sigma)",
        ),
        "flow": ("x / (1 + sigma)", "1000 * sigma / (1 + sigma)", "(x - sigma * output) / (1 + sigma)"),
        "vp": ("x / (1 + sigma**2) ** 0.5", "timestep_of(sigma)", _vp_answer(denoiser)),
    }[kind]
    code = [*_labels(denoiser, arguments), *_small_pictures(denoiser)]
    if kind == "vp":
        code += [
            "levels = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5",
            "",
            "",
            "def timestep_of(sigma):",
            "    index = (levels < sigma).sum().clamp(1, len(levels) - 1)",
            "    return index - (levels[index] / sigma).log() / (levels[index] / levels[index - 1]).log()",
        ]
    return [
        *code,
        "",
        "",
        "@torch.no_grad()",
        "def denoise(x, sigma):  # x0 from x = x0 + sigma * noise",
        "    sigma = torch.tensor(sigma)",
        f"    x_scaled, time = {form[0]}, {form[1]}.expand(len(x))",
        f"    output = network({', '.join(arguments)}){out}",
        f"    return {form[2]}",
        "",
    ]


def _arguments(denoiser: Denoiser, slot: str, text: bool) -> list[str]:
    shown = "x_scaled" if denoiser.cond.factor is None else "torch.cat([x_scaled, large], 1)"
    arguments = [shown, "timestep=time"]
    if denoiser.cond.kind == "class_label" or slot == "transformer":
        arguments.append("class_labels=labels")
    if text:
        arguments.append("encoder_hidden_states=encoder(tokens.input_ids)[0]")
    return arguments


def _answer(slot: str, x: str) -> str:
    """The prediction in what the network answers: a transformer's may have a variance below it."""
    return f".sample[:, : {x}.shape[1]]" if slot == "transformer" else ".sample"


def _labels(denoiser: Denoiser, arguments: list[str]) -> list[str]:
    classes = denoiser.cond.num_classes or 1
    return [f"labels = torch.arange(4) % {classes}"] if "class_labels=labels" in arguments else []


def _small_pictures(denoiser: Denoiser) -> list[str]:
    """Pictures to enlarge, and what the network is shown of them."""
    if denoiser.cond.factor is None:
        return []
    channels, height, width = small_shape(denoiser.image.picture, denoiser.cond.factor)
    size = f"({denoiser.image.picture[1]}, {denoiser.image.picture[2]})"
    return [
        f"small = torch.zeros(4, {channels}, {height}, {width})  # pictures to enlarge, in [-1, 1]",
        f'large = torch.nn.functional.interpolate(small, size={size}, mode="bilinear", align_corners=False)',
    ]


def _stepped(denoiser: Denoiser, arguments: list[str], slot: str) -> list[str]:
    """The loop of a folder's own scheduler, without guidance."""
    spec, image, flows = denoiser.sampler, denoiser.image, denoiser.schedule.kind == "flow"
    noise = f"torch.randn(4, {image.channels}, {image.height}, {image.width}, {RANDOM})"
    eta = f", eta={spec.scheduler.eta:g}" if spec.scheduler is not None and spec.scheduler.eta else ""
    return [
        *_labels(denoiser, arguments),
        f"scheduler.set_timesteps({spec.num_steps})",
        f"x0 = {noise}" if flows else f"x0 = scheduler.init_noise_sigma * {noise}",
        "with torch.no_grad():",
        "    for step in scheduler.timesteps:",
        f"        x_scaled = {'x0' if flows else 'scheduler.scale_model_input(x0, step)'}",
        "        time = step.expand(len(x0))",
        f"        output = network({', '.join(arguments)}){_answer(slot, 'x0')}",
        f"        x0 = scheduler.step(output, step, x0{eta}).prev_sample",
    ]


VP_ANSWERS = {
    "eps": "x - sigma * output",
    "v": "x / (1 + sigma**2) - sigma / (1 + sigma**2) ** 0.5 * output",
    "x0": "output",
}


def _vp_answer(denoiser: Denoiser) -> str:
    return VP_ANSWERS.get(getattr(denoiser, "parameterisation", ""), "")


def _sampled(denoiser: Denoiser) -> list[str]:
    spec, image = denoiser.sampler, denoiser.image
    noise = f"torch.randn(4, {image.channels}, {image.height}, {image.width}, {RANDOM})"
    levels = [float(level) for level in spec.levels(spec.num_steps)]
    if spec.kind == "few_step":
        code = [f"x0 = denoise({spec.noise_scale!r} * {noise}, {levels[0]!r})"]
        if len(levels) > 1:
            code += [
                f"for sigma in {levels[1:]!r}:",
                "    x0 = denoise(x0 + sigma * torch.randn_like(x0), sigma)",
            ]
        return code
    return [f"x0 = {spec.noise_scale!r} * {noise}", *_solver(spec)]


def _solver(spec: SamplerSpec) -> list[str]:
    return [
        f"start, end = {spec.sigma_max!r} ** (1 / {spec.rho:g}), {spec.sigma_min!r} ** (1 / {spec.rho:g})",
        f"levels_down = [(start + i / {max(spec.num_steps - 1, 1)} * (end - start)) ** {spec.rho:g} "
        f"for i in range({spec.num_steps})]",
        "for sigma, following in zip(levels_down, [*levels_down[1:], 0.0]):  # Euler; the sampler's may be Heun",
        "    answer = denoise(x0, sigma)",
        "    x0 = answer + (x0 - answer) * following / sigma",
    ]
