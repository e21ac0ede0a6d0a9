"""LoRA over a frozen denoiser: the same weights, and only the factors to train, save and average."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch

from distill_core.diffusion.sampling import SamplerSpec
from distill_core.errors import ArtifactError, ConfigError
from distill_core.networks.adapters import LoraConfig, LoraDenoiser, combined, plain
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.recipe.tables import NetworkConfig
from distill_core.training.ema import EMA
from tests.helpers import TINY_NETWORKS, WITH_ATTENTION, tiny_text_to_image

ARGS = {**TINY_NETWORKS, "UNet2DModel": TINY_NETWORKS["UNet2DModel"] | WITH_ATTENTION}
ONE_STEP = SamplerSpec(kind="few_step", sigmas=(80.0,), noise_scale=80.0, num_steps=1, max_steps=1)
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
    lora = LoraDenoiser(base, LoraConfig(**{"rank": 2, "alpha": 4.0, **config}))
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


def products(lora: LoraDenoiser, scale: float) -> dict[str, torch.Tensor]:
    """What each adapted layer's weight gains, in float64: scale B A."""
    layers = {name.rpartition("/lora_")[0] for name in lora.lora}
    pairs = {n: (lora.lora[f"{n}/lora_B/weight"], lora.lora[f"{n}/lora_A/weight"]) for n in layers}
    return {n.replace("/", "."): scale * (b.double() @ a.double()).detach() for n, (b, a) in pairs.items()}


def weights(denoiser: Denoiser) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in denoiser.network.state_dict().items()}


def assert_weights(denoiser: Denoiser, base: Denoiser, *gains: dict[str, torch.Tensor]) -> None:
    """The network's weights are the base's plus the gains, and its names the base's."""
    expected = weights(base)
    for gain in gains:
        for name, value in gain.items():
            expected[f"{name}.weight"] = expected[f"{name}.weight"] + value
    found = weights(denoiser)
    assert list(found) == list(weights(base))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-6)


def assert_same_pictures(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one - other).norm() <= 1e-5 * other.norm()


def test_merging_adds_the_scaled_product_to_each_weight_and_leaves_the_base_alone(base):
    before, lora = output(base), adapted(base)
    lora.sampler = ONE_STEP
    merged = lora.merged()
    assert_weights(merged, base, products(lora, 4.0 / 2))
    assert_same_pictures(output(merged), output(lora))
    assert torch.equal(output(base), before)
    assert merged.sampler == lora.sampler
    assert not {p.data_ptr() for p in merged.parameters()} & {p.data_ptr() for p in base.parameters()}


def test_strength_scales_what_is_added_and_zero_is_the_base_bit_for_bit(base):
    lora, before = adapted(base), output(base)
    on = output(lora)
    lora.strength = 0.5
    assert_weights(lora.merged(), base, products(lora, 0.5 * 4.0 / 2))
    assert_same_pictures(output(lora), output(lora.merged()))
    lora.strength = 0.0
    assert torch.equal(output(lora), before)
    with lora.off():
        pass
    assert torch.equal(output(lora), before), "leaving off() must not switch on what strength switched off"
    assert torch.equal(output(lora.merged()), before)
    assert all(value.requires_grad for value in lora.parameters())
    lora.strength = 1.0
    assert torch.equal(output(lora), on)


def test_a_sum_of_adapters_has_the_summed_weights_whatever_their_ranks_layers_and_order(base):
    one, two = adapted(base, targets=("to_q", "to_v")), adapted(base, rank=3, alpha=1.0)
    two.strength = 0.5
    total = combined([(one, 1.0), (two, -0.25)])
    gains = products(one, 4.0 / 2), products(two, -0.25 * 0.5 * 1.0 / 3)
    assert_weights(total.merged(), base, *gains)
    assert_weights(combined([(two, -0.25), (one, 1.0)]).merged(), base, *gains)
    assert_same_pictures(output(total), output(total.merged()))
    shared = {p.data_ptr() for p in base.parameters()}
    assert shared <= {p.data_ptr() for p in total.adapted.parameters()}, "a sum costs its factors alone"


def test_a_sum_is_what_peft_computes_with_both_adapters_stacked(base, tmp_path):
    one, two = adapted(base), adapted(base, rank=3, targets=("to_k",))
    for lora, name in ((one, "one"), (two, "two")):
        lora.save_adapter(tmp_path / name)
    stacked = copy.deepcopy(base)
    model = peft.PeftModel.from_pretrained(stacked.network, tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "two", adapter_name="two")
    model.base_model.set_adapter(["one", "two"])
    assert_same_pictures(output(combined([(one, 1.0), (two, 1.0)])), output(stacked))


def test_adapters_of_other_weights_are_not_summed(base):
    other = copy.deepcopy(base)
    combined([(adapted(base), 1.0), (adapted(other), 1.0)])  # a copy has the same weights
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(ConfigError, match="different bases cannot be combined"):
        combined([(adapted(base), 1.0), (adapted(other), 1.0)])
    with pytest.raises(ConfigError, match="nothing to combine"):
        combined([])


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_a_saved_adapter_comes_back_over_its_base_with_its_own_sampler(base, tmp_path, form):
    lora = adapted(base, rank=3, alpha=1.0)
    lora.sampler = ONE_STEP
    lora.strength, lora.form = 0.5, form
    lora.save(tmp_path)
    again = LoraDenoiser.load(base, tmp_path)
    assert_same_pictures(output(again), output(lora))
    assert again.sampler == lora.sampler
    assert {p.data_ptr() for p in base.parameters()} <= {p.data_ptr() for p in again.adapted.parameters()}
    whole = (tmp_path / base._slot()).exists()
    assert whole == (form == "merged")
    if whole:
        opened = load_denoiser(tmp_path)
        assert_weights(opened, base, products(lora, 0.5 / 3))
        assert opened.sampler == lora.sampler


def test_plain_peft_and_plain_diffusers_open_the_adapter(base, tmp_path):
    lora = adapted(base, rank=3, alpha=1.0)
    lora.save_adapter(tmp_path)
    by_peft, by_diffusers = copy.deepcopy(base), copy.deepcopy(base)
    peft.PeftModel.from_pretrained(by_peft.network, tmp_path)
    assert_same_pictures(output(by_peft), output(lora))
    if not hasattr(by_diffusers.network, "load_lora_adapter"):
        return  # diffusers loads adapters into its text-to-image networks alone
    by_diffusers.network.load_lora_adapter(
        tmp_path, prefix="base_model.model", weight_name="adapter_model.safetensors"
    )
    assert_same_pictures(output(by_diffusers), output(lora))


def test_an_adapter_that_peft_trained_is_loaded(base, tmp_path):
    theirs = copy.deepcopy(base)
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["to_q", "to_v"], rank_pattern={"to_v": 4}, init_lora_weights=False
    )
    peft.get_peft_model(theirs.network, config).save_pretrained(tmp_path)
    ours = LoraDenoiser.load(base, tmp_path)
    assert_same_pictures(output(ours), output(theirs))
    ours.save_adapter(tmp_path / "again")
    assert_same_pictures(output(LoraDenoiser.load(base, tmp_path / "again")), output(theirs))


def test_an_adapter_is_refused_over_other_weights_and_when_damaged(base, tmp_path):
    lora, other = adapted(base), copy.deepcopy(base)
    lora.save_adapter(tmp_path)
    LoraDenoiser.load(other, tmp_path)  # a copy has the same weights
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(ArtifactError, match="is an adapter over a model with other weights than this one"):
        LoraDenoiser.load(other, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for changes, said in (
        ({"r": 7}, "\\(7, "),
        ({"target_modules": ["to_q"]}, "is only in one of them"),
        ({"target_modules": ["nothing"]}, "does not fit a"),
        ({"use_dora": True}, "no plain LoRA"),
        ({"peft_type": "IA3"}, "no plain LoRA"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ArtifactError, match=said):
            LoraDenoiser.load(base, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="damaged or incomplete"):
        LoraDenoiser.load(base, tmp_path)


def test_a_copy_keeps_strength_form_and_base(base):
    base.ref = "teacher@3"
    lora = adapted(base)
    lora.strength, lora.form = 0.5, "adapter"
    twin = copy.deepcopy(lora)
    assert (twin.strength, twin.form, twin.base_ref) == (0.5, "adapter", "teacher@3")
    assert torch.equal(output(twin), output(lora))


def test_a_plain_model_is_itself_and_an_adapter_is_merged(base):
    lora = adapted(base)
    lora.ref = "student@2"
    assert plain(base) is base
    assert plain(lora).ref == "student@2"
    assert_weights(plain(lora), base, products(lora, 2.0))
