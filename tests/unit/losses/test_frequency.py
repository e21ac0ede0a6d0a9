"""High-frequency losses against waves whose edges and powers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from distill_core.losses.frequency import high_frequency_distance, high_pass, sobel, spectrum
from distill_core.metrics.texture import high_frequency_energy


def wave(cycles: int, size: int = 32) -> torch.Tensor:
    """A unit wave along x, (1, 1, size, size)."""
    x = torch.arange(size) / size
    return torch.cos(2 * math.pi * cycles * x).expand(1, 1, size, size)


def test_the_edges_are_sobels():
    picture = torch.randn(2, 3, 9, 12)
    found = sobel(picture)
    assert found.shape == (2, 6, 9, 12)
    for axis, part in ((2, found[:, :3]), (1, found[:, 3:])):  # x runs along the last axis
        expected = np.stack(
            [[ndimage.sobel(c, axis - 1, mode="nearest") / 8 for c in p] for p in picture.numpy()]
        )
        np.testing.assert_allclose(part.numpy(), expected, atol=1e-5)


def test_a_ramp_has_its_slope_everywhere_and_none_across():
    ramp = 0.3 * torch.arange(8.0).expand(1, 1, 8, 8)
    slopes = sobel(ramp)[..., 1:-1, 1:-1]
    torch.testing.assert_close(slopes[:, :1], torch.full((1, 1, 6, 6), 0.3))
    assert not slopes[:, 1:].abs().max() > 1e-6


@pytest.mark.parametrize(("cycles", "kept"), [(0, 0.0), (3, 0.0), (8, 0.0), (9, 1.0), (15, 1.0)])
def test_the_high_pass_keeps_waves_above_its_cutoff_alone(cycles, kept):
    torch.testing.assert_close(high_pass(wave(cycles)), kept * wave(cycles), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(16, 16), (15, 18), (16, 13)])
def test_what_passes_has_the_energy_that_the_metric_measures(size):
    pictures = torch.randn(4, 2, *size)
    passed = high_pass(pictures).square().mean(dim=(2, 3)).mean()
    assert passed.item() == pytest.approx(high_frequency_energy(pictures), rel=1e-4)
    radius = torch.hypot(*torch.meshgrid(*(torch.fft.fftfreq(side) for side in size), indexing="ij"))
    expected = torch.fft.ifft2(torch.fft.fft2(pictures) * (radius > 0.25)).real
    torch.testing.assert_close(high_pass(pictures), expected, atol=1e-5, rtol=0)


def test_the_distance_is_zero_for_equal_pictures_and_sees_both_edges_and_frequencies():
    picture = torch.randn(2, 1, 16, 16)
    assert high_frequency_distance(picture, picture) == 0
    brighter = high_frequency_distance(picture + 0.7, picture)  # brightness is no detail
    assert brighter == pytest.approx(0, abs=1e-6)
    low, high, nothing = wave(2), wave(12), torch.zeros(1, 1, 32, 32)
    edges = sobel(low).square().sum(1).sqrt().mean()
    assert high_frequency_distance(low, nothing) == pytest.approx(edges.item(), rel=1e-4)
    edges = sobel(high).square().sum(1).sqrt().mean()
    rings = spectrum(high)  # one coefficient of N^2 / 2, over N; all in the ring of 12 cycles
    assert (rings > 1e-5).sum() == 1
    assert high_frequency_distance(high, nothing) == pytest.approx((edges + rings.mean()).item(), rel=1e-4)


def test_a_moved_wave_has_the_same_spectrum():
    there, here = wave(12), wave(12).roll(1, -1)
    assert (there - here).abs().mean() > 0.3
    torch.testing.assert_close(spectrum(there), spectrum(here), atol=1e-5, rtol=0)


def test_noise_has_amplitudes_of_mean_square_one():
    found = spectrum(torch.randn(256, 1, 16, 16)).square().mean(0)
    assert found.shape == (1, 8)  # 4 to 11 cycles per picture
    torch.testing.assert_close(found, torch.ones(1, 8), atol=0.15, rtol=0)


def test_a_wide_pictures_rings_are_one_cycle_of_its_longer_side_wide():
    x, y = torch.arange(24) / 24, torch.arange(16)[:, None] / 16
    along = torch.cos(2 * math.pi * 9 * x).expand(1, 1, 16, 24)  # 9 / 24 cycles per pixel
    down = torch.cos(2 * math.pi * 7 * y).expand(1, 1, 16, 24)  # 7 / 16, which is 10.5 / 24: ring 10 or 11
    first = 6  # the shortest above 1/4: hypot(6 / 24, 1 / 16) is 6.2 / 24
    assert int(spectrum(along)[0, 0].argmax()) == 9 - first
    assert int(spectrum(down)[0, 0].argmax()) in (10 - first, 11 - first)
    assert spectrum(along).shape[-1] == round(24 * math.hypot(0.5, 0.5)) - first + 1


def test_the_amplitude_of_a_ring_is_that_of_its_waves():
    rings = spectrum(wave(12))[0, 0]
    radius = torch.hypot(torch.fft.fftfreq(32)[:, None], torch.fft.rfftfreq(32)[None]) * 32
    members = int((radius.round() == 12).sum())
    assert rings.max() == pytest.approx(16 / math.sqrt(members), rel=1e-4)


def test_a_step_down_its_gradient_makes_a_blurred_edge_crisper():
    edge = (torch.arange(16) >= 8).float().expand(1, 1, 16, 16)
    blurred = torch.nn.functional.avg_pool2d(edge, (1, 3), 1, (0, 1)).requires_grad_(True)
    (gradient,) = torch.autograd.grad(high_frequency_distance(blurred, edge), blurred)
    crisper = (blurred - 2 * gradient).detach()
    assert (crisper - blurred)[0, 0, 8, 8] > 0.01 > -0.01 > (crisper - blurred)[0, 0, 8, 7]
