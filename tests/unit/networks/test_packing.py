"""Weights of few bits: rounded to the nearest point, packed without loss, and read strictly."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_core.errors import ArtifactError
from distill_core.networks.packing import (
    at_points,
    bucket_scales,
    nearest_codes,
    pack,
    packable,
    packed_bits,
    quantized,
    scaled,
    uniform_points,
    unpacked_bits,
)
from distill_core.networks.predictor import image_classifier, load_predictor
from distill_core.networks.predictors import build_network
from distill_core.recipe.tables import NetworkConfig

BUCKET = 37


def weights(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def predictor(width=8):
    torch.manual_seed(2)
    config = NetworkConfig(name="classifier", args={"width": width})
    network = build_network(config, {"shape": (1, 8, 12), "num_classes": 3, "class_names": ("a", "b", "c")})
    return image_classifier(network, config, shape=(1, 8, 12), class_names=("a", "b", "c"))


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_come_back_from_their_bits_and_take_no_more_bytes_than_these(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, 101).astype(np.uint8)
    data = packed_bits(codes, bits)
    assert len(data) == math.ceil(101 * bits / 8)
    assert np.array_equal(unpacked_bits(data, bits, 101), codes)


def test_each_weight_is_rounded_to_the_nearest_point_of_its_bucket():
    weight, points = weights(11, 13), torch.tensor([0.0, 0.2, 0.7, 1.0])
    found = pack(weight, points, BUCKET).unpacked().flatten()
    for start in range(0, 143, BUCKET):
        part = weight.flatten()[start : start + BUCKET]
        low, high = part.min(), part.max()
        levels = low + (high - low) * points
        nearest = levels[(part[:, None] - levels[None]).abs().argmin(1)]
        torch.testing.assert_close(found[start : start + BUCKET], nearest)


def test_equal_weights_stay_and_give_no_nan():
    weight = torch.full((3, 5), 0.4)
    assert torch.equal(pack(weight, uniform_points(2), 8).unpacked(), weight)


def test_rounding_again_changes_nothing():
    packed = pack(weights(6, 50), uniform_points(3), BUCKET)
    again = pack(packed.unpacked(), uniform_points(3), BUCKET)
    assert torch.equal(again.codes, packed.codes)


def test_the_gradient_of_a_rounded_weight_is_that_at_the_rounded_place():
    weight = weights(4, 9).requires_grad_()
    rounded = quantized(weight, 2, BUCKET)
    assert torch.equal(rounded, pack(weight, uniform_points(2), BUCKET).unpacked())
    rounded.pow(3).sum().backward()
    assert torch.equal(weight.grad, 3 * rounded.detach() ** 2)


def test_the_gradient_of_a_point_is_the_sum_over_its_weights_of_scale_times_gradient():
    weight, points = weights(7, 11), torch.tensor([0.1, 0.4, 0.9], requires_grad=True)
    scales, offsets = bucket_scales(weight, BUCKET)
    codes = nearest_codes(scaled(weight, scales, offsets, BUCKET), points)
    outer = weights(77)
    (at_points(codes, points, scales, offsets, BUCKET) * outer).sum().backward()
    expected = [0.0, 0.0, 0.0]
    for place in range(77):
        expected[int(codes[place])] += float(scales[place // BUCKET]) * float(outer[place])
    assert points.grad.tolist() == pytest.approx(expected, rel=1e-4)


def test_a_packed_predictor_is_read_as_what_it_was_and_its_file_is_small(tmp_path):
    model = predictor(32)
    own = dict(model.network.named_parameters())
    names = packable(model.network)
    assert all(own[name].ndim > 1 for name in names)
    assert not any("norm" in name or "bias" in name for name in names)
    baked = model.baked({name: pack(own[name], uniform_points(2), 256) for name in names})
    x = weights(4, 1, 8, 12).clamp(-1, 1)
    assert not torch.equal(baked(x), model(x))
    model.save(tmp_path / "full")
    baked.save(tmp_path / "packed")
    loaded = load_predictor(tmp_path / "packed")
    assert torch.equal(loaded(x), baked(x))
    assert loaded.card().packed_bits == 2
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "packed")]
    count = sum(own[name].numel() for name in names)
    rest = sum(value.numel() for name, value in own.items() if name not in names)
    assert sizes[1] < count * 2.3 / 8 + 4 * rest + 6000  # and the header
    assert sizes[1] < sizes[0] / 7
    loaded.save(tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda t, c: t.pop("last.weight.points"), "last.weight.points is missing"),
        (
            lambda t, c: t.update({"last.weight.codes": t["last.weight.codes"][:-1]}),
            r"codes is torch.uint8 \(\d+,\)",
        ),
        (
            lambda t, c: t.update({"last.weight.scales": t["last.weight.scales"].double()}),
            "scales is torch.float64",
        ),
        (lambda t, c: c["packing"]["tensors"].append("first.weight"), "names 'first.weight'"),
        (lambda t, c: c["packing"].update(bits=3), r"codes is torch.uint8 \(24,\)"),
        (lambda t, c: c["packing"].update(bits=9), "packing.bits"),
    ],
)
def test_damaged_packings_are_refused_in_a_sentence(tmp_path, broken, said):
    model = predictor()
    weight = dict(model.network.named_parameters())["last.weight"]
    model.baked({"last.weight": pack(weight, uniform_points(2), 64)}).save(tmp_path)
    tensors, described = (
        load_file(tmp_path / "model.safetensors"),
        json.loads((tmp_path / "config.json").read_text()),
    )
    broken(tensors, described)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ArtifactError, match=said):
        load_predictor(tmp_path)
