"""LoRA over a frozen denoiser: the same weights, and only the factors to train, save and average."""

from __future__ import annotations

import copy

import pytest
import torch

from distill_core.config import NetworkConfig
from distill_core.networks.adapters import LoraConfig, LoraDenoiser
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.diffusers_io import build_denoiser, load_denoiser
from distill_core.training.ema import EMA
from tests.helpers import tiny_text_to_image

ARGS = {
    "DiTTransformer2DModel": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "patch_size": 4,
    },
    "UNet2DModel": {
        "block_out_channels": [8, 8],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    },
}
NETWORKS = [*ARGS, "UNet2DConditionModel"]


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    return tiny_text_to_image(tmp_path_factory.mktemp("text") / "pipeline")


@pytest.fixture(params=NETWORKS)
def base(request, text_folder) -> Denoiser:
    """A frozen denoiser whose every weight matters."""
    torch.manual_seed(0)
    if request.param == "UNet2DConditionModel":
        denoiser = load_denoiser(text_folder)
    else:
        network = NetworkConfig(name=request.param, args=ARGS[request.param])
        denoiser = build_denoiser(network, parameterisation="edm", shape=(1, 8, 8), num_classes=10)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return denoiser.requires_grad_(False)


def arguments(denoiser: Denoiser) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    x = torch.randn(2, denoiser.image.channels, 8, 8, generator=torch.Generator().manual_seed(0))
    if denoiser.cond.kind == "prompt":
        return x, torch.tensor([0.5, 3.0]), denoiser.encode_prompts(["a cat", "a dog"])
    return x, torch.tensor([0.5, 3.0]), {"class_label": torch.tensor([1, 2])}


def adapted(base: Denoiser, **config: object) -> LoraDenoiser:
    """Factors that do something: an untrained adapter is the identity."""
    lora = LoraDenoiser(base, LoraConfig(rank=2, alpha=4.0, **config))
    with torch.no_grad():
        for value in lora.parameters():
            value.normal_(std=0.5)
    return lora


def output(denoiser: Denoiser) -> torch.Tensor:
    with torch.no_grad():
        return denoiser(*arguments(denoiser))


def test_off_is_the_base_bit_for_bit_and_the_base_never_sees_the_factors(base):
    before = output(base)
    lora = adapted(base)
    on = output(lora)
    assert not torch.equal(on, before)
    with lora.off():
        assert torch.equal(output(lora), before)
        with lora.off():
            pass
        assert torch.equal(output(lora), before), "leaving the inner block must not switch on the outer one"
    assert torch.equal(output(lora), on)
    assert torch.equal(output(base), before)
    assert not any("lora" in name for name in base.state_dict())


def test_an_error_while_off_switches_on_again(base):
    lora = adapted(base)
    on = output(lora)
    with pytest.raises(RuntimeError, match="stop"), lora.off():
        raise RuntimeError("stop")
    assert torch.equal(output(lora), on)
    assert all(value.requires_grad for value in lora.parameters())


def test_frozen_factors_stay_frozen_after_off(base):
    lora = adapted(base).requires_grad_(False)
    with lora.off():
        pass
    assert not any(value.requires_grad for value in lora.parameters())


def test_an_untrained_adapter_is_the_identity(base):
    assert torch.equal(output(LoraDenoiser(base, LoraConfig(rank=2))), output(base))


def test_only_the_factors_are_parameters_and_state(base):
    lora = adapted(base)
    assert all("/lora_" in name for name, _ in lora.named_parameters())
    assert lora.state_dict().keys() == dict(lora.named_parameters()).keys()
    assert sum(v.numel() for v in lora.parameters()) < sum(v.numel() for v in base.parameters())
    assert {p.data_ptr() for p in base.parameters()} <= {p.data_ptr() for p in lora.adapted.parameters()}


def test_the_state_of_one_adapter_loads_into_another(base):
    one, two = adapted(base), adapted(base)
    assert not torch.equal(output(one), output(two))
    two.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(output(one), output(two))


def test_a_gradient_step_moves_the_factors_alone(base):
    lora, before = adapted(base), [p.clone() for p in base.parameters()]
    optimizer = torch.optim.SGD(lora.parameters(), 0.1)
    on = output(lora)
    lora(*arguments(base)).square().mean().backward()
    assert all(p.grad is None for p in base.parameters())
    optimizer.step()
    assert not torch.equal(output(lora), on)
    assert all(torch.equal(old, new) for old, new in zip(before, base.parameters()))


def test_features_for_a_discriminator_pass_through_the_factors(base):
    lora = adapted(base)
    x0, features = lora.with_features(*arguments(base))
    assert torch.equal(x0.detach(), output(lora))
    assert features[-1].ndim == 4
    assert features[-1].requires_grad


def test_a_copy_has_factors_of_its_own_over_the_same_weights(base):
    lora = adapted(base)
    twin = copy.deepcopy(lora)
    assert torch.equal(output(lora), output(twin))
    on = output(lora)
    with torch.no_grad():
        for value in twin.parameters():
            value.zero_()
    assert torch.equal(output(lora), on)
    assert torch.equal(output(twin), output(base))
    assert {p.data_ptr() for p in base.parameters()} <= {p.data_ptr() for p in twin.adapted.parameters()}


def test_a_copy_of_teacher_and_adapter_together_belongs_together(base):
    pair = torch.nn.ModuleDict({"teacher": base, "fake": adapted(base)})
    other = copy.deepcopy(pair)
    with torch.no_grad():
        for value in other["teacher"].parameters():
            value.mul_(2)
    with other["fake"].off():
        assert torch.equal(output(other["fake"]), output(other["teacher"]))
    assert not torch.equal(output(other["teacher"]), output(base))


def test_an_average_of_the_factors_takes_effect_and_goes_again(base):
    lora = adapted(base)
    on, average = output(lora), EMA(lora, 0.5)
    with torch.no_grad():
        for value in lora.parameters():
            value.zero_()
    with average.applied(lora):
        assert torch.equal(output(lora), on)
    assert torch.equal(output(lora), output(base))


def test_moving_to_another_precision_moves_what_is_shared_once(base):
    lora = adapted(base)
    base.double()
    lora.double()
    assert {p.data_ptr() for p in base.parameters()} <= {p.data_ptr() for p in lora.adapted.parameters()}
    x, sigma, cond = arguments(base)
    cond = {name: v.double() if v.is_floating_point() else v for name, v in cond.items()}
    with torch.no_grad(), lora.off():
        assert torch.equal(lora(x.double(), sigma.double(), cond), base(x.double(), sigma.double(), cond))


def test_every_linear_layer_can_be_the_target(base):
    lora = adapted(base, targets="all-linear")
    linear = [name for name, layer in base.network.named_modules() if isinstance(layer, torch.nn.Linear)]
    assert len(lora.lora) == 2 * len(linear)
    assert len(lora.lora) > len(adapted(base).lora)
