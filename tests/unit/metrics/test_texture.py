import math

import pytest
import torch

from distill_core.data import build_source
from distill_core.errors import DataError
from distill_core.metrics.texture import (
    high_frequency_energy,
    high_frequency_ratio,
    seam_ratio,
    texture_distance,
    texture_features,
)


def wave(cycles: float, size: int = 32, amplitude: float = 1.0):
    x = torch.arange(size) / size
    return amplitude * torch.sin(2 * math.pi * cycles * x).expand(1, 1, size, size)


def test_the_seam_of_a_ramp_is_as_steep_as_the_ramp_is_long():
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)
    assert seam_ratio(ramp) == pytest.approx(15)
    assert seam_ratio(ramp.transpose(2, 3)) == pytest.approx(15)


def test_a_seam_is_measured_along_both_sides_of_a_wide_picture():
    """Slopes 1 along x (9 long) and 3 along y (5 long): seams of 8 and 12 over steps of 1 and 3."""
    picture = torch.arange(9.0) + 3 * torch.arange(5.0)[:, None]
    assert seam_ratio(picture.expand(2, 3, 5, 9)) == pytest.approx((8 + 12) / (1 + 3))


def test_features_of_a_wide_ramp_are_its_slopes():
    ramp = (0.5 * torch.arange(11.0) + 2 * torch.arange(7.0)[:, None]).expand(2, 1, 7, 11)
    variogram = texture_features(ramp)[1, 2:].unflatten(0, (3, 4))
    slopes = [0.5, 2.0, 2.5, 1.5]  # along x, along y, down and right, down and left
    for row, distance in zip(variogram, (1, 2, 4)):
        assert row.tolist() == pytest.approx([distance * slope for slope in slopes])


@pytest.mark.slow
def test_a_texture_that_repeats_has_the_ratio_one_and_a_window_of_it_does_not():
    def of(window):
        return seam_ratio(build_source({"name": "textures", "count": 600, "window": window}).all().x0)

    assert of(1.0) == pytest.approx(1, abs=0.08)
    assert of(0.67) > 2


def test_a_wave_above_the_cutoff_counts_with_half_its_squared_amplitude():
    assert high_frequency_energy(wave(12, amplitude=0.6)) == pytest.approx(0.18, rel=1e-6)
    assert high_frequency_energy(wave(4)) == pytest.approx(0, abs=1e-12)
    assert high_frequency_energy(wave(4), cutoff=0.1) == pytest.approx(0.5, rel=1e-6)
    assert high_frequency_ratio(wave(12, amplitude=0.5), wave(12)) == pytest.approx(0.25, rel=1e-6)


def test_texture_features_of_a_wave_are_known():
    x = wave(8, size=64).expand(1, 3, 64, 64)  # eight pixels long
    features = texture_features(x)[0]
    assert features.shape == (18,)
    assert features[:3].abs().max() < 1e-6
    assert features[3:6] == pytest.approx(0.5**0.5, rel=1e-3)
    variogram = features[6:].unflatten(0, (3, 4))  # distance, then along x, along y, both diagonals
    for row, distance in zip(variogram, (1, 2, 4)):
        lag = 2 * math.sin(math.pi * distance / 8)  # amplitude of the difference of two waves
        mean_abs = lag * torch.cos(2 * math.pi * (torch.arange(8) + distance / 2) / 8).abs().mean()
        assert row[0] == pytest.approx(float(mean_abs), rel=0.05)
        assert row[1] == pytest.approx(0, abs=1e-6)
        assert row[2] == pytest.approx(float(row[0]), rel=0.05)
        assert row[3] == pytest.approx(float(row[2]), rel=0.05)


def test_the_second_diagonal_is_not_the_first():
    slanted = torch.sin(2 * math.pi * (torch.arange(16)[:, None] + torch.arange(16)[None]) / 8)[None, None]
    variogram = texture_features(slanted)[0, 2:].unflatten(0, (3, 4))
    assert variogram[0, 3] == pytest.approx(0, abs=1e-6)  # up and right: along the crest
    assert variogram[0, 2] > 0.8


def test_the_distance_tells_families_apart_and_other_drawings_of_one_family_not():
    def some(only, seed):
        return build_source({"name": "textures", "count": 300, "only": only, "seed": seed}).all().x0

    same = texture_distance(some(["bricks"], 0), some(["bricks"], 1))
    assert same < 0.01
    assert texture_distance(some(["bricks"], 0), some(["noise"], 1)) > 10 * same


@pytest.mark.parametrize(
    ("measure", "sentence"),
    [
        (lambda: seam_ratio(torch.zeros(2, 3, 8, 8)), "of one colour each"),
        (lambda: seam_ratio(torch.zeros(2, 3, 8, 2)), r"\(2, 3, 8, 2\) are not textures"),
        (lambda: texture_features(torch.zeros(2, 8, 8)), r"\(2, 8, 8\) are not textures"),
        (lambda: seam_ratio(torch.full((1, 1, 4, 4), float("nan"))), "NaN or infinity"),
        (lambda: high_frequency_ratio(wave(12), wave(4) * 0), "hold nothing above 0.25"),
    ],
)
def test_what_cannot_be_measured_is_refused(measure, sentence):
    with pytest.raises(DataError, match=sentence):
        measure()
