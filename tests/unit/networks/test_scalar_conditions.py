"""Inputs that a network gains: without effect until trained, told sample by sample, kept beside its own weights."""

from __future__ import annotations

import diffusers
import pytest
import torch

from distill_core.errors import ArtifactError
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.recipe.tables import NetworkConfig
from tests.helpers import TINY_NETWORKS, tiny_sdxl, tiny_text_to_image

KINDS = ["DiTTransformer2DModel", "UNet2DModel", "sd", "sdxl"]


def denoiser_of(kind, folder):
    if kind in ("sd", "sdxl"):
        return load_denoiser((tiny_sdxl if kind == "sdxl" else tiny_text_to_image)(folder / kind))
    torch.manual_seed(0)
    network = NetworkConfig(name=kind, args=TINY_NETWORKS[kind])
    denoiser = build_denoiser(network, parameterisation="edm", shape=(1, 8, 8), num_classes=10)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return denoiser


def asked(denoiser):
    torch.manual_seed(1)
    x = torch.randn(3, denoiser.image.channels, 8, 8)
    if denoiser.cond.kind == "prompt":
        cond = denoiser.encode_prompts(["a cat", "a dog", "it"])
    else:
        cond = {"class_label": torch.tensor([1, 7, 10])}
    return x, torch.tensor([0.3, 1.2, 6.0]), cond


def trained(denoiser):
    torch.manual_seed(2)
    for name, parameter in denoiser.named_parameters():
        if ".projections." in name:
            torch.nn.init.normal_(parameter, std=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_input_changes_no_bit_and_a_trained_one_only_where_it_is_not_neutral(kind, tmp_path):
    denoiser = denoiser_of(kind, tmp_path)
    x, sigma, cond = asked(denoiser)
    told = {**cond, "guidance": torch.tensor([1.0, 2.6, 7.5])}
    with torch.no_grad():
        before = denoiser(x, sigma, cond)
        denoiser.tell("guidance")
        assert torch.equal(denoiser(x, sigma, told), before)
        trained(denoiser)
        after = denoiser(x, sigma, told)
        assert torch.equal(denoiser(x, sigma, cond), before)
    assert torch.equal(after[0], before[0])
    assert not torch.allclose(after[1:], before[1:], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_beside_the_network_which_plain_diffusers_still_opens(kind, tmp_path):
    denoiser = denoiser_of(kind, tmp_path)
    x, sigma, cond = asked(denoiser)
    told = {**cond, "guidance": torch.tensor([1.0, 2.6, 7.5])}
    denoiser.tell("guidance")
    trained(denoiser)
    folder = tmp_path / "saved"
    denoiser.save(folder)
    again = load_denoiser(folder)
    assert again.scalars == ("guidance",)
    with torch.no_grad():
        assert torch.equal(again(x, sigma, told), denoiser(x, sigma, told))
    network = type(denoiser.network)
    slot = "transformer" if "Transformer" in network.__name__ else "unet"
    _, loading = getattr(diffusers, network.__name__).from_pretrained(folder / slot, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    (folder / "scalars.safetensors").unlink()
    with pytest.raises(ArtifactError, match="is missing, damaged or of another network"):
        load_denoiser(folder)


def test_guidance_that_is_told_costs_one_pass_and_is_refused_outside_its_range():
    denoiser = denoiser_of("DiTTransformer2DModel", None)
    denoiser.tell("guidance")
    trained(denoiser)
    range_ = {"guidance_range": (1.0, 4.0), "guidance": 2.0, "guidable": False}
    denoiser.sampler = denoiser.sampler.model_copy(update=range_)
    x, sigma, cond = asked(denoiser)
    sizes = []
    denoiser.network.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    with torch.no_grad():
        one = denoiser.guided(x, sigma, cond, 2.6)
        each = denoiser.guided(x, sigma, cond, torch.tensor([2.6, 1.0, 3.3]))
    assert sizes == [3, 3]
    assert torch.allclose(one[0], each[0], atol=1e-5)
    assert not torch.allclose(one[2], each[2], atol=1e-3)
    denoiser.sampler.check_guidance(4.0)
    with pytest.raises(Exception, match="distilled for 1 to 4") as error:
        denoiser.sampler.check_guidance(4.1)
    assert error.value.field == "guidance"
