"""Synthesised radio frames: power, noise, spectra and phases are those that the formulas say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill_core.data import build_source
from distill_core.data.modulations import (
    ALL,
    Modulations,
    constellation,
    root_raised_cosine,
    through_channel,
    unit_power,
    waveforms,
    with_noise,
)
from distill_core.errors import ConfigError

RATE = 8
CLEAN = Modulations.Config(taps=1, frequency_offset=0.0, length=256, samples_per_symbol=RATE)


def drawn(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def test_frames_have_unit_power_and_each_pair_of_class_and_snr_is_equally_often_there():
    source = build_source({"name": "modulations", "count": 8 * 20 * 3, "length": 96})
    items = source.all()
    assert items.columns["iq"].shape == (480, 2, 96)
    power = items.columns["iq"].square().sum(1).mean(1)
    torch.testing.assert_close(power, torch.ones(480), rtol=1e-5, atol=0)
    pairs = torch.stack([items.columns["class_label"].float(), items.columns["snr"]], 1).unique(
        dim=0, return_counts=True
    )
    assert len(pairs[0]) == 8 * 20
    assert (pairs[1] == 3).all()
    assert items.columns["snr"].unique().tolist() == [float(db) for db in range(-20, 19, 2)]
    assert source.class_names == ALL


def test_the_noise_is_as_strong_as_the_snr_says():
    signal = through_channel(waveforms("16qam", 400, CLEAN, drawn()), CLEAN, drawn(1))
    for snr in (-7.0, 4.0, 13.0):
        noise = with_noise(signal, np.full(400, snr), drawn(2)) - signal
        found = 10 * np.log10(np.mean(np.abs(signal) ** 2, 1) / np.mean(np.abs(noise) ** 2, 1))
        assert found.mean() == pytest.approx(snr, abs=0.05)
        assert np.mean(noise.real**2) == pytest.approx(np.mean(noise.imag**2), rel=0.02)


@pytest.mark.parametrize(
    ("name", "points"), [("bpsk", 2), ("8psk", 8), ("16qam", 16), ("64qam", 64), ("pam4", 4)]
)
def test_constellations_have_unit_power_and_a_matched_filter_finds_their_points(name, points):
    known = constellation(name)
    assert len(np.unique(known.round(9))) == points
    assert np.mean(np.abs(known) ** 2) == pytest.approx(1)
    frames = waveforms(name, 30, CLEAN, drawn())
    pulse = root_raised_cosine(RATE)
    matched = np.array([np.convolve(row, pulse, "valid") for row in frames]) / np.sum(pulse**2)
    errors = []
    for row in matched:  # at the best time each sample is a point
        phases = [row[start::RATE] for start in range(RATE)]
        errors.append(min(np.abs(z[:, None] - known).min(1).mean() for z in phases))
    assert max(errors) < 0.03


def test_frequency_shift_keying_has_a_constant_envelope_and_gaussian_pulses_narrow_its_spectrum():
    spectra = {}
    for name in ("cpfsk", "gfsk"):
        frames = waveforms(name, 200, CLEAN, drawn())
        assert np.abs(frames) == pytest.approx(np.ones_like(frames, float), abs=1e-9)
        power = (np.abs(np.fft.fft(frames * np.hanning(256), axis=1)) ** 2).mean(0)
        spectra[name] = power[np.abs(np.fft.fftfreq(256)) > 1.2 / RATE].sum() / power.sum()
    assert spectra["gfsk"] < 0.5 * spectra["cpfsk"]
    frames = waveforms("cpfsk", 5, CLEAN, drawn())
    steps = np.angle(frames[:, RATE:] / frames[:, :-RATE])
    assert np.abs(steps).max() == pytest.approx(np.pi * 0.5, abs=1e-9)  # a quarter turn a symbol, at most


def test_the_channel_turns_delays_and_shifts_as_it_says():
    config = CLEAN.model_copy(update={"frequency_offset": 0.02})
    turned = through_channel(np.ones((50, 256), complex), config, drawn())
    per_sample = np.angle(turned[:, 1:] / turned[:, :-1]) / (2 * np.pi)
    assert per_sample.std(axis=1).max() < 1e-9
    assert np.abs(per_sample).max() <= 0.02
    assert per_sample.mean(1).std() == pytest.approx(0.04 / 12**0.5, rel=0.3)
    config = CLEAN.model_copy(update={"taps": 2, "fading": 0.5})
    pulse = np.zeros((4000, 256), complex)
    pulse[:, 10] = 1
    received = np.abs(through_channel(pulse, config, drawn()))
    assert received[:, 10] == pytest.approx(np.ones(4000))
    assert np.mean(received[:, 11] ** 2) == pytest.approx(0.25, rel=0.1)
    assert received[:, 12:].max() < 1e-12


def test_items_follow_from_the_seed_and_the_split_and_the_level_tells_nothing():
    table = {"name": "modulations", "count": 16, "length": 32}
    first, again = (build_source(table).all().columns["iq"] for _ in range(2))
    assert torch.equal(first, again)
    for changes in ({"split": "test"}, {"seed": 1}):
        assert not torch.equal(first, build_source({**table, **changes}).all().columns["iq"])
    signal = waveforms("qpsk", 3, CLEAN, drawn())
    assert np.allclose(unit_power(signal), unit_power(7 * signal), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"classes": ["qpsk"]}, "at least two"),
        ({"snr_low": 5, "snr_high": 4}, "snr_low = 5 is above snr_high = 4"),
        (
            {"count": 1_000_000, "length": 8192},
            "count = 1000000 frames of this length are too many; at most 8058",
        ),
        ({"count": 1_000_000, "length": 16, "samples_per_symbol": 64}, "at most 60787 are made"),
        ({"length": 17, "taps": 18}, "taps = 18 are more than the 17 samples of a frame"),
        ({"snr_step": 1e-9}, "snr_step"),
    ],
)
def test_what_cannot_be_made_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        build_source({"name": "modulations", **changes})
