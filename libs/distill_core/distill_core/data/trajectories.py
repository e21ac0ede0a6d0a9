"""States of a model's own walks from noise to picture, beside the pairs whose noise and conditions they share.

A walk takes Euler's steps on given levels; of its states those are kept that are asked for. Like pairs they are made
once, addressed by the weights of the model, the levels, the kept places and the guidance.

Where guidance is a range, walk i has a scale of its own in it: low + (high - low) frac((i + 1) / golden ratio), which
fills the range evenly whatever their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill_core.data.pairs import Pairs
from distill_core.data.shards import Shards, check_size, fill
from distill_core.diffusion.guidance import GuidanceLaw
from distill_core.diffusion.solvers import SolverConfig, walk
from distill_core.method import Cond
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.fake_tensors import is_faked
from distill_core.networks.modes import evaluating

GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class StateBatch:
    """Walks drawn for one update, on the CPU."""

    states: Tensor  # (B, S, C, H, W): x_sigma at the S kept places, the first of them the earliest
    cond: Cond

    def to(self, device: torch.device) -> StateBatch:
        """The same walks on `device`."""
        return StateBatch(self.states.to(device), {name: v.to(device) for name, v in self.cond.items()})


class Trajectories:
    """The kept states of one model's walks, one from the noise of each pair."""

    def __init__(self, shards: Shards, pairs: Pairs, guidance: float | GuidanceLaw) -> None:
        self.shards, self.pairs, self.guidance = shards, pairs, guidance

    def __len__(self) -> int:
        return len(self.shards)

    def at(self, indices: Tensor) -> StateBatch:
        """The walks from the noise of the pairs `indices` (B,)."""
        return StateBatch(self.shards.at("states", indices), self.pairs.conditions(indices))

    def steps(self, indices: Tensor, places: Tensor) -> StateBatch:
        """Of the walks `indices` (B,) the kept states number `places` (B,) and the next: (B, 2, C, H, W)."""
        both = torch.stack([places, places + 1], 1)
        return StateBatch(self.shards.at("states", indices, both), self.pairs.conditions(indices))

    def scales(self, indices: Tensor) -> Tensor:
        """The guidance (B,) of the walks `indices` (B,)."""
        return scales(self.guidance, indices)


def scales(guidance: float | GuidanceLaw, indices: Tensor) -> Tensor:
    """The guidance (B,) float32 of walks numbered `indices` (B,)."""
    law = guidance if isinstance(guidance, GuidanceLaw) else GuidanceLaw.fixed(guidance)
    share = (indices.double() + 1) * GOLDEN % 1
    return (law.low + (law.high - law.low) * share).float()


@torch.no_grad()
def recorded(
    model: Denoiser, z: Tensor, cond: Cond, levels: Sequence[float], guidance: float | Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """The states (B, ...) at each of `levels`, and the x0 (B, ...) predicted at each but the last, from unit noise."""
    predictions: list[Tensor] = []

    def denoise(x_sigma: Tensor, sigma: Tensor) -> Tensor:
        predictions.append(model.guided(x_sigma, sigma, cond, guidance))
        return predictions[-1]

    x = z * model.schedule.start_scale(levels[0])
    by_item = [z.new_full((len(z),), level) for level in levels]
    with evaluating(model):
        states = [x, *walk(denoise, x, by_item, SolverConfig())]
    return states, predictions


def build_trajectories(
    pairs: Pairs,
    model: Denoiser,
    levels: Sequence[float],
    keep: Sequence[int],
    guidance: float | GuidanceLaw = 1.0,
) -> Trajectories:
    """The states at the places `keep` of `levels` of the walks of `model` from the noise of `pairs`.

    Raises:
        ConfigError: more than `pairs.max_gib` holds. DataError: a file there is another model's.
    """
    config, image = pairs.config, model.image
    shape = image.channels, image.height, image.width
    check_size(len(pairs), (len(keep), *shape), config.max_gib, field="pairs.count")
    if is_faked():
        return Trajectories(Shards([{"states": torch.empty(len(pairs), len(keep), *shape)}]), pairs, guidance)
    device = next(model.parameters()).device

    def make(start: int, stop: int) -> dict[str, Tensor]:
        found = []
        for indices in torch.arange(start, stop).split(config.batch_size):
            cond = {name: value.to(device) for name, value in pairs.conditions(indices).items()}
            z = pairs.noise(indices, shape).to(device)
            told = scales(guidance, indices).to(device) if isinstance(guidance, GuidanceLaw) else guidance
            states, _ = recorded(model, z, cond, levels, told)
            found.append(torch.stack([states[place] for place in keep], 1).cpu())
        return {"states": torch.cat(found)}

    law = [guidance.low, guidance.high] if isinstance(guidance, GuidanceLaw) else guidance
    made = {"levels": list(levels), "keep": list(keep), "guidance": law, "seed": config.seed}
    folder = pairs.beside(model, made)
    return Trajectories(fill(folder, len(pairs), make, what="states of walks"), pairs, guidance)
