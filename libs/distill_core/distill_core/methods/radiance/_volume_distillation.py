"""A radiance field distilled into another, block by block: what PVD and PVD-AL share; `pvd` has the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from distill_core.data import Source
from distill_core.data.posed import SceneSource
from distill_core.errors import ConfigError
from distill_core.losses.field_distillation import (
    DEFAULT_WEIGHTS,
    FieldView,
    LossWeights,
    Reduction,
    distillation_terms,
    weighted_sum,
)
from distill_core.method import Batch, Method, MethodConfig, Update
from distill_core.networks.fields import RadianceField, build_field
from distill_core.networks.fields.base import clip_straight_through
from distill_core.networks.fields.regularizers import RegularizerWeights, check_trainable, regularization
from distill_core.networks.fields.transfer import features_compare, transfer_matching
from distill_core.radiance.cameras.camera import Camera, Rays, focal_length
from distill_core.radiance.cameras.sampling import PoseConfig, draw_poses, draw_rays
from distill_core.radiance.rendering.march import Samples, fit_budget, march
from distill_core.radiance.rendering.quadrature import composite, over, packed_weights
from distill_core.radiance.scenes.scene import Scene, render
from distill_core.recipe.tables import EvaluateConfig, NetworkConfig

MAX_PSNR = 100.0  # dB, of pictures that are equal


class VolumeConfig(MethodConfig):
    max_samples: int = Field(6144, ge=64, le=2**22)  # per micro-batch: 6 k on a CPU, 2^18 on a GPU
    num_steps: int | None = Field(None, ge=8, le=4096)  # along the box's diagonal; unset: the teacher's
    feature_until: int = Field(2000, ge=0)  # step at which colours join; both count from the run's begin
    points_until: int = Field(5000, ge=0)  # step at which pixels join
    reduction: Reduction = "mean"  # norm: as the official code, for 1e5 samples per step
    weights: LossWeights | None = None  # unset: the reduction's own
    min_log_density: float = Field(-5.0, ge=-30, le=0)  # what is compared (official: -2)
    max_log_density: float = Field(7.0, gt=0, le=15)
    transfer: bool = True  # the student begins with the teacher's tensors where they match
    poses: PoseConfig = PoseConfig()
    poses_per_step: int = Field(4, ge=1)  # that the step's rays are shared out to (official: 1)
    regularizers: RegularizerWeights = RegularizerWeights()  # official: density_l1 = 1e-4 for vm
    num_test_poses: int = Field(6, ge=1, le=200)  # held out, for the comparison with the teacher
    test_size: int = Field(64, ge=8, le=1024)  # pixels per side of these


class Chosen(NamedTuple):
    """A step's rays, and where a variant took them from."""

    rays: Rays
    slots: Tensor | None = None  # of its pool, for the first rays
    poses: Tensor | None = None  # of its epoch, for the others in turn


class VolumeDistillation(Method):
    """A variant overrides one of `choose_rays`, `kept_samples`, `learn_from`."""

    roles = ("student",)
    kind = "field"
    plan = "step"
    occupied: Tensor

    def __init__(self, config: VolumeConfig, *, teacher: Scene, network: NetworkConfig, data: Source) -> None:
        super().__init__()
        self.config, self.scene, self.data = config, teacher, data
        self.teacher = _checked(teacher.field)
        self.student = build_field(network, teacher.spec.bound)
        check_trainable(self.student, config.regularizers)
        self._check_outputs()
        self.student.occupy(teacher.occupied)
        self.transferred = transfer_matching(self.teacher, self.student) if config.transfer else []
        self.compares = features_compare(self.teacher, self.student)
        self.weights = config.weights or DEFAULT_WEIGHTS[config.reduction]
        self.register_buffer("occupied", teacher.occupied, persistent=False)
        self.num_steps = config.num_steps or teacher.num_steps

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        chosen = self.choose_rays(batch.size, step)
        rays = chosen.rays
        samples = self.march(rays)
        background = torch.rand(samples.num_rays, self.student.config.channels).to(self.device)
        with torch.no_grad():
            taught = self.look(self.teacher, rays, samples, background, step)
        learnt = self.look(self.student, rays, samples, background, step)
        kept = self.kept_samples(learnt, taught, samples)
        terms = distillation_terms(learnt, taught, self.config.reduction, feature=self.compares, kept=kept)
        loss = weighted_sum(terms, self.weights, step)
        if learnt.pixels is not None:
            loss = loss + regularization(self.student, self.config.regularizers)
        yield Update("student", loss, {"rays": samples.num_rays, **{k: v.detach() for k, v in terms.items()}})
        self.learn_from(chosen, learnt, taught)

    def choose_rays(self, count: int, step: int) -> Chosen:
        """Rays of new virtual poses."""
        return Chosen(self.rays_of(self.new_poses(self.config.poses_per_step), count))

    def kept_samples(self, learnt: FieldView, taught: FieldView, samples: Samples) -> Tensor | None:
        """Samples (M,) bool that the terms before compositing are of; None: all."""
        return None

    def learn_from(self, chosen: Chosen, learnt: FieldView, taught: FieldView) -> None:
        """Called after the student's step with what it was made from; of `chosen`, the first rays were used."""

    def new_poses(self, count: int) -> Tensor:
        """Virtual poses (N, 4, 4)."""
        return draw_poses(self.config.poses, self.scene.spec.radius, count)

    def rays_of(self, poses: Tensor, count: int) -> Rays:
        """`count` rays through random points of the pictures at `poses` (N, 4, 4)."""
        rays = draw_rays(poses, self.scene.spec.fov_degrees, count)
        return Rays(*(part.to(self.device) for part in rays))

    def march(self, rays: Rays) -> Samples:
        """The samples that teacher and student share, of as many rays as fit the budget."""
        offset = torch.rand(len(rays.origins)).to(self.device)
        bound = self.scene.spec.bound
        marched = march(rays, bound=bound, num_steps=self.num_steps, occupied=self.occupied, offset=offset)
        return fit_budget(marched, self.config.max_samples)

    def look(
        self, field: RadianceField, rays: Rays, samples: Samples, background: Tensor, step: int
    ) -> FieldView:
        """Outputs of `field` at the samples, as far as the stage of `step` needs them."""
        log_density, geo = field.block1(samples.positions)
        low, high = self.config.min_log_density, self.config.max_log_density
        compared = clip_straight_through(log_density, low, high)  # a cell below `low` can still come up
        if self.compares and step < self.config.feature_until:
            return FieldView(compared, geo)
        radiance = field.block2(geo, rays.directions[samples.ray])
        if step < self.config.points_until:
            return FieldView(compared, geo, radiance)
        weights = packed_weights(log_density.exp(), samples)
        channels = torch.cat([radiance, torch.ones_like(weights)[:, None]], -1)
        summed = composite(weights, channels, samples)
        pixels = over(summed[:, :-1], summed[:, -1:], background)
        return FieldView(compared, geo, radiance, weights, pixels)

    def student_scene(self) -> Scene:
        """The student as it is now, in the teacher's grid."""
        spec = self.scene.spec.model_copy(update={"field": self.student.kind})
        return Scene(self.student, self.occupied, spec, self.num_steps)

    def teacher_scene(self) -> Scene:
        return Scene(self.teacher, self.occupied, self.scene.spec, self.scene.num_steps)

    def test_cameras(self, seed: int) -> list[Camera]:
        """Held-out views of the scene: of the same poses, drawn apart from the training's random numbers."""
        size = self.config.test_size
        focal = focal_length(size, self.scene.spec.fov_degrees)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            poses = self.new_poses(self.config.num_test_poses)
        return [Camera(pose, focal, focal, size / 2, size / 2, size, size) for pose in poses]

    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """PSNR of held-out views against the teacher's, and of both against true pictures where the data has any.

        `psnr_to_teacher` is a mean over views, `worst_pose_psnr` over the worst tenth of them, `worst_ray_psnr` that of
        the worst tenth of all rays. `psnr_lost` is the teacher's PSNR on true pictures less the student's.
        """
        views = [self.compare(camera) for camera in self.test_cameras(config.seed)]
        errors = torch.stack([(own - taught).square().mean(-1).flatten() for own, taught in views])
        by_pose = _psnr_of(errors.mean(1)).sort().values
        worst_rays = errors.flatten().sort(descending=True).values[: max(errors.numel() // 10, 1)]
        figures = {
            "psnr_to_teacher": float(by_pose.mean()),
            "worst_pose_psnr": float(by_pose[: max(len(by_pose) // 10, 1)].mean()),
            "worst_ray_psnr": float(_psnr_of(worst_rays.mean())),
            "test_poses": float(len(views)),
        }
        return figures | (self._against_pictures(self.data) if isinstance(self.data, SceneSource) else {})

    def compare(self, camera: Camera) -> tuple[Tensor, Tensor]:
        """The student's picture (H, W, 3) through `camera`, and the teacher's."""
        own, taught = (render(scene, camera).rgb for scene in (self.student_scene(), self.teacher_scene()))
        return own.cpu(), taught.cpu()

    def _against_pictures(self, data: SceneSource) -> dict[str, float]:
        truth = data.test.truth(self.scene.spec.background)
        known = data.test.known
        errors = []
        for index, true in enumerate(truth):
            pair, counted = (
                self.compare(data.test.camera(index)),
                slice(None) if known is None else known[index],
            )
            errors.append([(view - true)[counted].square().mean() for view in pair])
        own, taught = _psnr_of(torch.tensor(errors)).mean(0).tolist()
        return {"psnr": own, "teacher_psnr": taught, "psnr_lost": taught - own}

    def published(self) -> Mapping[str, Scene]:
        return {"student": self.student_scene()}

    def references(self) -> Mapping[str, Scene]:
        return {"teacher": self.teacher_scene()}

    def _check_outputs(self) -> None:
        teacher, student = self.teacher.config, self.student.config
        if (teacher.channels, teacher.output) != (student.channels, student.output):
            raise ConfigError(
                f"the teacher gives {teacher.channels} channels, {teacher.output}, the student "
                f"{student.channels}, {student.output}; set network.args.channels and network.args.output alike",
                field="network.args",
            )


def _checked(field: object) -> RadianceField:
    if not isinstance(field, RadianceField):
        raise ConfigError(
            f"pvd converts radiance fields, and the teacher is a {type(field).__name__}; choose a field",
            field="teacher",
        )
    return field


def _psnr_of(error: Tensor) -> Tensor:
    """Mean square errors of values in [0, 1] in dB."""
    return (-10 * error.log10()).clamp_max(MAX_PSNR)
