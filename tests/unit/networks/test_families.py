"""Folders of text-to-image pipelines are read strictly, and their networks are told what they were trained on."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from distill_core.diffusion.guidance import guide_by
from distill_core.errors import ArtifactError, ConfigError
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.networks.families.flux import packed, positions, unpacked
from distill_core.recipe.tables import NetworkConfig
from tests.helpers import edited
from tests.tiny_pipelines import BUILDERS, tiny_flux, tiny_sana, tiny_sd3


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("originals")
    return {
        name: BUILDERS[name](root / name) for name in ("sd3", "flux", "flux2", "pixart", "sana", "z-image")
    }


@pytest.mark.parametrize(
    ("name", "part", "changes", "said"),
    [
        ("sd3", "transformer", {"a_key_of_tomorrow": 3}, "a_key_of_tomorrow = 3, which is not understood"),
        ("sd3", "text_encoder_3", {"d_model": 41}, "size mismatch|damaged or incomplete"),
        (
            "sd3",
            "text_encoder_3",
            {"model_type": "umt5"},
            "model_type = umt5, which is not understood; only t5",
        ),
        ("flux", "transformer", {"patch_size": 2}, "patch_size = 2, which is not understood; only 1 is read"),
        ("pixart", "transformer", {"norm_type": "ada_norm"}, "norm_type = ada_norm, which is not understood"),
        ("sana", "vae", {"scaling_factor": 0}, "scaling_factor = 0"),
        ("sana", "vae", {"shift_factor": 0.3}, "shift_factor = 0.3, which is not understood"),
        (
            "sana",
            "text_encoder",
            {"attn_logit_softcap": 3},
            "attn_logit_softcap = 3, which is not understood",
        ),
        ("z-image", "transformer", {"all_patch_size": [4]}, "all_patch_size"),
        ("z-image", "transformer", {"siglip_feat_dim": 8}, "siglip_feat_dim = 8, which is not understood"),
    ],
)
def test_what_is_not_understood_is_refused_by_its_key(name, part, changes, said, originals, tmp_path):
    folder = shutil.copytree(originals[name], tmp_path / name)
    (folder / "distillery.json").unlink(missing_ok=True)
    with pytest.raises(ArtifactError, match=said):
        load_denoiser(edited(folder, part, **changes))


def test_prompts_of_another_width_are_refused(originals, tmp_path):
    folder = shutil.copytree(originals["flux"], tmp_path / "flux")
    shutil.rmtree(folder / "text_encoder_2")
    shutil.copytree(originals["pixart"] / "text_encoder", folder / "text_encoder_2")
    with pytest.raises(ArtifactError, match="joint_attention_dim = 24, and prompts are encoded 20 wide"):
        load_denoiser(folder)


def test_an_unknown_pipeline_is_refused_with_the_nearest_and_all_that_are_known(originals, tmp_path):
    folder = shutil.copytree(originals["flux"], tmp_path / "kontext")
    edited(folder, ".", "model_index.json", _class_name="FluxKontextPipeline")
    with pytest.raises(
        ArtifactError, match="FluxKontextPipeline.*did you mean 'FluxPipeline'.*known: .*SanaPipeline"
    ):
        load_denoiser(folder)


def test_a_part_of_another_pipeline_is_refused(originals, tmp_path):
    folder = shutil.copytree(originals["flux"], tmp_path / "mixed")
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
    edited(folder, ".", "model_index.json", **index)
    with pytest.raises(ArtifactError, match="text_encoder_2 may be T5EncoderModel"):
        load_denoiser(folder)


def test_a_folder_without_its_text_encoder_is_refused(originals, tmp_path):
    folder = shutil.copytree(originals["pixart"], tmp_path / "pixart")
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(
        ArtifactError, match=r"PixArtTransformer2DModel is conditioned on text, .* no text_encoder/"
    ):
        load_denoiser(folder)


def test_a_network_that_reads_trained_text_models_is_not_made_anew():
    config = NetworkConfig(name="SD3Transformer2DModel", args={})
    with pytest.raises(ConfigError, match="read from folders and not made anew"):
        build_denoiser(config, parameterisation="flow", shape=(3, 8, 8), num_classes=None, prompts=["a cat"])


def test_packed_latents_are_rows_of_patches_with_the_channel_first():
    x = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    tokens = packed(x)
    assert tokens.shape == (2, 6, 12)
    row, column = 1, 2
    patch = x[1, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
    assert torch.equal(tokens[1, 3 * row + column], patch.flatten())
    assert torch.equal(unpacked(tokens, x), x)
    assert positions(x)[3 * row + column].tolist() == [0, row, column]


@pytest.mark.parametrize("array", [torch.from_numpy, np.asarray])
def test_guidance_by_patches_keeps_the_length_of_each_velocity(array):
    rng = np.random.default_rng(3)
    cond, null, x = (array(rng.normal(size=(2, 3, 4, 6))) for _ in range(3))
    sigma = array(np.array([0.7, 3.1]).reshape(2, 1, 1, 1))
    plain = guide_by("linear", cond, null, 4.0, x, sigma)
    kept = guide_by("patch_norm", cond, null, 4.0, x, sigma)
    v = [np.asarray((x - (1 + sigma) * each) / sigma) for each in (cond, plain, kept)]
    lengths = [np.linalg.norm(each[:, :, 2:4, 4:6].reshape(2, -1), axis=1) for each in v]
    np.testing.assert_allclose(lengths[2], lengths[0], rtol=1e-6)
    assert np.abs(lengths[1] / lengths[0] - 1).min() > 0.1
    factors = (lengths[0] / lengths[1]).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(v[2][:, :, 2:4, 4:6], v[1][:, :, 2:4, 4:6] * factors, rtol=1e-6)


def test_an_embedded_guidance_is_a_condition_with_a_usual_value(tmp_path):
    denoiser = load_denoiser(tiny_flux(tmp_path / "dev"))
    cond, x = denoiser.encode_prompts(["a cat", "two dogs"]), torch.randn(2, 4, 8, 12)
    sigma, usual = torch.tensor([0.7, 3.0]), torch.full((2,), 3.5)
    with torch.no_grad():
        assert torch.equal(denoiser(x, sigma, cond), denoiser(x, sigma, {**cond, "embedded_guidance": usual}))
        other = {**cond, "embedded_guidance": torch.tensor([3.5, 8.0])}
        moved = (denoiser(x, sigma, other) - denoiser(x, sigma, cond)).abs().amax((1, 2, 3))
        assert moved[0] < 1e-5 < 1e-3 < moved[1]
        # Both halves of guidance are told the same.
        guided = denoiser.guided(x, sigma, other, 2.0)
        null = {**denoiser.null_cond(2), "embedded_guidance": other["embedded_guidance"]}
        with_cond, without = denoiser(x, sigma, other), denoiser(x, sigma, null)
        torch.testing.assert_close(guided, without + 2 * (with_cond - without), atol=1e-4, rtol=1e-4)


def test_only_a_prompt_stands_behind_sanas_instruction(tmp_path):
    denoiser = load_denoiser(tiny_sana(tmp_path / "sana"))
    prompt, negative = denoiser.encode_prompts(["a cat"]), denoiser.encode_negative(["a cat"])
    assert prompt["prompt_mask"].shape == negative["prompt_mask"].shape == (1, 300)
    assert (prompt["prompt_embeds"][:, 1] - negative["prompt_embeds"][:, 1]).abs().max() > 0.01
    assert torch.equal(
        denoiser.null_cond(1)["prompt_embeds"], denoiser.encode_negative([""])["prompt_embeds"]
    )


def test_a_prompt_is_cut_where_its_longest_reader_ends(tmp_path):
    text = load_denoiser(tiny_sd3(tmp_path / "sd3")).text
    assert not text.cuts("a " * 40)  # more than CLIP reads, and fewer than T5 does
    assert text.cuts("a " * 300)
