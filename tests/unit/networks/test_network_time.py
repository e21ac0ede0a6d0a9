"""A network is told a time in the place of what its schedule says of the level, whatever it is wrapped in."""

from __future__ import annotations

import pytest
import torch

from distill_core.networks.adapters import LoraDenoiser
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.routed import ConditionPartition, RoutedDenoiser
from distill_core.recipe.tables import LoraConfig
from tests.helpers import tiny_text_to_image


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.set_num_threads(1)
    return load_denoiser(tiny_text_to_image(tmp_path_factory.mktemp("time") / "model"))


def wrapped(base, kind):
    if kind == "lora":
        return LoraDenoiser(base, LoraConfig(rank=2))
    return RoutedDenoiser([base], ConditionPartition.whole()) if kind == "routed" else base


@pytest.mark.parametrize("guidance", [1.0, 3.0, torch.tensor([1.5, 4.0])])
@pytest.mark.parametrize("kind", ["plain", "lora", "routed"])
def test_a_time_takes_the_place_of_the_schedules(kind, guidance, base):
    denoiser = wrapped(base, kind)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)) * 4
    sigma, cond = torch.tensor([4.0, 0.7]), base.encode_prompts(["a red wall", "a blue wall"])
    own = base.schedule.network_time(sigma)
    with torch.no_grad():
        plain = denoiser.guided(x, sigma, cond, guidance)
        assert torch.equal(denoiser.guided(x, sigma, cond, guidance, own), plain)
        other = denoiser.guided(x, sigma, cond, guidance, own.flip(0))
        assert not torch.allclose(other, plain, rtol=1e-3)
        alone = [
            base.guided(
                x[i : i + 1], sigma[i : i + 1], {k: v[i : i + 1] for k, v in cond.items()}, scale, time
            )
            for i, scale, time in zip(
                range(2), torch.as_tensor(guidance).expand(2).split(1), own.flip(0).split(1)
            )
        ]
    torch.testing.assert_close(other, torch.cat(alone), atol=1e-4, rtol=1e-4)
