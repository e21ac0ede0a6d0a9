"""A radiance field distilled into 3-D Gaussians, which viewers and browsers draw, without images.

    L = |C_s - C_t|^2 + w_o |o_s - o_t|^2 + w_d |d_s - d_t|^2 / radius^2        mean over the pixels of a virtual pose

C: pixels over a random background, o: opacity, d: expected distance; t by volume rendering, s by splatting: the last
terms of PVD (arXiv 2211.15977). Gaussians begin at the surface cells of the teacher's occupancy grid, as large
as cells, with the field's opacity and colour there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core.errors import ConfigError
from distill_core.method import Batch, Method, MethodConfig, Update
from distill_core.metrics.image import psnr
from distill_core.radiance.cameras.camera import Camera, focal_length
from distill_core.radiance.cameras.sampling import PoseConfig, draw_poses
from distill_core.radiance.rendering.quadrature import over
from distill_core.radiance.scenes.gaussian_seeding import seed_gaussians
from distill_core.radiance.scenes.gaussians import (
    GaussianModel,
    GaussianScene,
    Splats,
    rasterize,
    render_gaussians,
)
from distill_core.radiance.scenes.scene import Rendering, Scene, render
from distill_core.recipe.tables import EvaluateConfig

BLACK = (0.0, 0.0, 0.0)


class Config(MethodConfig):
    max_gaussians: int = Field(4000, ge=1, le=10_000_000)
    sh_degree: int = Field(2, ge=0, le=3)
    seed_scale: float = Field(0.5, gt=0, le=4)  # standard deviation of a new Gaussian, in cells of the grid
    opacity_weight: float = Field(0.5, ge=0)
    depth_weight: float = Field(0.1, ge=0)
    poses: PoseConfig = PoseConfig()
    size: int = Field(64, ge=8, le=1024)  # pixels per side of what is compared
    num_test_poses: int = Field(6, ge=1, le=200)  # held out


def splat_loss(
    splats: Splats, taught: Rendering, background: Tensor, config: Config, radius: float
) -> tuple[Tensor, Tensor]:
    """The loss and its pixel term; `taught` over black, both then over `background` (3,)."""
    pixel = over(splats.rgb, splats.opacity[..., None], background)
    target = over(taught.rgb, taught.opacity[..., None], background)
    colour = (pixel - target).square().mean()
    opacity = (splats.opacity - taught.opacity).square().mean()
    depth = ((splats.depth - taught.depth) / radius).square().mean()
    return colour + config.opacity_weight * opacity + config.depth_weight * depth, colour


def linearized(loss: Tensor, parameters: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """A scalar equal to `loss`, with these gradients: one backward pass serves several roles."""
    along = sum(((p - p.detach()) * g).sum() for p, g in zip(parameters, gradients, strict=True))
    return loss.detach() + along


class FieldToGaussians(Method):
    paper = (
        "Kerbl et al. 2023, 3D Gaussian Splatting, arXiv 2308.04079; "
        "Fang et al. 2023, One is All: Progressive Volume Distillation, arXiv 2211.15977"
    )
    roles = ("geometry", "appearance")
    result = "appearance"
    kind = "gaussians"
    plan = "step"
    occupied: Tensor
    extra: Tensor

    def __init__(self, config: Config, *, teacher: Scene) -> None:
        super().__init__()
        if not isinstance(teacher, Scene):
            raise ConfigError("field_to_gaussians distils a radiance field; choose one", field="teacher")
        self.config, self.scene = config, teacher
        self.teacher = teacher.field
        self.register_buffer("occupied", teacher.occupied, persistent=False)
        seeds = seed_gaussians(
            teacher, count=config.max_gaussians, sh_degree=config.sh_degree, scale=config.seed_scale
        )
        tensors = seeds.tensors()
        self.register_buffer("extra", tensors.pop("extra"), persistent=False)
        shape = ("means", "log_scales", "quats")
        self.geometry = nn.ParameterDict({name: tensors.pop(name) for name in shape})
        self.appearance = nn.ParameterDict(tensors)

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        (pose,) = draw_poses(self.config.poses, self.scene.spec.radius, 1)
        camera, background = self.camera(pose), torch.rand(3).to(self.device)
        taught = render(self.teacher_scene(), camera, background=BLACK)
        splats = rasterize(self.gaussians(), camera)
        loss, colour = splat_loss(splats, taught, background, self.config, self.scene.spec.radius)
        geometry, appearance = list(self.geometry.values()), list(self.appearance.values())
        gradients = list(torch.autograd.grad(loss, geometry + appearance))
        figures = {"psnr_to_teacher": -10 * colour.detach().log10()}
        yield Update("geometry", linearized(loss, geometry, gradients[: len(geometry)]), figures)
        yield Update("appearance", linearized(loss, appearance, gradients[len(geometry) :]))

    def camera(self, pose: Tensor) -> Camera:
        """A square view of the scene from `pose` (4, 4)."""
        size = self.config.size
        focal = focal_length(size, self.scene.spec.fov_degrees)
        return Camera(pose, focal, focal, size / 2, size / 2, size, size)

    def gaussians(self) -> GaussianModel:
        """The Gaussians as they are now, with gradients."""
        return GaussianModel(**dict(self.geometry.items()), **dict(self.appearance.items()), extra=self.extra)

    def student_scene(self) -> GaussianScene:
        spec = self.scene.spec.model_copy(update={"field": "gaussians"})
        return GaussianScene(self.gaussians(), spec)

    def teacher_scene(self) -> Scene:
        return Scene(self.teacher, self.occupied, self.scene.spec, self.scene.num_steps)

    def test_cameras(self, seed: int) -> list[Camera]:
        """Held-out views of the scene: of the same poses, drawn apart from the training's random numbers."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            poses = draw_poses(self.config.poses, self.scene.spec.radius, self.config.num_test_poses)
        return [self.camera(pose) for pose in poses]

    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """Means over held-out poses, against the teacher: PSNR, and the error of opacity and distance (scene units)."""
        psnrs, opacities, depths = [], [], []
        cameras = self.test_cameras(config.seed)
        for camera in cameras:
            own = render_gaussians(self.student_scene(), camera)
            taught = render(self.teacher_scene(), camera)
            psnrs.append(psnr(own.rgb.cpu().numpy(), taught.rgb.cpu().numpy()))
            opacities.append(float((own.opacity - taught.opacity).abs().mean()))
            depths.append(float((own.depth - taught.depth).abs().mean()))
        count = len(cameras)
        return {
            "psnr_to_teacher": sum(psnrs) / count,
            "opacity_error": sum(opacities) / count,
            "depth_error": sum(depths) / count,
            "gaussians": float(len(self.gaussians())),
            "test_poses": float(count),
        }

    def published(self) -> Mapping[str, GaussianScene]:
        return {"student": self.student_scene()}

    def references(self) -> Mapping[str, Scene]:
        return {"teacher": self.teacher_scene()}
