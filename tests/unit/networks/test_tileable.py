"""A denoiser on a torus, against what must hold there exactly: its output moves with its input, and repeats with it."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distill_core.errors import ConfigError
from distill_core.networks.adapters import LoraDenoiser
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.networks.generation import generate
from distill_core.networks.tileable import (
    TiledDenoiser,
    Tiling,
    _shift,
    _step,
    decode_wrapped,
    make_tileable,
    untiled,
)
from distill_core.recipe.tables import LoraConfig, NetworkConfig
from tests.helpers import tiny_text_to_image

SIGMA = torch.tensor([1.0, 1.0])
COND = {"class_label": torch.tensor([0, 1])}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def unet(**args: object):
    network = {
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D"] * 2,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    config = NetworkConfig(name="UNet2DModel", args={**network, **args})
    return build_denoiser(config, parameterisation="flow", shape=(3, 16, 16), num_classes=3)


@torch.no_grad()
def call(denoiser, x, sigma=SIGMA):
    return denoiser(x, sigma, COND)


def moved(denoiser, x, down, right):
    """The output for a rolled input, rolled back."""
    return call(denoiser, x.roll((down, right), (2, 3))).roll((-down, -right), (2, 3))


@pytest.mark.parametrize("downsample_padding", [1, 0])
def test_a_wrapped_denoiser_moves_with_its_input_and_the_plain_one_does_not(downsample_padding):
    plain, x = unet(downsample_padding=downsample_padding), torch.randn(2, 3, 16, 16)
    tiled = TiledDenoiser(plain, Tiling())
    assert torch.allclose(moved(tiled, x, 4, 6), call(tiled, x), atol=1e-5)
    assert (moved(plain, x, 4, 6) - call(plain, x)).abs().max() > 0.05
    assert (moved(tiled, x, 3, 6) - call(tiled, x)).abs().max() > 0.05, "odd rolls break strides of two"


def test_rolling_a_wrapped_convolution_changes_nothing():
    plain, x = unet(), torch.randn(2, 3, 16, 16)
    expected = call(TiledDenoiser(plain, Tiling()), x)
    for seed in range(4):
        assert torch.allclose(
            call(TiledDenoiser(plain, Tiling(amplitude=9, seed=seed)), x), expected, atol=1e-5
        )


def test_rolls_are_drawn_anew_for_every_seed_layer_and_step():
    def rolls(unit=2, step=0, **tiling):
        token = _step.set(step)
        try:
            return [_shift(Tiling(amplitude=64, **tiling), layer, unit) for layer in range(50)]
        finally:
            _step.reset(token)

    drawn = rolls()
    assert drawn == rolls()
    assert drawn != rolls(seed=1)
    assert drawn != rolls(step=1)
    assert len(set(drawn)) > 40
    for unit in (2, 6):
        values = torch.tensor(rolls(unit=unit))
        assert (values % unit == 0).all()
        assert values.min() >= 0
        assert 48 < values.max() <= 64
    assert set(rolls(unit=128)) == {(0, 0)}


def test_rolling_without_wrapping_moves_the_zeros_elsewhere():
    plain, x = unet(), torch.randn(2, 3, 16, 16)
    rolled = TiledDenoiser(plain, Tiling(wrap=False, amplitude=8))
    assert (call(rolled, x) - call(plain, x)).abs().max() > 0.01
    other = TiledDenoiser(plain, Tiling(wrap=False, amplitude=8, seed=1))
    assert not torch.equal(call(rolled, x), call(other, x))


def test_without_wrapping_and_rolling_the_denoiser_is_the_plain_one_bit_for_bit():
    plain, x = unet(), torch.randn(2, 3, 16, 16)
    assert torch.equal(call(TiledDenoiser(plain, Tiling(wrap=False)), x), call(plain, x))


def test_the_base_is_left_as_it_was_and_its_weights_are_shared():
    plain, x = unet(), torch.randn(2, 3, 16, 16)
    before = call(plain, x)
    tiled = TiledDenoiser(plain, Tiling(amplitude=8))
    call(tiled, x)
    assert torch.equal(call(plain, x), before)
    assert {id(p) for p in tiled.parameters()} == {id(p) for p in plain.parameters()}
    assert not plain.image.tileable
    assert tiled.image.tileable


def test_an_error_inside_leaves_nothing_behind():
    plain, x = unet(), torch.randn(2, 3, 16, 16)
    tiled = TiledDenoiser(plain, Tiling(wrap=False, amplitude=8), num_steps=4)
    first, last = (torch.full((2,), level) for level in (tiled.levels[0], tiled.levels[-1]))
    expected = call(tiled, x, first), call(tiled, x, last)
    with pytest.raises(RuntimeError):
        call(tiled, torch.randn(2, 5, 16, 16), last)
    assert _step.get() == 0
    assert torch.equal(call(tiled, x, first), expected[0])
    assert torch.equal(call(tiled, x, last), expected[1])


def test_threads_at_different_steps_do_not_disturb_each_other():
    plain, x = unet(), torch.randn(2, 3, 16, 16)
    tiled = TiledDenoiser(plain, Tiling(wrap=False, amplitude=8), num_steps=4)
    expected = [call(tiled, x, torch.full((2,), level)) for level in tiled.levels]
    wrong, cores = [], torch.get_num_threads()

    def work(step):
        torch.set_num_threads(cores)  # of this thread: sums differ in their last bits by it
        for _ in range(8):
            found = call(tiled, x, torch.full((2,), tiled.levels[step]))
            wrong.extend([] if torch.equal(found, expected[step]) else [step])

    threads = [threading.Thread(target=work, args=(step,)) for step in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong
    assert not torch.equal(expected[0], expected[1])


def test_a_picture_does_not_depend_on_its_batch():
    tiled = TiledDenoiser(unet(), Tiling(wrap=False, amplitude=8, plain_share=0.25), num_steps=4)
    cond = {"class_label": torch.tensor([0, 1, 2])}
    together = generate(tiled, cond, 3, num_steps=4)
    alone = generate(tiled, cond, 3, num_steps=4, batch_size=1)
    assert torch.allclose(together, alone, atol=1e-5)


def test_the_first_steps_are_plain_as_far_as_asked():
    plain, x = unet(), torch.randn(2, 3, 16, 16)
    tiled = TiledDenoiser(plain, Tiling(plain_share=0.5), num_steps=4)
    same = [
        torch.equal(call(tiled, x, torch.full((2,), level)), call(plain, x, torch.full((2,), level)))
        for level in tiled.levels
    ]
    assert same == [True, True, False, False]


def test_a_larger_picture_of_repeats_is_the_repeated_output():
    plain, x = unet(), torch.randn(2, 3, 16, 16)
    expected = call(TiledDenoiser(plain, Tiling()), x).repeat(1, 1, 2, 2)
    for amplitude in (0, 8):
        larger = TiledDenoiser(plain, Tiling(scale=2, amplitude=amplitude))
        assert larger.image.picture == (3, 32, 32)
        assert torch.allclose(call(larger, x.repeat(1, 1, 2, 2)), expected, atol=1e-5)
    assert generate(larger, COND, 2, num_steps=1).shape == (2, 3, 32, 32)


def test_attention_on_patches_moves_its_borders_with_the_rolls():
    plain, x = unet(), torch.randn(2, 3, 32, 32)
    fixed, rolled = (TiledDenoiser(plain, Tiling(scale=2, amplitude=amplitude)) for amplitude in (0, 8))
    assert (call(fixed, x) - call(rolled, x)).abs().max() > 1e-4


def test_a_tileable_denoiser_stays_one_when_it_is_copied_saved_and_loaded(tmp_path):
    denoiser, x = unet(), torch.randn(2, 3, 16, 16)
    make_tileable(denoiser)
    assert torch.allclose(moved(denoiser, x, 4, 6), call(denoiser, x), atol=1e-5)
    denoiser.save(tmp_path)
    again = load_denoiser(tmp_path)
    assert again.image.tileable
    assert torch.equal(call(again, x), call(denoiser, x))


@pytest.mark.parametrize("downsample_padding", [1, 0])
def test_the_untiled_twin_is_the_denoiser_before_it_was_tiled(downsample_padding):
    denoiser, x = unet(downsample_padding=downsample_padding), torch.randn(2, 3, 16, 16)
    before = call(denoiser, x)
    make_tileable(denoiser)
    after = call(denoiser, x)
    twin = untiled(denoiser)
    assert torch.equal(call(twin, x), before)
    assert torch.equal(call(denoiser, x), after)
    assert not torch.equal(before, after)
    assert (twin.image.tileable, denoiser.image.tileable) == (False, True)


def test_a_lora_student_is_wrapped_over_weights_that_are_not():
    plain, x = unet(), torch.randn(2, 3, 16, 16)
    student = LoraDenoiser(plain, LoraConfig(rank=2, alpha=2.0, targets="all-linear"))
    tiled = TiledDenoiser(student, Tiling())
    assert torch.allclose(call(tiled, x), call(TiledDenoiser(plain, Tiling()), x), atol=1e-5)
    assert torch.equal(call(student, x), call(plain, x))
    assert tiled.image.tileable
    assert not student.image.tileable


def test_a_latent_model_wraps_its_convolutions_and_its_decoder(tmp_path):
    denoiser = load_denoiser(tiny_text_to_image(tmp_path / "pipeline"))
    tiled = TiledDenoiser(denoiser, Tiling())
    cond = denoiser.encode_prompts(["a cat", "a dog", "two owls", "no"] * 2)
    latent = torch.randn(8, 4, 8, 8)
    with torch.no_grad():
        out = tiled(latent, torch.ones(8), cond)
        back = tiled(latent.roll((2, 4), (2, 3)), torch.ones(8), cond).roll((-2, -4), (2, 3))
        assert torch.allclose(out, back, atol=1e-5)
        endless = denoiser.decode(latent.repeat(1, 1, 3, 3))[..., 16:32, 16:32]
        plain, picture = denoiser.decode(latent), tiled.decode(latent)
        assert picture.shape == plain.shape == (8, 3, 16, 16)
        assert (picture - endless).abs().mean() < 0.7 * (plain - endless).abs().mean()
        larger = TiledDenoiser(denoiser, Tiling(scale=2))
        repeated = larger(latent.repeat(1, 1, 2, 2), torch.ones(8), cond)
        assert torch.allclose(repeated, out.repeat(1, 1, 2, 2), atol=1e-5)


def test_a_decoder_of_one_convolution_wraps_exactly():
    zeros = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 3, 3, padding=1))
    latent = torch.randn(2, 4, 8, 6)
    enlarged = F.pad(zeros[0](latent), (1, 1, 1, 1), mode="circular")
    expected = F.conv2d(enlarged, zeros[1].weight, zeros[1].bias)
    assert torch.allclose(decode_wrapped(zeros, latent), expected, atol=1e-6)
    assert not torch.allclose(zeros(latent), expected, atol=1e-2)


def test_a_transformer_is_refused():
    args = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 4}
    config = NetworkConfig(name="DiTTransformer2DModel", args=args)
    denoiser = build_denoiser(config, parameterisation="flow", shape=(3, 16, 16), num_classes=3)
    with pytest.raises(ConfigError, match="borders of a .* cannot be wrapped"):
        TiledDenoiser(denoiser, Tiling())
    with pytest.raises(ConfigError, match="cannot be wrapped"):
        TiledDenoiser(denoiser, Tiling(wrap=False, amplitude=4))
    assert TiledDenoiser(denoiser, Tiling(wrap=False)).image == denoiser.image
