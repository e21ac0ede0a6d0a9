"""PVD-AL: PVD that looks again where the student is wrong: at hard poses, along hard rays, at points that matter.

    pose:  the worst tenth of an epoch's poses by PSNR(C_s, C_t) go to a pool; a tenth of an epoch comes from it, turned
    ray:   the worst tenth of a step's rays by sum_c |C_s - C_t| go to a pool; each step draws a tenth more rays from it
    point: feature, density and colour are compared only at the samples that make the pixel: per ray the 30 % of largest
           weight, of rays with sum w >= 1/2, for teacher or student

Each level is a switch. What is drawn from a pool is replaced by what is hard now.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from distill_core.data import Source
from distill_core.losses.field_distillation import FieldView
from distill_core.methods.radiance._volume_distillation import Chosen, VolumeConfig, VolumeDistillation
from distill_core.radiance.cameras.camera import Rays
from distill_core.radiance.cameras.sampling import turned
from distill_core.radiance.rendering.march import Samples
from distill_core.radiance.scenes.scene import Scene
from distill_core.recipe.tables import EvaluateConfig, NetworkConfig
from distill_core.training.hard_examples import HardExamplePool


class Config(VolumeConfig):
    levels: tuple[Literal["pose", "ray", "point"], ...] = ("pose", "ray", "point")
    feature_until: int = Field(0, ge=0)  # official: all terms from the start; stages are an option
    points_until: int = Field(0, ge=0)
    epoch_poses: int = Field(64, ge=2)  # poses between two looks at which were hard
    first_epoch: int = Field(4, ge=1)  # epochs before the first poses are called hard
    pose_share: float = Field(0.1, gt=0, le=1)  # of an epoch's poses, to the pool and from it
    ray_share: float = Field(0.1, gt=0, le=1)  # of a step's rays, to the pool; as many more come from it
    # A pool acts once full: after pose_pool / (pose_share * epoch_poses) epochs, ray_pool / (ray_share * rays) steps.
    pose_pool: int = Field(32, ge=1)  # poses (official: 100)
    ray_pool: int = Field(4096, ge=1)  # rays (official: 150 batches, which a short run never fills)
    turn_degrees: float = Field(9.0, ge=0, le=90)  # by which a hard pose is turned about each axis, at most
    point_share: float = Field(0.3, gt=0, le=1)  # of a ray's samples that are critical
    min_opacity: float = Field(0.5, ge=0, le=1)  # of a ray that has any


def critical_points(weights: Tensor, samples: Samples, share: float, min_opacity: float) -> Tensor:
    """Samples (M,) bool among the `share` of largest weight on a ray whose weights sum to `min_opacity`."""
    counts = torch.bincount(samples.ray, minlength=samples.num_rays)
    opacity = torch.zeros(samples.num_rays, device=weights.device).index_add(0, samples.ray, weights)
    order = weights.argsort(descending=True, stable=True)
    order = order[samples.ray[order].argsort(stable=True)]  # by ray, within it by weight
    ray = samples.ray[order]
    rank = torch.arange(len(ray), device=ray.device) - (counts.cumsum(0) - counts)[ray]
    critical = torch.zeros(len(ray), dtype=torch.bool, device=ray.device)
    critical[order] = (rank < (share * counts).ceil()[ray]) & (opacity >= min_opacity)[ray]
    return critical


class PVDAL(VolumeDistillation):
    paper = (
        "Fang et al. 2023, Progressive Volume Distillation with Active Learning for Efficient NeRF Architecture "
        "Conversion, arXiv 2304.04012"
    )
    config: Config
    epoch: Tensor
    epoch_poses: Tensor
    pose_errors: Tensor

    def __init__(self, config: Config, *, teacher: Scene, network: NetworkConfig, data: Source) -> None:
        super().__init__(config, teacher=teacher, network=network, data=data)
        self.hard_poses = HardExamplePool(config.pose_pool, (4, 4))
        self.hard_rays = HardExamplePool(config.ray_pool, (6,))
        self.register_buffer("epoch", torch.tensor(-1))
        self.register_buffer("epoch_poses", torch.zeros(config.epoch_poses, 4, 4))
        self.register_buffer("pose_errors", torch.zeros(config.epoch_poses))

    def choose_rays(self, count: int, step: int) -> Chosen:
        poses = self.poses_of(step)
        fresh = self.rays_of(self.epoch_poses[poses].cpu(), count)
        if "ray" not in self.config.levels or not self.hard_rays.full:
            return Chosen(fresh, poses=poses)
        hard, slots = self.hard_rays.draw(_part(self.config.ray_share, count))
        rays = Rays(torch.cat([hard[:, :3], fresh.origins]), torch.cat([hard[:, 3:], fresh.directions]))
        return Chosen(rays, slots, poses)

    def poses_of(self, step: int) -> Tensor:
        """Indices of the step's poses in its epoch, whose poses are new when it begins."""
        per_step = min(self.config.poses_per_step, self.config.epoch_poses)
        epoch, place = divmod(step, self.config.epoch_poses // per_step)
        if epoch != int(self.epoch):
            self.begin_epoch(epoch)
        return torch.arange(per_step, device=self.device) + place * per_step

    def begin_epoch(self, epoch: int) -> None:
        """Draw the epoch's poses, a share of them from the hard ones; remember the last epoch's worst."""
        count = _part(self.config.pose_share, self.config.epoch_poses)
        worst = self.epoch_poses[self.pose_errors.argsort(descending=True)[:count]]
        poses = self.new_poses(self.config.epoch_poses).to(self.device)
        if "pose" in self.config.levels and epoch >= self.config.first_epoch:
            if self.hard_poses.full:
                hard, slots = self.hard_poses.draw(count)
                place = torch.randperm(len(poses))[: len(hard)].to(self.device)
                poses[place] = turned(hard.cpu(), self.config.turn_degrees).to(self.device)
                self.hard_poses.replace(slots, worst)
            else:
                self.hard_poses.put(worst)
        self.epoch_poses.copy_(poses)
        self.pose_errors.zero_()
        self.epoch.fill_(epoch)

    def kept_samples(self, learnt: FieldView, taught: FieldView, samples: Samples) -> Tensor | None:
        if "point" not in self.config.levels or learnt.weights is None or taught.weights is None:
            return None
        share, opacity = self.config.point_share, self.config.min_opacity
        ours = critical_points(learnt.weights.detach(), samples, share, opacity)
        return ours | critical_points(taught.weights, samples, share, opacity)

    @torch.no_grad()
    def learn_from(self, chosen: Chosen, learnt: FieldView, taught: FieldView) -> None:
        if learnt.pixels is None or taught.pixels is None:
            return
        difference = learnt.pixels - taught.pixels
        self.rate_poses(chosen, difference.square().mean(-1))
        if "ray" in self.config.levels:
            self.rate_rays(chosen, difference.abs().sum(-1))

    def rate_poses(self, chosen: Chosen, error: Tensor) -> None:
        """Note the mean square error of each of the step's poses; `error` (R,) is that of the rays used."""
        assert chosen.poses is not None
        pooled = 0 if chosen.slots is None else len(chosen.slots)
        own = error[pooled:]
        which = torch.arange(len(own), device=own.device) % len(chosen.poses)
        total = torch.zeros(len(chosen.poses), device=own.device).index_add(0, which, own)
        counts = torch.bincount(which, minlength=len(chosen.poses)).clamp_min(1)
        self.pose_errors[chosen.poses] = total / counts

    def rate_rays(self, chosen: Chosen, error: Tensor) -> None:
        """Keep the worst rays: in the pool's free slots, or in place of those that were drawn from it."""
        worst = error.argsort(descending=True)[: _part(self.config.ray_share, len(error))]
        rays = torch.cat([chosen.rays.origins[worst], chosen.rays.directions[worst]], -1)
        if chosen.slots is None:
            self.hard_rays.put(rays)
        else:
            self.hard_rays.replace(chosen.slots, rays)

    def state(self) -> dict[str, Tensor]:
        kept = ("epoch", "epoch_poses", "pose_errors")
        pools = (("hard_poses", self.hard_poses), ("hard_rays", self.hard_rays))
        return {name: getattr(self, name) for name in kept} | {
            f"{prefix}.{name}": value for prefix, pool in pools for name, value in pool.state_dict().items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        known = self.state()
        for name, value in state.items():
            known[name].copy_(value)

    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """PVD's figures, and `critical_error`: mean |l_s - l_t| at the critical points of held-out views."""
        return super().figures(config) | {"critical_error": self.critical_error(config.seed)}

    @torch.no_grad()
    def critical_error(self, seed: int) -> float:
        """Mean absolute difference of the clipped log-densities at the teacher's critical points."""
        step = max(self.config.points_until, self.config.feature_until)
        total, count = 0.0, 0
        for camera in self.test_cameras(seed):
            rays = Rays(*(part.to(self.device) for part in camera.rays()))
            samples = self.march(rays)
            white = torch.ones(samples.num_rays, self.student.config.channels, device=self.device)
            learnt, taught = (
                self.look(field, rays, samples, white, step) for field in (self.student, self.teacher)
            )
            assert taught.weights is not None
            kept = critical_points(taught.weights, samples, self.config.point_share, self.config.min_opacity)
            total += float((learnt.log_density - taught.log_density)[kept].abs().sum())
            count += int(kept.sum())
        return total / max(count, 1)


def _part(share: float, count: int) -> int:
    """`share` of `count`, at least one."""
    return max(int(share * count), 1)
