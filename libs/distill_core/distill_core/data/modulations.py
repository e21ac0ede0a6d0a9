"""Radio frames, synthesised: digital modulations through a channel, as I/Q sequences at many signal-to-noise ratios.

    r[n] = e^{i (2 pi f n + phi)} (h * s)[n] + w[n],    SNR = 10 log10 (mean |h * s|^2 / mean |w|^2)  dB

s: symbols, shaped and shifted by a random part of a symbol; h: taps of a channel; f: offset of the carrier, cycles per
sample; phi: its phase; w: white Gaussian noise. Each frame is scaled to unit power: its level does not tell the SNR.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator

from distill_core.config import Config as SourceConfig
from distill_core.data.source import Source

Modulation = Literal["bpsk", "qpsk", "8psk", "16qam", "64qam", "pam4", "cpfsk", "gfsk"]
ALL: tuple[Modulation, ...] = ("bpsk", "qpsk", "8psk", "16qam", "64qam", "pam4", "cpfsk", "gfsk")
SPAN = 8  # symbols that a pulse extends over
ROLL_OFF = 0.35  # of the root-raised-cosine pulse
FSK_INDEX = 0.5  # half of the phase, in turns, that one symbol of a frequency shift keying adds
GAUSS = 0.35  # bandwidth of GFSK's filter, in symbol rates
MAX_SAMPLES = 2**26  # complex, of all frames and of what is made around them
_SPLITS = {"train": 0, "test": 1}


class Modulations(Source):
    """Frames `iq` (2, L) of unit power, in-phase and quadrature, their modulation, and their `snr` in dB.

    Classes come in turn, and SNRs too, so that each pair is equally often there.
    """

    class Config(SourceConfig):
        """Options of the recipe's `[data]` table."""

        name: Literal["modulations"] = "modulations"
        split: Literal["train", "test"] = "train"  # frames of one are none of the other
        classes: tuple[Modulation, ...] = ALL  # modulations, in the order of the labels
        count: int = Field(4096, ge=1, le=1_000_000)
        length: int = Field(128, ge=16, le=8192)  # samples of a frame
        samples_per_symbol: int = Field(8, ge=2, le=64)  # samples a symbol lasts; more: a narrower signal
        snr_low: float = Field(-20.0, ge=-60, le=60)  # dB
        snr_high: float = Field(18.0, ge=-60, le=60)  # dB
        snr_step: float = Field(2.0, ge=0.01, le=60)  # dB
        frequency_offset: float = Field(0.01, ge=0, le=0.5)  # largest, cycles per sample, to both sides
        taps: int = Field(3, ge=1, le=32)  # paths of the channel, a sample apart; 1: a single one
        fading: float = Field(0.3, ge=0, le=2)  # standard deviation of a later path, the first being 1
        seed: int = Field(0, ge=0, lt=2**63)

        @field_validator("classes")
        @classmethod
        def _each_once(cls, names: tuple[Modulation, ...]) -> tuple[Modulation, ...]:
            if len(names) < 2 or len(set(names)) < len(names):
                raise ValueError("give at least two, and each once")
            return names

        @model_validator(mode="after")
        def _sizes(self) -> Self:
            if self.snr_low > self.snr_high:
                raise ValueError(f"snr_low = {self.snr_low:g} is above snr_high = {self.snr_high:g}")
            if self.taps > self.length:
                raise ValueError(f"taps = {self.taps} are more than the {self.length} samples of a frame")
            around = (2 * SPAN + 1) * self.samples_per_symbol
            if (most := MAX_SAMPLES // (self.length + around)) < self.count:
                raise ValueError(
                    f"count = {self.count} frames of this length are too many; at most {most} are made"
                )
            return self

    def __init__(self, config: Config) -> None:
        labels = np.arange(config.count) % len(config.classes)
        levels = np.arange(config.snr_low, config.snr_high + 1e-9, config.snr_step)
        snr = levels[np.arange(config.count) // len(config.classes) % len(levels)]
        frames = np.empty((config.count, 2, config.length), np.float32)
        for number, name in enumerate(config.classes):
            chosen = np.flatnonzero(labels == number)
            rng = np.random.Generator(np.random.Philox([config.seed, _SPLITS[config.split], ALL.index(name)]))
            signal = through_channel(waveforms(name, len(chosen), config, rng), config, rng)
            frames[chosen] = unit_power(with_noise(signal, snr[chosen], rng))
        super().__init__(
            config,
            size=config.count,
            labels=torch.from_numpy(labels),
            class_names=config.classes,
            arrays={"iq": torch.from_numpy(frames), "snr": torch.from_numpy(snr.astype(np.float32))},
        )


def constellation(name: str) -> np.ndarray:
    """The points (M,) complex of a linear modulation, of unit mean power."""
    if name == "pam4":
        points = np.arange(-3.0, 4, 2).astype(complex)
    elif name.endswith("psk"):
        order = {"bpsk": 2, "qpsk": 4, "8psk": 8}[name]
        points = np.exp(2j * np.pi * np.arange(order) / order)
    else:
        side = {"16qam": 4, "64qam": 8}[name]
        levels = np.arange(1.0 - side, side, 2)
        points = (levels[:, None] + 1j * levels).ravel()
    scaled: np.ndarray = points / np.sqrt(np.mean(np.abs(points) ** 2))
    return scaled


def waveforms(name: str, count: int, config: Modulations.Config, rng: np.random.Generator) -> np.ndarray:
    """`count` frames (N, L) complex of one modulation, before any channel."""
    rate = config.samples_per_symbol
    symbols = -(-config.length // rate) + 2 * SPAN
    if name in ("cpfsk", "gfsk"):
        bits = 2.0 * rng.integers(0, 2, (count, symbols)) - 1
        frequency = np.repeat(bits, rate, axis=1) * FSK_INDEX / 2 / rate
        if name == "gfsk":
            frequency = convolved(frequency, gaussian_pulse(rate))
        shaped = np.exp(2j * np.pi * np.cumsum(frequency, axis=1))
    else:
        points = constellation(name)
        spread = np.zeros((count, symbols * rate), complex)
        spread[:, ::rate] = points[rng.integers(0, len(points), (count, symbols))]
        shaped = convolved(spread, root_raised_cosine(rate))
    start = SPAN * rate // 2 + rng.integers(0, rate, count)
    found: np.ndarray = np.take_along_axis(shaped, start[:, None] + np.arange(config.length), axis=1)
    return found


def through_channel(signal: np.ndarray, config: Modulations.Config, rng: np.random.Generator) -> np.ndarray:
    """Frames (N, L) complex after their paths, with offset and phase of the carrier."""
    count, length = signal.shape
    later = rng.standard_normal((count, config.taps - 1, 2)) @ np.array([1, 1j]) * config.fading / np.sqrt(2)
    received = signal.copy()
    for delay in range(1, config.taps):
        received[:, delay:] += later[:, delay - 1, None] * signal[:, : length - delay]
    offset = rng.uniform(-config.frequency_offset, config.frequency_offset, (count, 1))
    turns = offset * np.arange(length) + rng.uniform(0, 1, (count, 1))
    turned: np.ndarray = received * np.exp(2j * np.pi * turns)
    return turned


def with_noise(signal: np.ndarray, snr: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Frames (N, L) complex with white noise at `snr` (N,) dB."""
    power = np.mean(np.abs(signal) ** 2, axis=1, keepdims=True) * 10 ** (-snr[:, None] / 10)
    noise = rng.standard_normal((*signal.shape, 2)) @ np.array([1, 1j]) * np.sqrt(power / 2)
    noisy: np.ndarray = signal + noise
    return noisy


def unit_power(signal: np.ndarray) -> np.ndarray:
    """Frames (N, 2, L) float32, in-phase and quadrature, of unit mean power."""
    scaled = signal / np.sqrt(np.mean(np.abs(signal) ** 2, axis=1, keepdims=True))
    return np.stack([scaled.real, scaled.imag], axis=1).astype(np.float32)


def root_raised_cosine(rate: int) -> np.ndarray:
    """The pulse (SPAN * rate + 1,) of unit energy per symbol, roll-off `ROLL_OFF`."""
    t = (np.arange(SPAN * rate + 1) - SPAN * rate / 2) / rate + 1e-8  # beside the poles of the formula
    b = ROLL_OFF
    above = np.sin(np.pi * t * (1 - b)) + 4 * b * t * np.cos(np.pi * t * (1 + b))
    pulse: np.ndarray = above / (np.pi * t * (1 - (4 * b * t) ** 2))
    return pulse


def gaussian_pulse(rate: int) -> np.ndarray:
    """GFSK's filter of unit sum, over four symbols."""
    t = (np.arange(4 * rate + 1) - 2 * rate) / rate
    pulse = np.exp(-2 * (np.pi * GAUSS * t) ** 2 / np.log(2))
    normalised: np.ndarray = pulse / pulse.sum()
    return normalised


def convolved(values: np.ndarray, pulse: np.ndarray) -> np.ndarray:
    """Rows (N, M) convolved with a pulse, of the same length and in place."""
    size = values.shape[1] + len(pulse) - 1
    spectrum = np.fft.fft(values, size) * np.fft.fft(pulse, size)
    whole = np.fft.ifft(spectrum)[:, (len(pulse) - 1) // 2 :][:, : values.shape[1]]
    found: np.ndarray = whole if np.iscomplexobj(values) else whole.real
    return found


SOURCES = {"modulations": Modulations}
