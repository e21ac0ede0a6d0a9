"""The photometric loss against an independent implementation."""

import pytest
import torch

from distill_core.losses.ssim import photometric_loss, ssim_map
from distill_core.metrics.image import ssim


def pictures(seed):
    random = torch.Generator().manual_seed(seed)
    one = torch.rand(2, 3, 24, 20, generator=random)
    return one, (one + 0.2 * torch.randn(one.shape, generator=random)).clamp(0, 1)


def test_the_map_s_mean_is_the_metric_on_whole_windows():
    one, other = pictures(0)
    wanted = [ssim(b.permute(1, 2, 0).numpy(), a.permute(1, 2, 0).numpy()) for a, b in zip(one, other)]
    found = ssim_map(one.double(), other.double()).mean(dim=(1, 2, 3))
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)


def test_equal_pictures_have_no_loss_and_its_parts_are_weighed():
    one, other = pictures(1)
    assert photometric_loss(one, one).item() == pytest.approx(0, abs=1e-6)
    absolute, structure = (one - other).abs().mean(), 1 - ssim_map(one, other).mean()
    torch.testing.assert_close(photometric_loss(one, other), 0.8 * absolute + 0.2 * structure)
    torch.testing.assert_close(photometric_loss(one, other, 0.0), absolute)
