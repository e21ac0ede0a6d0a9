"""The directions against Gaussians, whose denoiser is known in closed form."""

import torch

from distill_core.losses.matching import surrogate_loss
from distill_core.losses.score_distillation import Source, score_direction, sds_direction

SPREAD = 0.5


def gaussian(mean):
    """The exact denoiser of N(mean, SPREAD^2)."""

    def predict(x_sigma, sigma):
        kept = SPREAD**2 / (SPREAD**2 + sigma[:, None] ** 2)
        return mean + kept * (x_sigma - mean)

    return predict


def drawn(seed=0):
    random = torch.Generator().manual_seed(seed)
    x0, source, noise = (torch.randn(6, 4, generator=random, dtype=torch.float64) for _ in range(3))
    return x0, source, noise, torch.linspace(0.3, 3, 6, dtype=torch.float64)


def test_sds_is_the_predicted_noise_less_the_drawn_one():
    x0, _, noise, sigma = drawn()
    predict = gaussian(0.7)
    x_sigma = x0 + sigma[:, None] * noise
    predicted_noise = (x_sigma - predict(x_sigma, sigma)) / sigma[:, None]
    torch.testing.assert_close(score_direction(x0, predict, sigma, noise), predicted_noise - noise)


def test_without_noise_sds_is_minus_sigma_times_the_score():
    x0, _, noise, sigma = drawn()
    score = -(x0 - 0.7) / (SPREAD**2 + sigma[:, None] ** 2)
    found = score_direction(x0, gaussian(0.7), sigma, torch.zeros_like(noise))
    torch.testing.assert_close(found, -sigma[:, None] * score)
    torch.testing.assert_close(found, sds_direction(x0, gaussian(0.7)(x0, sigma), sigma))


def test_dds_leaves_the_noise_out_and_keeps_the_difference_of_words():
    x0, source, noise, sigma = drawn()
    found = score_direction(x0, gaussian(2.0), sigma, noise, Source(source, gaussian(-1.0)))
    shift = (x0 - 2.0) - (source + 1.0)
    torch.testing.assert_close(found, sigma[:, None] / (SPREAD**2 + sigma[:, None] ** 2) * shift)


def test_equal_words_and_pictures_have_no_dds_direction_at_all():
    x0, _, noise, sigma = drawn()
    found = score_direction(x0, gaussian(2.0), sigma, noise, Source(x0.clone(), gaussian(2.0)))
    assert torch.equal(found, torch.zeros_like(x0))
    assert score_direction(x0, gaussian(2.0), sigma, noise).abs().min() > 0


def test_descent_along_dds_moves_the_picture_by_the_difference_of_the_means_and_no_gradient_is_kept():
    _, source, _, _ = drawn()
    x0 = source.clone().requires_grad_(True)
    random = torch.Generator().manual_seed(3)
    for _ in range(300):
        noise = torch.randn(x0.shape, generator=random, dtype=torch.float64)
        direction = score_direction(
            x0, gaussian(2.0), torch.ones(6).double(), noise, Source(source, gaussian(-1.0))
        )
        assert not direction.requires_grad
        surrogate_loss(x0, direction).backward()
        x0.data -= 0.05 * x0.numel() * x0.grad
        x0.grad = None
    torch.testing.assert_close(x0.detach(), source + 3, atol=1e-3, rtol=0)
