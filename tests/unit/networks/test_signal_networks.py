"""Networks of radio signals: what they answer does not follow from a frame's level, nor from the rest of its batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distill_core.errors import ConfigError
from distill_core.networks.predictors import build_network
from distill_core.networks.predictors.signals import ParallelAttention, unit_power
from distill_core.recipe.tables import NetworkConfig

NAMES = ("clst", "signal_cnn", "signal_mobilenet")


def network(name: str, **args: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_network(NetworkConfig(name=name, args=args), {"shape": (2, 48), "num_classes": 5})


@pytest.mark.parametrize("name", NAMES)
def test_neither_the_level_nor_the_rest_of_the_batch_changes_an_answer(name):
    iq = torch.randn(3, 2, 48)
    model = network(name)
    logits = model(iq)
    assert logits.shape == (3, 5)
    torch.testing.assert_close(model(370 * iq), logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(iq[1:2]), logits[1:2], rtol=1e-4, atol=1e-5)
    assert (model(iq.flip(1)) - logits).abs().max() > 1e-4, "I and Q are told apart"
    assert torch.isfinite(model(torch.zeros(2, 2, 48))).all()


def test_power_is_that_of_both_rows_together():
    frames = unit_power(torch.stack([torch.ones(2, 48) * 3, torch.eye(2).repeat(1, 24)]))
    assert frames[0].unique().tolist() == pytest.approx([0.5**0.5])
    assert frames.square().sum(1).mean(1).tolist() == pytest.approx([1, 1])


def test_both_attentions_are_those_of_torch_and_are_summed():
    torch.manual_seed(1)
    attention = ParallelAttention(12, 3)
    with torch.no_grad():
        attention.scale.copy_(torch.tensor([0.3, 1.0, 2.0])[:, None, None])
    x = torch.randn(2, 12, 7)
    q, k, v = (part.reshape(2, 3, 4, 7) for part in attention.project(x))
    tokens = F.scaled_dot_product_attention(*(part.transpose(2, 3) for part in (q, k, v))).transpose(2, 3)
    unit = [part / part.norm(dim=-1, keepdim=True) for part in (q, k)]
    channels = torch.einsum(
        "bhcd,bhdn->bhcn",
        (torch.einsum("bhcn,bhdn->bhcd", *unit) * attention.scale).softmax(-1),
        v,
    )
    expected = attention.out((tokens + channels).reshape(2, 12, 7))
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("clst", {"widths": [8, 12]}, None),
        ("clst", {"widths": [8, 10]}, "a width of 10 does not divide into 4 heads"),
        ("clst", {"depths": [1]}, "depths and strides have one number for each of 2 widths"),
        ("signal_cnn", {"kernel": 4}, "kernel = 4 is even"),
    ],
)
def test_shapes_that_cannot_be_are_refused(name, args, said):
    if said is None:
        assert network(name, **args)
        return
    with pytest.raises(ConfigError, match=said):
        network(name, **args)
    with pytest.raises(ConfigError, match="2 rows, I and Q"):
        build_network(NetworkConfig(name=name), {"shape": (1, 48), "num_classes": 5})
