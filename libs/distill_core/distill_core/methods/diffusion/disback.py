"""DisBack: distribution backtracking. DMD2 whose target walks from a degraded teacher back to the teacher itself.

    degradation:   student frozen, D_fake trained on its samples; snapshots s_1 ... s_N of D_fake on the way
    backtracking:  DMD2 with the target s_N, then s_(N-1), ... s_1, `node_steps` each; then the teacher for good

A snapshot is taken whenever the fake score has moved far enough, |w (D_fake - s_last)| >= `node_distance`, not after
so many updates: degradation is fast at first, and then nearly stands still. No node (`num_nodes` = 0) is DMD2.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor

from distill_core.data.pairs import Pairs
from distill_core.losses.denoising import add_noise
from distill_core.losses.matching import dm_direction
from distill_core.method import Batch, Stage, Update
from distill_core.methods.diffusion._distribution_matching import DistributionMatching, MatchingConfig
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.fake_score import FakeScore
from distill_core.reductions import over_processes


class Config(MatchingConfig):
    num_nodes: int = Field(8, ge=0)  # snapshots kept at most; official SDXL: about 10
    record_steps: int = Field(100, ge=1)  # of the degradation; official SDXL: about 1000 updates
    node_distance: float = Field(0.05, gt=0)  # between nodes, as `score_gap`; doubles when there are too many
    node_steps: int = Field(100, ge=1)  # student updates towards each node; official SDXL: 1000


class DisBack(DistributionMatching):
    paper = (
        "Zhang et al. 2024, Distribution Backtracking Builds A Faster Convergence Trajectory for One-step "
        "Diffusion Distillation, arXiv 2408.15991"
    )
    config: Config
    fake_score: FakeScore

    def __init__(
        self, config: Config, *, teacher: Denoiser, student: Denoiser, pairs: Pairs | None = None
    ) -> None:
        super().__init__(config, teacher=teacher, student=student, pairs=pairs)
        self.nodes: list[dict[str, Tensor]] = []  # weights, from the teacher towards the student
        self.distance = config.node_distance
        self._standing: tuple[int, Denoiser] | None = None  # the node that is loaded, and its number

    @classmethod
    def preparation(cls, config: MatchingConfig) -> tuple[Stage, ...]:
        assert isinstance(config, Config)
        return (Stage("degradation", config.record_steps if config.num_nodes else 0, ("fake_score",)),)

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        yield from super().updates(batch, step)
        if self.stage_of(step).name == "degradation":
            self.record(batch, last=self.stage_of(step + 1).name != "degradation")

    def target(self, step: int) -> Denoiser:
        """The node whose turn it is, the teacher after all of them."""
        if not self.nodes:
            return self.teacher
        begin = self.config.regression_steps + self.config.record_steps
        return self.node(len(self.nodes) - 1 - (step - begin) // self.config.node_steps)

    def node(self, number: int) -> Denoiser:
        """The denoiser of a snapshot, loaded; below 0, the teacher."""
        if number < 0:
            return self.teacher
        if self._standing is None or self._standing[0] != number:
            denoiser = copy.deepcopy(self.teacher) if self._standing is None else self._standing[1]
            denoiser.load_state_dict(self.nodes[number], strict=True)
            self._standing = number, denoiser
        return self._standing[1]

    @torch.no_grad()
    def record(self, batch: Batch, *, last: bool) -> None:
        """Keep the fake score's weights if they are far enough from the last node's."""
        x0 = self.generate(batch)
        sigma = self.sample_sigma(x0)
        x_sigma = add_noise(x0, sigma)
        former = self.node(len(self.nodes) - 1)(x_sigma, sigma, batch.cond)
        direction = dm_direction(self.fake_score(x_sigma, sigma, batch.cond), former, x0)
        total = over_processes(torch.stack([direction.abs().mean(), direction.new_ones(())]))
        moved = float(total[0] / total[1])
        if last:  # the fake score stays here: a node as near as this would give the student no direction
            self.nodes = self.nodes if moved >= self.distance / 2 else self.nodes[:-1]
            return
        if moved < self.distance:
            return
        weights = self.fake_score.denoiser.state_dict()
        self.nodes.append({name: value.to("cpu", copy=True) for name, value in weights.items()})
        if len(self.nodes) > self.config.num_nodes:
            self.nodes, self.distance, self._standing = self.nodes[1::2], 2 * self.distance, None

    def state(self) -> dict[str, Tensor]:
        nodes = {
            f"node/{number}/{name}": value
            for number, weights in enumerate(self.nodes)
            for name, value in weights.items()
        }
        return {"distance": torch.tensor(self.distance, dtype=torch.float64), **nodes}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.distance, self.nodes, self._standing = float(state["distance"]), [], None
        names = list(self.teacher.state_dict())
        while f"node/{len(self.nodes)}/{names[0]}" in state:
            self.nodes.append({name: state[f"node/{len(self.nodes)}/{name}"] for name in names})
