"""Folders of other people: what a config says is done as diffusers does it, or refused in a sentence that names it."""

from __future__ import annotations

import json
import shutil

import diffusers
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from distill_core.errors import ArtifactError, ConfigError
from distill_core.networks.diffusers_io import load_denoiser
from tests.helpers import TINY_UNET, edited, tiny_pixels, tiny_sdxl, tiny_text_to_image

CODEC = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "sample_size": 16,
}
MEAN, STD = [1.0, -2.0, 0.5, 3.0], [2.0, 3.0, 0.5, 1.5]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("originals")
    return {"sd": tiny_text_to_image(root / "sd"), "sdxl": tiny_sdxl(root / "sdxl")}


@pytest.fixture(params=["sd", "sdxl"])
def folder(request, originals, tmp_path):
    return shutil.copytree(originals[request.param], tmp_path / request.param)


@pytest.fixture
def sd(originals, tmp_path):
    return shutil.copytree(originals["sd"], tmp_path / "sd")


@pytest.fixture
def sdxl(originals, tmp_path):
    return shutil.copytree(originals["sdxl"], tmp_path / "sdxl")


def test_latents_are_shifted_and_scaled_as_sdxls_pipeline_does(sdxl):
    edited(sdxl, "vae", latents_mean=MEAN, latents_std=STD, scaling_factor=0.6)
    denoiser, latent = load_denoiser(sdxl), torch.randn(2, 4, 8, 8)
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl)
    drawn = []  # what the pipeline gives its decoder after one step
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda z, **options: drawn.append(z) or decode(z, **options)
    sizes = {"height": 16, "width": 16, "num_inference_steps": 1, "guidance_scale": 0}
    kept = pipeline(["a cat"] * 2, **sizes, latents=latent, output_type="latent").images
    pictures = pipeline(["a cat"] * 2, **sizes, latents=latent, output_type="pt").images
    with torch.no_grad():
        found = (denoiser.decode(kept) / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(found, pictures, atol=1e-5, rtol=1e-5)
        expected = (denoiser.codec.encode(pictures).latent_dist.mode() - moment(MEAN)) * 0.6 / moment(STD)
        torch.testing.assert_close(denoiser.encode(pictures), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(drawn[0], kept * moment(STD) / 0.6 + moment(MEAN), atol=1e-5, rtol=1e-5)


def moment(values):
    return torch.tensor(values).reshape(1, -1, 1, 1)


def test_a_shift_of_latents_is_undone_before_decoding(sd):
    edited(sd, "vae", shift_factor=0.7, scaling_factor=0.3)
    denoiser, x0 = load_denoiser(sd), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(denoiser.decode(x0), denoiser.codec.decode(x0 / 0.3 + 0.7).sample)
        picture = denoiser.decode(x0)
        latent = denoiser.codec.encode(picture).latent_dist.mode()
        torch.testing.assert_close(denoiser.encode(picture), (latent - 0.7) * 0.3)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"latents_mean": MEAN}, "latents_mean"),
        ({"latents_std": STD}, "latents_std"),
        ({"latents_mean": MEAN, "latents_std": [1.0, 2.0]}, "latents_std"),
        ({"latents_mean": MEAN, "latents_std": [1.0, 2.0, 0.0, 1.0]}, "latents_std"),
        ({"latents_mean": MEAN, "latents_std": STD, "shift_factor": 0.3}, "shift_factor"),
        ({"scaling_factor": 0}, "scaling_factor"),
        ({"scaling_factor": "big"}, "scaling_factor"),
        ({"scaling_factor": None}, "scaling_factor"),
        ({"a_key_of_tomorrow": 3}, "a_key_of_tomorrow"),
        ({"_class_name": "ConsistencyDecoderVAE"}, "ConsistencyDecoderVAE"),
    ],
)
def test_a_codec_that_is_not_understood_is_refused_by_its_key(sd, changes, key):
    with pytest.raises(ArtifactError, match=key):
        load_denoiser(edited(sd, "vae", **changes))


@pytest.mark.parametrize("cls", ["VQModel", "AutoencoderKL"])
def test_the_codec_of_an_ldm_pipeline_decodes_its_latents(cls, tmp_path):
    torch.manual_seed(0)
    codec = getattr(diffusers, cls)(**CODEC, latent_channels=3, scaling_factor=0.4)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipeline = diffusers.LDMPipeline(codec, diffusers.UNet2DModel(**TINY_UNET), scheduler)
    pipeline.save_pretrained(tmp_path / "ldm")
    denoiser, x0 = load_denoiser(tmp_path / "ldm"), torch.randn(2, 3, 8, 8)
    assert denoiser.image.picture == (3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(denoiser.decode(x0), codec.decode(x0 / 0.4).sample, atol=1e-5, rtol=1e-5)
        answer = codec.encode(denoiser.decode(x0))
        latent = answer.latents if cls == "VQModel" else answer.latent_dist.mode()
        torch.testing.assert_close(denoiser.encode(denoiser.decode(x0)), 0.4 * latent, atol=1e-5, rtol=1e-5)
    denoiser.save(tmp_path / "again")
    opened = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert isinstance(opened, diffusers.LDMPipeline)
    assert type(opened.vqvae) is type(codec)
    opened.scheduler = scheduler  # the saved one takes our sampler's steps
    one, two = (
        each(generator=torch.Generator().manual_seed(3), num_inference_steps=2, output_type="np").images
        for each in (pipeline, opened)
    )
    assert abs(one - two).max() < 1e-5


def test_a_masked_text_encoder_hides_what_pads_a_prompt(sd):
    edited(sd, "text_encoder", use_attention_mask=True)
    denoiser, pipeline = load_denoiser(sd), diffusers.StableDiffusionPipeline.from_pretrained(sd)
    prompts = ["a", "a cat", ""]
    with torch.no_grad():
        embeds, null = pipeline.encode_prompt(prompts, "cpu", 1, True)
    found = denoiser.encode_prompts(prompts)["prompt_embeds"]
    torch.testing.assert_close(found, embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(denoiser.null_cond(3)["prompt_embeds"], null, atol=1e-5, rtol=1e-5)
    unmasked = denoiser.text.model(denoiser.text.tokens(["a"])["input_ids"])[0]
    assert (unmasked - found[0]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("part", "name", "changes"),
    [
        ("text_encoder", "config.json", {"model_type": "t5"}),
        ("text_encoder", "config.json", {"architectures": ["CLIPTextModelWithProjection"]}),
        ("text_encoder", "config.json", {"quantization_config": {"load_in_8bit": True}}),
        ("text_encoder", "config.json", {"rope_scaling": {"factor": 8}}),
        ("tokenizer", "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer"}),
        ("tokenizer", "tokenizer_config.json", {"do_lower_case": False}),
    ],
)
def test_a_text_encoder_of_another_kind_is_refused_by_its_key(sd, part, name, changes):
    (key,) = changes
    with pytest.raises(ArtifactError, match=rf"{part}/{name} says {key} = "):
        load_denoiser(edited(sd, part, name, **changes))


def test_a_projecting_text_encoder_is_not_taken_for_a_plain_one(sd):
    config = CLIPTextConfig.from_pretrained(sd / "text_encoder")
    CLIPTextModelWithProjection(config).save_pretrained(sd / "text_encoder")
    with pytest.raises(ArtifactError, match="architectures = .*CLIPTextModelWithProjection"):
        load_denoiser(sd)


@pytest.mark.parametrize(
    "changes",
    [
        {"class_embed_type": "timestep"},
        {"num_class_embeds": 7},
        {"encoder_hid_dim": 24},
        {"encoder_hid_dim_type": "text_proj"},
        {"dual_cross_attention": True},
        {"attention_type": "gated"},
        {"only_cross_attention": True},
        {"cross_attention_norm": "layer_norm"},
        {"down_block_types": ["SimpleCrossAttnDownBlock2D", "DownBlock2D"]},
        {"a_key_of_tomorrow": [1]},
    ],
)
def test_what_a_text_network_would_be_told_beside_a_prompt_is_refused_by_its_key(sd, changes):
    (key,) = changes
    with pytest.raises(ArtifactError, match=rf"unet/config\.json says {key} = .*not understood"):
        load_denoiser(edited(sd, "unet", **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"class_embed_type": "timestep"},
        {"class_embed_type": "identity"},
        {"time_embedding_type": "fourier"},
        {"time_embedding_type": "learned"},
    ],
)
def test_what_a_network_of_pictures_would_be_told_is_refused_by_its_key(changes, tmp_path):
    (key,) = changes
    folder = tiny_pixels(tmp_path, diffusers.DDPMScheduler())
    with pytest.raises(ArtifactError, match=rf"unet/config\.json says {key} = .*not understood"):
        load_denoiser(edited(folder, "unet", **changes))


@pytest.mark.parametrize(
    "args",
    [
        {"center_input_sample": True},
        {"resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet", "upsample_type": "resnet"},
        {"flip_sin_to_cos": False, "freq_shift": 1, "act_fn": "mish", "time_embedding_dim": 24},
        {"mid_block_type": None},
        {"num_class_embeds": 5},
        {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "attention_head_dim": 4},
    ],
)
def test_what_a_class_does_by_itself_is_answered_as_it_answers(args, tmp_path):
    folder = tiny_pixels(tmp_path, diffusers.DDPMScheduler(prediction_type="sample"), **args)
    network = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    denoiser, latent = load_denoiser(folder), torch.randn(2, 3, 8, 8)
    cond = {"class_label": torch.tensor([1, 4])} if "num_class_embeds" in args else {}
    alpha = denoiser.scheduler.alphas_cumprod[300].sqrt()
    with torch.no_grad():
        expected = network(latent, 300, class_labels=cond.get("class_label")).sample
        found, features = denoiser.with_features(
            latent / alpha, ((1 - alpha**2).sqrt() / alpha).expand(2), cond
        )
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    assert features[0].ndim == 4


@pytest.mark.parametrize("channels", [{"in_channels": 9}, {"in_channels": 3, "out_channels": 4}])
def test_a_network_that_is_shown_more_than_the_sample_is_refused(channels, sd, tmp_path):
    config = json.loads((sd / "unet" / "config.json").read_text()) | channels
    network = diffusers.UNet2DConditionModel.from_config(config)
    network.save_pretrained(sd / "unet")
    with pytest.raises(ArtifactError, match=rf"in_channels = {channels['in_channels']} and out_channels = 4"):
        load_denoiser(sd)


def test_twice_as_many_channels_without_a_learned_variance_are_refused(tmp_path):
    folder = tiny_pixels(tmp_path, diffusers.DDPMScheduler(), out_channels=6)
    with pytest.raises(ArtifactError, match="in_channels = 3 and out_channels = 6"):
        load_denoiser(folder)


def test_parts_of_different_widths_are_refused(sd):
    torch.manual_seed(0)
    diffusers.AutoencoderKL(**CODEC, latent_channels=5).save_pretrained(sd / "vae")
    with pytest.raises(ArtifactError, match="in_channels = 4, and the codec's latents have 5 channels"):
        load_denoiser(sd)


@pytest.mark.parametrize("size", [None, "wide", 0, [8], [8, None], 3.5])
def test_a_size_that_is_none_is_refused_by_its_key(size, tmp_path):
    folder = tiny_pixels(tmp_path, diffusers.DDPMScheduler())
    with pytest.raises(ArtifactError, match=r"unet/config\.json says sample_size = .*; give the side"):
        load_denoiser(edited(folder, "unet", sample_size=size))


def test_height_and_width_are_both_read(tmp_path):
    denoiser = load_denoiser(tiny_pixels(tmp_path, diffusers.DDPMScheduler(), sample_size=(8, 16)))
    assert (denoiser.image.height, denoiser.image.width, denoiser.image.picture) == (8, 16, (3, 8, 16))


@pytest.mark.parametrize("shards", [None, "20KB"])
def test_a_variant_of_the_weights_is_read_where_it_is_the_only_one(folder, shards):
    size = {} if shards is None else {"max_shard_size": shards}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder).to(torch.float16)
    halved = folder.parent / "halved"
    pipeline.save_pretrained(halved, variant="fp16")
    pipeline.unet.save_pretrained(halved / "unet", variant="fp16", **size)
    if shards is not None:
        (halved / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink(missing_ok=True)
    denoiser = load_denoiser(halved)
    plain = diffusers.DiffusionPipeline.from_pretrained(halved, variant="fp16", torch_dtype=torch.float32)
    assert {value.dtype for value in denoiser.parameters()} == {torch.float32}
    assert denoiser.text.model.dtype == denoiser.codec.dtype == torch.float32
    for found, expected in zip(denoiser.network.parameters(), plain.unet.parameters()):
        assert torch.equal(found, expected)
    assert denoiser.encode_prompts(["a cat"])["prompt_embeds"].dtype == torch.float32


def test_several_variants_are_said(sd):
    weights = sd / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    load_denoiser(sd)  # the plain ones are there
    weights.rename(weights.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    with pytest.raises(ArtifactError, match="holds the variants fp16, non_ema of its weights"):
        load_denoiser(sd)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}, "image_encoder = "),
        ({"text_encoder_3": ["transformers", "T5EncoderModel"]}, "text_encoder_3 = "),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "controlnet = "),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "vae = .*may be AutoencoderKL"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "text_encoder = .*may be CLIPTextModel"),
        ({"scheduler": ["my_code", "MyScheduler"]}, "MyScheduler"),
        ({"_class_name": "StableDiffusionInstructPix2PixPipeline"}, "StableDiffusionInstructPix2PixPipeline"),
        ({"pag_applied_layers": ["mid"]}, "pag_applied_layers = "),
        ({"vae": [None, None]}, "has vae/, which its model_index.json does not name"),
    ],
)
def test_a_pipeline_of_other_parts_is_refused_by_their_names(sd, changes, sentence):
    with pytest.raises(ArtifactError, match=sentence):
        load_denoiser(edited(sd, ".", "model_index.json", **changes))


def test_parts_that_only_look_at_pictures_are_left_out(sd):
    checker = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "requires_safety_checker": True,
    }
    extractor = {"feature_extractor": ["transformers", "CLIPImageProcessor"], "image_encoder": [None, None]}
    load_denoiser(edited(sd, ".", "model_index.json", **checker, **extractor))


def test_a_codec_that_is_named_and_not_there_is_refused(sd):
    shutil.rmtree(sd / "vae")
    with pytest.raises(ArtifactError, match=r"names vae, and the folder has no vae/"):
        load_denoiser(sd)


def test_a_new_network_is_refused_by_the_same_keys():
    from distill_core.networks.diffusers_new import build_denoiser
    from distill_core.recipe.tables import NetworkConfig

    config = NetworkConfig(name="UNet2DModel", args={**TINY_UNET, "time_embedding_type": "fourier"})
    with pytest.raises(ConfigError, match="time_embedding_type = fourier, which is not understood"):
        build_denoiser(config, parameterisation="eps", shape=(3, 8, 8), num_classes=None)
