"""The discriminator against the best one there is: the log of the ratio of the two densities."""

from __future__ import annotations

import pytest
import torch

from distill_core.losses.adversarial import discriminator_loss
from distill_core.networks.discriminator import NoisyDiscriminator

MEAN, STD = 0.15, 0.5


def log_ratio(x_sigma, sigma):
    """Of N(MEAN, STD^2) to N(-MEAN, STD^2) per pixel, after noise."""
    return 2 * MEAN * x_sigma.sum((1, 2, 3)) / (STD**2 + sigma**2)


@pytest.mark.slow
def test_its_logits_become_the_log_ratio_of_the_densities_at_every_noise_level():
    torch.manual_seed(0)
    network = NoisyDiscriminator(1, 4, width=16)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(400):
        sigma = torch.randn(512).exp()
        x = STD * torch.randn(512, 1, 4, 4) + sigma[:, None, None, None] * torch.randn(512, 1, 4, 4)
        logits = network(torch.cat([x[:256] + MEAN, x[256:] - MEAN]), sigma, {})
        loss = discriminator_loss(*logits.chunk(2))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for level in (0.3, 1.0, 3.0):
        sigma = torch.full((512,), level)
        x = (STD**2 + level**2) ** 0.5 * torch.randn(512, 1, 4, 4)
        with torch.no_grad():
            found, best = network(x, sigma, {}), log_ratio(x, sigma)
        slope = (found * best).sum() / best.square().sum()
        assert torch.corrcoef(torch.stack([found, best]))[0, 1] > 0.9
        assert 0.6 < slope < 1.5


def test_every_class_begins_with_the_same_logit_and_learns_its_own():
    torch.manual_seed(0)
    network = NoisyDiscriminator(3, 16, num_classes=2, width=8)
    x, sigma = torch.randn(2, 3, 16, 16), torch.ones(2)
    first, second = ({"class_label": torch.full((2,), label)} for label in (0, 1))
    assert torch.equal(network(x, sigma, first), network(x, sigma, second))
    discriminator_loss(network(x, sigma, first), network(x, sigma, second)).backward()
    assert network.classes.weight.grad.abs().amax(1).min() > 0
    with torch.no_grad():
        network.classes.weight[1] += 1.0
        assert not torch.allclose(network(x, sigma, first), network(x, sigma, second))


def test_a_logit_does_not_depend_on_the_rest_of_its_batch():
    torch.manual_seed(0)
    network = NoisyDiscriminator(3, 16, num_classes=2, width=8)
    x, sigma, cond = (
        torch.randn(4, 3, 16, 16),
        torch.rand(4) + 0.1,
        {"class_label": torch.tensor([0, 1, 1, 0])},
    )
    alone = network(x[:1], sigma[:1], {"class_label": cond["class_label"][:1]})
    assert torch.allclose(network(x, sigma, cond)[:1], alone, atol=1e-5)
