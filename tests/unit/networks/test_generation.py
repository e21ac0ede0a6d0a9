"""Pictures depend on their own number and condition alone, in batches of any size; conditions dropped for guidance."""

from __future__ import annotations

import torch

from distill_core.artifacts import CondSpec, SamplerSpec
from distill_core.diffusion.levels import expand
from distill_core.diffusion.schedulers import SchedulerSpec
from distill_core.networks.generation import drop_condition, generate
from tests.oracles import AffineDenoiser

LABELS = torch.tensor([2, 0, 1, 1, 2, 0, 2])


class Shaded(AffineDenoiser):
    """Class k is a Gaussian of mean k / 4; label 3 is none of them."""

    def __init__(self) -> None:
        super().__init__(0.0, 0.1)
        self.cond = CondSpec(kind="class_label", num_classes=3, null_label=3)

    def forward(self, x_sigma, sigma, cond=None):
        mean = expand(cond["class_label"] / 4, x_sigma)
        return mean + super().forward(x_sigma - mean, sigma)

    def null_cond(self, batch):
        return {"class_label": torch.full((batch,), 3)}


def test_pictures_are_the_same_in_batches_of_any_size_and_each_has_its_own_noise_and_condition():
    whole = generate(Shaded(), {"class_label": LABELS}, 7, seed=5, batch_size=7)
    for batch_size in (1, 3, 4):
        parts = generate(Shaded(), {"class_label": LABELS}, 7, seed=5, batch_size=batch_size)
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)
    noise = whole - (LABELS / 4)[:, None, None, None]
    assert len(noise.flatten(1).round(decimals=3).unique(dim=0)) == 7
    assert (noise.mean((1, 2, 3)).abs() < 0.2).all()
    assert not torch.allclose(generate(Shaded(), {"class_label": LABELS}, 7, seed=6), whole, atol=1e-2)


def test_a_share_of_the_conditions_is_dropped_and_the_others_stay():
    torch.manual_seed(0)
    labels = torch.arange(3).repeat(1000)
    for share in (0.0, 0.2, 1.0):
        found = drop_condition({"class_label": labels}, Shaded(), share)["class_label"]
        dropped = found == 3
        assert abs(dropped.float().mean().item() - share) < 0.03
        assert torch.equal(found[~dropped], labels[~dropped])


class Told(AffineDenoiser):
    """A denoiser that notes what time it is told, item by item."""

    def __init__(self):
        super().__init__(0.3, 0.7)
        self.told = []

    def forward(self, x_sigma, sigma, cond=None, time=None):
        self.told.append(None if time is None else time.tolist())
        return super().forward(x_sigma, sigma)


def test_the_network_is_told_the_times_of_a_foreign_schedulers_levels():
    scheduler = SchedulerSpec(name="dpmpp_2m", use_flow_sigmas=True, shift=3.0)
    spec = SamplerSpec(kind="scheduler", scheduler=scheduler, noise_scale=1.0, num_steps=2, max_steps=9)
    denoiser = Told()
    generate(denoiser, {}, 3, seed=5, sampler=spec)
    assert denoiser.told == [[999.0] * 3, [749.0] * 3]  # 1000 t of t = 0.99967 and 0.7493, cut off
    generate(denoiser, {}, 2, seed=5, num_steps=2)
    assert denoiser.told[2:] == [None] * 3  # Heun's levels are told by the schedule
