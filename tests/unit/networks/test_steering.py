"""Negative-away steering against its equation, layer by layer, and its exact off state."""

from __future__ import annotations

import copy
import logging

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention

from distill_core.errors import ConfigError
from distill_core.networks.adapters import LoraDenoiser
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.networks.generation import generate
from distill_core.networks.steering import PlainAttention, with_negative
from distill_core.recipe.tables import LoraConfig, NetworkConfig
from tests.helpers import tiny_sdxl, tiny_text_to_image

PROMPTS, NEGATIVES = ["a cat", "a dog", "two cats"], ["dog", "cat", "rain"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("steer")
    return {"sd": tiny_text_to_image(root / "sd"), "sdxl": tiny_sdxl(root / "sdxl")}


@pytest.fixture(params=["sd", "sdxl"])
def folder(request, folders):
    return folders[request.param]


@pytest.fixture
def denoiser(folder):
    return load_denoiser(folder).requires_grad_(False)


def inputs(batch=3):
    torch.manual_seed(0)
    return torch.randn(batch, 4, 8, 8), torch.linspace(1, 5, batch)


def steered(denoiser, scale, negatives=NEGATIVES):
    return with_negative(denoiser, denoiser.encode_prompts(PROMPTS), negatives, scale=scale)


def test_the_layer_computes_the_papers_equation():
    torch.manual_seed(0)
    layer = Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4)
    block = torch.nn.ModuleDict({"attn2": layer})
    from distill_core.networks.steering import make_steerable

    make_steerable(block)
    h, plus, minus = torch.randn(3, 5, 8), torch.randn(3, 4, 6), torch.randn(3, 7, 6)
    alpha = torch.tensor([0.0, 0.5, 2.0])

    def z(context):
        q, k, v = layer.to_q(h), layer.to_k(context), layer.to_v(context)
        heads = []
        for part in (slice(0, 4), slice(4, 8)):
            weights = (q[..., part] @ k[..., part].transpose(1, 2) / 4**0.5).softmax(-1)
            heads.append(weights @ v[..., part])
        return torch.cat(heads, dim=-1)

    expected = layer.to_out[0](z(plus) - alpha[:, None, None] * z(minus))
    torch.testing.assert_close(
        layer(h, plus, negative_prompt_embeds=minus, nasa_scale=alpha), expected, atol=1e-6, rtol=1e-5
    )
    faded = layer.to_out[0]((1 - alpha[:, None, None]) * z(plus))  # nothing is renormalised
    torch.testing.assert_close(
        layer(h, plus, negative_prompt_embeds=plus, nasa_scale=alpha), faded, atol=1e-6, rtol=1e-5
    )


def test_without_a_negative_prompt_the_network_is_diffusers_own_bit_for_bit(denoiser, folder):
    plain = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    assert not any(isinstance(processor, PlainAttention) for processor in plain.attn_processors.values())
    x, sigma = inputs()
    cond = denoiser.encode_prompts(PROMPTS)
    with torch.no_grad():
        expected = denoiser(x, sigma, cond)
        negative_alone = with_negative(denoiser, cond, NEGATIVES)
        assert torch.equal(denoiser(x, sigma, negative_alone), expected)
        assert torch.equal(denoiser(x, sigma, steered(denoiser, 0.0)), expected)
        assert not torch.equal(denoiser(x, sigma, steered(denoiser, 0.5)), expected)
        denoiser.network = plain
        assert torch.equal(denoiser(x, sigma, cond), expected)


def test_only_cross_attention_is_steered(denoiser):
    x, sigma = inputs()
    for name, layer in denoiser.network.named_modules():
        if name.endswith("attn2"):
            layer.to_out[0].weight.zero_()
    plain = denoiser(x, sigma, denoiser.encode_prompts(PROMPTS))
    assert torch.equal(denoiser(x, sigma, steered(denoiser, 5.0)), plain)


def test_a_batch_mixes_requests_with_and_without_a_negative_prompt(denoiser):
    x, sigma = inputs()
    plain = denoiser(x, sigma, denoiser.encode_prompts(PROMPTS))
    mixed = denoiser(x, sigma, steered(denoiser, 0.7, ["dog", None, "rain"]))
    whole = denoiser(x, sigma, steered(denoiser, 0.7))
    assert torch.equal(mixed[1], plain[1])
    assert torch.equal(mixed[0], whole[0])
    one = {name: value[2:] for name, value in steered(denoiser, 0.7).items()}
    torch.testing.assert_close(denoiser(x[2:], sigma[2:], one)[0], mixed[2], atol=1e-4, rtol=1e-4)


def test_each_item_has_its_own_strength(denoiser):
    x, sigma = inputs()
    cond = steered(denoiser, 1.0)
    cond["nasa_scale"] = torch.tensor([0.0, 0.3, 1.0])
    together = denoiser(x, sigma, cond)
    for item, scale in enumerate((0.0, 0.3, 1.0)):
        assert torch.equal(together[item], denoiser(x, sigma, steered(denoiser, scale))[item])


def test_copies_and_adapters_are_steered_too(denoiser):
    x, sigma = inputs()
    expected = denoiser(x, sigma, steered(denoiser, 0.5))
    assert torch.equal(copy.deepcopy(denoiser)(x, sigma, steered(denoiser, 0.5)), expected)
    twice = copy.deepcopy(copy.deepcopy(denoiser))
    kinds = {type(processor.plain).__name__ for processor in twice.network.attn_processors.values()}
    assert kinds == {"AttnProcessor2_0"}
    adapter = LoraDenoiser(denoiser, LoraConfig(rank=2, targets=("to_k", "to_out.0")))
    assert torch.equal(adapter(x, sigma, steered(denoiser, 0.5)), expected)


def test_recomputed_activations_give_the_same_gradient(denoiser):
    x, sigma = inputs()

    def gradients(network):
        network.requires_grad_(True).zero_grad()
        network(x, sigma, steered(network, 0.5)).square().mean().backward()
        return [p.grad for p in network.parameters() if p.grad is not None]

    other = copy.deepcopy(denoiser)
    other.network.enable_gradient_checkpointing()
    other.network.train()  # diffusers recomputes in training mode alone; these networks have no dropout
    kept, recomputed = gradients(denoiser), gradients(other)
    assert len(kept) == len(recomputed)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed))


@pytest.mark.slow
def test_an_exported_graph_takes_the_negative_prompt_and_its_strength_as_inputs(folders):
    denoiser = load_denoiser(folders["sd"]).requires_grad_(False)
    names = ("prompt_embeds", "negative_prompt_embeds", "nasa_scale")

    class Graph(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.denoiser = denoiser

        def forward(self, x, sigma, *cond):
            return self.denoiser(x, sigma, dict(zip(names, cond)))

    def arguments(scale, batch):
        cond = {name: value[:batch] for name, value in steered(denoiser, scale).items()}
        return (*inputs(batch), *(cond[name] for name in names))

    batch = torch.export.Dim("batch", min=1, max=32)
    shapes = {"x": {0: batch}, "sigma": {0: batch}, "cond": ({0: batch},) * 3}
    graph = torch.export.export(Graph(), arguments(0.5, 2), dynamic_shapes=shapes).module()
    for scale in (0.0, 0.9):
        given = arguments(scale, 3)
        torch.testing.assert_close(graph(*given), Graph()(*given), atol=1e-4, rtol=1e-4)


def test_without_a_strength_guidance_leads_away_from_the_negative_prompt(denoiser):
    x, sigma = inputs()
    cond = with_negative(denoiser, denoiser.encode_prompts(PROMPTS), ["dog", None, "rain"])
    on = denoiser(x, sigma, denoiser.encode_prompts(PROMPTS))
    away = denoiser(x, sigma, denoiser.encode_prompts(["dog", "", "rain"]))
    away[1] = denoiser(x, sigma, denoiser.null_cond(3))[1]
    expected = away + 3 * (on - away)
    torch.testing.assert_close(denoiser.guided(x, sigma, cond, 3.0), expected, atol=1e-3, rtol=1e-3)


def test_under_guidance_steering_acts_in_the_half_with_the_prompt_alone(denoiser):
    x, sigma = inputs()
    cond = steered(denoiser, 0.6)
    on, off = denoiser(x, sigma, cond), denoiser(x, sigma, denoiser.null_cond(3))
    torch.testing.assert_close(
        denoiser.guided(x, sigma, cond, 3.0), off + 3 * (on - off), atol=1e-3, rtol=1e-3
    )


def test_pictures_are_generated_with_a_negative_prompt_in_the_condition(denoiser):
    cond = denoiser.encode_prompts(PROMPTS)
    plain = generate(denoiser, cond, 3, num_steps=2, guidance=1.0)
    negative = generate(denoiser, steered(denoiser, 0.5), 3, num_steps=2, guidance=1.0, batch_size=2)
    assert plain.shape == negative.shape == (3, 3, 16, 16)
    assert not torch.equal(plain, negative)


def test_nobody_is_warned_of_what_self_attention_ignores(denoiser, caplog):
    logger = logging.getLogger("diffusers")
    before, logger.propagate = logger.propagate, True
    try:
        denoiser(*inputs(), steered(denoiser, 0.5))
    finally:
        logger.propagate = before
    assert caplog.text == ""


def test_a_network_without_cross_attention_refuses_to_be_steered():
    network = NetworkConfig(
        name="DiTTransformer2DModel", args={"num_layers": 1, "num_attention_heads": 1, "patch_size": 4}
    )
    denoiser = build_denoiser(network, parameterisation="edm", shape=(1, 8, 8), num_classes=2)
    cond = {"class_label": torch.zeros(1, dtype=torch.long), "nasa_scale": torch.ones(1)}
    with pytest.raises(ConfigError, match="no cross-attention that a negative prompt could steer"):
        denoiser(torch.zeros(1, 1, 8, 8), torch.ones(1), cond)
