"""Tiny text-to-image folders of every pipeline that is read, as plain diffusers saves them, with random weights.

The weights are enlarged: with the usual ones a prompt would hardly show in the picture, and hide every mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.helpers import letter_tokenizer, tiny_sdxl, tiny_text_config, tiny_text_to_image

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
CLIP_TOKENS = 8


def tiny_sd3(folder: Path, *, t5: bool = True, scheduler: Any = None, **args: object) -> Path:
    """Stable Diffusion 3: 8x8 latents, 16x16 pictures."""
    import diffusers

    torch.manual_seed(3)
    tokenizer = letter_tokenizer(folder.parent / f"{folder.name}-tokenizer", CLIP_TOKENS)
    network = diffusers.SD3Transformer2DModel(
        **{
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 40,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 22,
            "out_channels": 4,
            "pos_embed_max_size": 12,
            **args,
        }
    )
    diffusers.StableDiffusion3Pipeline(
        transformer=enlarged(network, 2.0),
        scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_kl(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=_clip(projection_dim=12),
        tokenizer=tokenizer,
        text_encoder_2=_clip(projection_dim=10),
        tokenizer_2=tokenizer,
        text_encoder_3=tiny_t5(40) if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    ).save_pretrained(folder)
    return folder


def tiny_flux(folder: Path, *, dev: bool = True, tiny_codec: bool = False) -> Path:
    """FLUX.1 dev or schnell: latents of four channels."""
    import diffusers

    torch.manual_seed(4)
    network = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=dev,
        axes_dims_rope=(4, 4, 8),
    )
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if dev else {"shift": 1.0}
    diffusers.FluxPipeline(
        transformer=enlarged(network, 3.0),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**shift),
        vae=_tiny_codec() if tiny_codec else tiny_kl(scaling_factor=0.36, shift_factor=0.11),
        text_encoder=_clip(),
        tokenizer=letter_tokenizer(folder.parent / f"{folder.name}-tokenizer", CLIP_TOKENS),
        text_encoder_2=tiny_t5(24),
        tokenizer_2=t5_tokenizer(),
    ).save_pretrained(folder)
    return folder


def tiny_pixart(folder: Path, *, alpha: bool = False, sized: bool = False, scheduler: Any = None) -> Path:
    """PixArt Sigma or alpha: 8x8 latents, 16x16 pictures; `sized` is the network that is told the picture's size."""
    import diffusers

    torch.manual_seed(5)
    network = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        norm_num_groups=4,
        cross_attention_dim=24,
        sample_size=128 if sized else 8,
        patch_size=2,
        interpolation_scale=1,
        use_additional_conditions=sized,
        caption_channels=20,
    )
    pipeline = diffusers.PixArtAlphaPipeline if alpha else diffusers.PixArtSigmaPipeline
    pipeline(
        transformer=enlarged(network, 2.0),
        scheduler=scheduler or diffusers.DPMSolverMultistepScheduler(beta_schedule="linear"),
        vae=tiny_kl(scaling_factor=0.13),
        text_encoder=tiny_t5(20),
        tokenizer=t5_tokenizer(),
    ).save_pretrained(folder)
    return folder


def tiny_sana(folder: Path, *, sprint: bool = False, scheduler: Any = None) -> Path:
    """Sana or Sana-Sprint: 4x4 latents of eight channels, 32x32 pictures."""
    import diffusers

    torch.manual_seed(6)
    network = diffusers.SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=18,
        sample_size=4,
        patch_size=1,
        qk_norm="rms_norm_across_heads" if sprint else None,
        guidance_embeds=sprint,
    )
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    usual = diffusers.SCMScheduler() if sprint else diffusers.DPMSolverMultistepScheduler(**flow)
    (diffusers.SanaSprintPipeline if sprint else diffusers.SanaPipeline)(
        transformer=enlarged(network, 2.0),
        scheduler=scheduler or usual,
        vae=_tiny_dc(),
        text_encoder=_tiny_gemma(18),
        tokenizer=_gemma_tokenizer(),
    ).save_pretrained(folder)
    return folder


def tiny_qwen_image(folder: Path) -> Path:
    """Qwen-Image: latents of four channels at a quarter of the size."""
    import diffusers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(7)
    network = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 8),
    )
    codec = diffusers.AutoencoderKLQwenImage(
        base_dim=6,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.3, -0.2, 0.1, 0.5],
        latents_std=[1.2, 0.8, 1.5, 0.7],
    )
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {**_qwen_sizes(24), "rope_parameters": rope}
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "fullatt_block_indexes": [0]})
    diffusers.QwenImagePipeline(
        transformer=enlarged(network, 2.0),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02
        ),
        vae=enlarged(codec, 2.0),
        text_encoder=enlarged(Qwen2_5_VLForConditionalGeneration(config), 2.0),
        tokenizer=_byte_tokenizer(),
    ).save_pretrained(folder)
    return folder


def tiny_z_image(folder: Path) -> Path:
    """Z-Image: latents of four channels."""
    import diffusers
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(8)
    network = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 4, 8],
        axes_lens=[1024, 64, 64],
    )
    diffusers.ZImagePipeline(
        transformer=enlarged(network, 1.5),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_kl(scaling_factor=0.36, shift_factor=0.11),
        text_encoder=enlarged(Qwen3Model(Qwen3Config(**_qwen_sizes(24), head_dim=8)), 2.0),
        tokenizer=_byte_tokenizer(),
    ).save_pretrained(folder)
    return folder


def tiny_flux2(folder: Path, *, distilled: bool = False) -> Path:
    """FLUX.2 klein: x of 16 channels at a quarter of the size."""
    import diffusers
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(9)
    network = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=36,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    codec = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=16, **blocks
    )
    codec.bn.running_mean.uniform_(-1, 1)
    codec.bn.running_var.uniform_(0.5, 2)
    text = {**_qwen_sizes(12), "num_hidden_layers": 28, "head_dim": 4}
    diffusers.Flux2KleinPipeline(
        transformer=enlarged(network, 2.0),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=enlarged(codec, 2.0),
        text_encoder=enlarged(Qwen3ForCausalLM(Qwen3Config(**text)), 2.0),
        tokenizer=_byte_tokenizer(),
        is_distilled=distilled,
    ).save_pretrained(folder)
    return folder


def _qwen_sizes(width: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    return {"vocab_size": 260, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 0, **sizes}


def _byte_tokenizer() -> object:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocab = {token: index for index, token in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(vocab=vocab)
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}{% if not enable_thinking %}<no>{% endif %}"
    )
    return tokenizer


def small(build: Callable[[Path], Path], height: int, width: int) -> Callable[[Path], Path]:
    """The same of x of this size: where no config says one, pictures of 1024 pixels are usual."""

    def built(folder: Path) -> Path:
        from distill_core.networks.diffusers_io import load_denoiser

        denoiser = load_denoiser(build(folder))
        factor = denoiser.image.picture[1] // denoiser.image.height
        size = {"height": height, "width": width, "picture": (3, height * factor, width * factor)}
        denoiser.image = denoiser.image.model_copy(update=size)
        denoiser.save_sidecar(folder)
        return folder

    return built


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "sd": tiny_text_to_image,
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "flux": small(tiny_flux, 8, 12),
    "pixart": tiny_pixart,
    "sana": tiny_sana,
    "qwen-image": small(tiny_qwen_image, 4, 6),
    "flux2": small(tiny_flux2, 4, 6),
    "z-image": small(tiny_z_image, 8, 12),
}
"""A tiny folder of every network class that reads prompts."""


def enlarged(module: torch.nn.Module, factor: float) -> torch.nn.Module:
    """The module, with its matrices multiplied."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
    return module


def tiny_kl(**scale: float) -> torch.nn.Module:
    """A KL autoencoder of four channels at half the size."""
    import diffusers

    codec = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        **scale,
    )
    return enlarged(codec, 2.0)


def tiny_t5(width: int) -> torch.nn.Module:
    """A T5 encoder for letters."""
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": width, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 3}
    model = T5EncoderModel(T5Config(vocab_size=len(LETTERS) + 4, feed_forward_proj="gated-gelu", **sizes))
    return enlarged(model, 4.0)


def t5_tokenizer() -> object:
    """A T5 tokenizer for letters."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocab = [*special, *((letter, -3.0 - index / 10) for index, letter in enumerate(LETTERS))]
    return T5Tokenizer(vocab=vocab, extra_ids=0)


def _clip(**args: object) -> torch.nn.Module:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    cls = CLIPTextModelWithProjection if args else CLIPTextModel
    return enlarged(cls(tiny_text_config(CLIP_TOKENS, num_hidden_layers=2, **args)), 3.0)


def _tiny_codec() -> torch.nn.Module:
    import diffusers

    codec = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        latent_channels=4,
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    return enlarged(codec, 2.0)


def _tiny_dc() -> torch.nn.Module:
    import diffusers

    blocks = {"block_types": "ResBlock", "layers_per_block": (1, 1, 1, 1), "block_out_channels": (8,) * 4}
    both = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in blocks.items()}
    return diffusers.AutoencoderDC(
        latent_channels=8,
        attention_head_dim=4,
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41,
        **both,
    )


def _tiny_gemma(width: int) -> torch.nn.Module:
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=len(LETTERS) + 6,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
    )
    return enlarged(Gemma2Model(config), 5.0)


def _gemma_tokenizer() -> object:
    from transformers import GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581"]
    return GemmaTokenizer(vocab={token: index for index, token in enumerate([*special, *LETTERS])})
