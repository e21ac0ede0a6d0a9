import pytest
import torch

from distill_core.metrics.editing import background_psnr, colour_moved


def scene():
    shown = torch.zeros(2, 20, 20)
    shown[:, 4:8, 4:8] = 1
    before = torch.full((2, 20, 20, 3), 0.5)
    before[shown > 0] = torch.tensor([1.0, 0.0, 0.0])
    wanted = before.clone()
    wanted[shown > 0] = torch.tensor([0.0, 0.0, 1.0])
    return before, wanted, shown


def test_the_share_of_the_way_is_that_of_the_object_alone():
    before, wanted, shown = scene()
    after = torch.where(shown[..., None] > 0, torch.lerp(before, wanted, 0.75), 0.1)
    assert colour_moved(before, after, wanted, shown) == pytest.approx(0.75, abs=1e-6)
    sideways = before + torch.tensor([0.0, 0.4, 0.0])
    assert colour_moved(before, sideways, wanted, shown) == pytest.approx(0, abs=1e-6)


def test_the_background_begins_a_margin_away_from_the_object():
    before, wanted, shown = scene()
    assert background_psnr(before, wanted, shown) == pytest.approx(100)
    nearby = before.clone()
    nearby[:, 9:12] += 0.1  # within four pixels of the object in columns 0 to 11 only
    far = before.clone()
    far[:, :, 12:] += 0.1
    assert background_psnr(before, far, shown) < background_psnr(before, nearby, shown) < 100
    everywhere = torch.where(shown[..., None] > 0, before, before + 0.1)
    assert background_psnr(before, everywhere, shown) == pytest.approx(20, abs=1e-3)
