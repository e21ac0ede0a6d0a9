"""PRD: light and materials distilled out of a trained radiance field, as far as a physical model explains the pixels.

    I = alpha I_phy + (1 - alpha) I_raw,        I_phy = (1 - m) I_diff + I_spec       (radiance/light/shading.py)
    L = L_rgb(I, I_image) + w_alpha |mask - alpha|^2 + w_light sum |L_env - mean_rgb L_env| + w_n (1 - n.n_density)
    L_rgb = 0.8 |.| + 0.2 (1 - SSIM)

The stages are data. 1 raw: alpha = 0, the field alone; a trained teacher has it behind it. 2 specular: alpha starts at
0.01 and rises where a mirror explains what the field's harmonics cannot; m = 1, r = c = 0.99. 3 diffuse: m is released,
alpha pushed up softly, the light kept white. 4 joint: alpha hardly moves. I flows into all of it, I_raw and geometry
included: field, materials and light are stepped in turn on the same rays, each at its own rate.

The paper's carrier is Gaussians, whose shortest axis is the normal; here any field is, and a small smooth network holds
the normals, kept near the density's gradient. No shadows (V = 1). The stages' lengths, w_n and `alpha_gradient` are our
choice, the paper's being unknown; and a relit scene keeps the share 1 - alpha of its raw radiance as it was seen.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from distill_core.data.analytic_scenes import InverseScene
from distill_core.data.posed import PosedImages, SceneSource
from distill_core.data.scenes import GOLDEN_ANGLE
from distill_core.errors import ConfigError
from distill_core.losses.ssim import WINDOW, photometric_loss
from distill_core.method import Batch, Method, MethodConfig, Update
from distill_core.metrics.image import psnr
from distill_core.networks.fields import RadianceField
from distill_core.networks.materials import MaterialConfig, MaterialField
from distill_core.radiance.cameras.camera import Rays
from distill_core.radiance.light.environment import EnvironmentLight, texels
from distill_core.radiance.light.shading import GBuffer
from distill_core.radiance.rendering.march import step_length
from distill_core.radiance.rendering.quadrature import over
from distill_core.radiance.scenes.relightable import RelightableScene
from distill_core.radiance.scenes.scene import Scene, render
from distill_core.recipe.tables import EvaluateConfig

NORMAL_RAYS, NORMAL_TAPS = 128, 20  # looked at per step, and around each for the density's gradient
SURE = 0.9  # a pixel counts as inside or outside a region, or as surface, when this share of it is


class Stage(MethodConfig):
    """Settings until step `until`."""

    until: int = Field(ge=0)
    alpha: Literal["zero", "free"] = "free"  # zero: the raw field alone
    metallic: Literal["one", "free"] = "free"
    light: Literal["free", "frozen"] = "free"  # frozen: for the last stage of real captures
    alpha_weight: float = Field(0.0, ge=0)  # of |mask - alpha|^2
    light_weight: float = Field(0.0, ge=0)  # of the light's colour
    alpha_gradient: float = Field(1.0, ge=0, le=1)  # share of alpha's gradient that is used


STAGES = (
    Stage(until=0, alpha="zero", metallic="one"),
    Stage(until=120, metallic="one"),
    Stage(until=560, alpha_weight=0.08, light_weight=0.003),
    Stage(until=800, alpha_weight=0.08, light_weight=0.003, alpha_gradient=0.1),
)


class Config(MethodConfig):
    stages: tuple[Stage, ...] = Field(STAGES, min_length=1)  # the last one holds to the end
    materials: MaterialConfig = MaterialConfig()
    environment_height: int = Field(16, ge=2, le=32)  # rows of the map of light
    patch: int = Field(16, ge=WINDOW, le=256)  # side of the squares of pixels that a step looks at
    ssim_weight: float = Field(0.2, ge=0, le=1)
    normal_weight: float = Field(0.3, ge=0)
    normal_step: float = Field(0.06, gt=0)  # over which the density's gradient is taken, scene units
    mask: Literal["opacity", "one"] = "opacity"  # what alpha is pushed towards: the pictures' opacity, or 1

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        ends = [stage.until for stage in self.stages]
        if ends != sorted(ends):
            raise ValueError(f"stages end at steps {ends}; give them in order")
        return self

    def stage(self, step: int) -> Stage:
        """The stage that `step` belongs to."""
        return next((stage for stage in self.stages if step < stage.until), self.stages[-1])


class PRD(Method):
    paper = (
        "Ye et al. 2024, Progressive Radiance Distillation for Inverse Rendering with Gaussian Splatting, "
        "arXiv 2408.07595"
    )
    roles = ("field", "materials", "light")
    result = "materials"
    kind = "relightable"
    plan = "step"
    occupied: Tensor

    def __init__(self, config: Config, *, teacher: Scene, data: SceneSource) -> None:
        super().__init__()
        _check(teacher, data)
        self.config, self.data = config, data
        self.spec, self.num_steps = teacher.spec, teacher.num_steps
        self.teacher = teacher.field.requires_grad_(False)
        self.register_buffer("occupied", teacher.occupied.clone(), persistent=False)
        field = copy.deepcopy(teacher.field).requires_grad_(True)
        assert isinstance(field, RadianceField)
        self.field = field
        self.materials = MaterialField(config.materials, teacher.spec.bound)
        self.light = EnvironmentLight(config.environment_height)
        self.foreground = data.train.foreground()

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        stage, scene = self.config.stage(step), self.scene()
        rays, rgba = self.draw_patches(max(1, batch.size // self.config.patch**2))
        samples = scene.march(rays, torch.rand(len(rgba)).to(rgba.device))
        loss, figures = self.loss(scene.buffer(rays, samples, moving="field"), rays, rgba, stage)
        yield Update("field", loss, figures)

        buffer = scene.buffer(rays, samples, moving="materials")
        loss, _ = self.loss(buffer, rays, rgba, stage)
        normal = self.normal_loss(buffer, rays)
        yield Update("materials", loss + self.config.normal_weight * normal, {"normal_loss": normal.detach()})

        if stage.light == "free" and stage.alpha == "free":
            seen = GBuffer(*(part.detach() for part in buffer))
            loss, _ = self.loss(seen, rays, rgba, stage)
            yield Update("light", loss + stage.light_weight * self.light.whiteness())

    def loss(
        self, buffer: GBuffer, rays: Rays, rgba: Tensor, stage: Stage
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L_rgb and L_alpha of what the rays see against their pixels (R, 4), and figures of it.

        A pixel that is NaN, since a mask ignores it, is taken to be what is rendered there: nothing is learned from it.
        """
        known = rgba[:, 3].isfinite()
        buffer, background = self.staged(buffer, stage), rgba.new_tensor(self.spec.background)
        picture = self.scene().compose(buffer, rays.directions, background)
        target = torch.where(known[:, None], over(rgba[:, :3], rgba[:, 3:], background), picture.detach())
        rgb = photometric_loss(self.as_patches(picture), self.as_patches(target), self.config.ssim_weight)
        alpha = buffer.alpha * buffer.opacity
        mask = rgba[:, 3] if self.config.mask == "opacity" else torch.ones_like(alpha)
        loss = rgb + stage.alpha_weight * (torch.where(known, mask, alpha.detach()) - alpha).square().mean()
        shown = alpha.detach().sum() / buffer.opacity.detach().sum().clamp_min(1)
        return loss, {"rgb_loss": rgb.detach(), "alpha": shown}

    def staged(self, buffer: GBuffer, stage: Stage) -> GBuffer:
        """`buffer` with what the stage holds fixed."""
        alpha, metallic = buffer.alpha, buffer.metallic
        alpha = torch.lerp(alpha.detach(), alpha, stage.alpha_gradient)
        if stage.alpha == "zero":
            alpha = torch.zeros_like(alpha)
        if stage.metallic == "one":
            metallic = torch.ones_like(metallic)
        return buffer._replace(alpha=alpha, metallic=metallic)

    def normal_loss(self, buffer: GBuffer, rays: Rays) -> Tensor:
        """Mean of 1 - n.n_density over some rays that end on a surface, no gradient into the density (scalar)."""
        on_surface = (buffer.opacity.detach() > SURE).nonzero().squeeze(-1)
        if len(on_surface) == 0:
            return buffer.normal.sum() * 0
        on_surface = on_surface[torch.randperm(len(on_surface))[:NORMAL_RAYS].to(on_surface.device)]
        distance = buffer.distance.detach()[on_surface, None]
        positions = rays.origins[on_surface] + distance * rays.directions[on_surface]
        delta = step_length(self.spec.bound, self.num_steps)
        outward = density_normals(self.field, positions, self.config.normal_step, delta)
        return (1 - (outward * buffer.normal[on_surface]).sum(-1)).mean()

    def scene(self) -> RelightableScene:
        """The scene as it is now."""
        return RelightableScene(
            self.field,
            self.materials,
            self.light,
            occupied=self.occupied,
            spec=self.spec,
            num_steps=self.num_steps,
        )

    def draw_patches(self, count: int) -> tuple[Rays, Tensor]:
        """Rays and pixels (count * side^2, 4) of squares that contain a random pixel of the foreground.

        Pixels that a mask ignores are NaN.
        """
        views, side = self.data.train, self.side()
        height, width = views.images.shape[1:3]
        chosen = self.foreground[torch.randint(len(self.foreground), (count,))]
        view, inside = chosen // (height * width), chosen % (height * width)
        shift = torch.randint(side, (2, count))
        top = (inside // width - shift[0]).clamp(0, height - side)
        left = (inside % width - shift[1]).clamp(0, width - side)
        square = torch.arange(side)
        rows, columns = top[:, None, None] + square[:, None], left[:, None, None] + square
        places = (view[:, None, None] * height * width + rows * width + columns).reshape(-1)
        rays, rgba = views.take(places)
        rgba = torch.where(views.counts(places)[:, None], rgba, torch.nan)
        return Rays(*(part.to(self.device) for part in rays)), rgba.to(self.device)

    def side(self) -> int:
        """Side of a patch, in pixels."""
        height, width = self.data.train.images.shape[1:3]
        return min(self.config.patch, height, width)

    def as_patches(self, colours: Tensor) -> Tensor:
        """(P side^2, 3) as pictures (P, 3, side, side)."""
        return colours.reshape(-1, self.side(), self.side(), 3).permute(0, 3, 1, 2)

    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """PSNR of the scene and of the raw field; where the data knows them, relit PSNR and alpha by region."""
        test, scene = self.data.test, self.scene()
        taught = Scene(self.teacher, self.occupied, self.spec, self.num_steps)
        seen = [scene.render(test.camera(index)) for index in range(len(test))]
        raw = [render(taught, test.camera(index)).rgb for index in range(len(test))]
        figures = {
            "psnr": mean_psnr([picture for picture, _ in seen], test, self.spec.background),
            "raw_psnr": mean_psnr(raw, test, self.spec.background),
        }
        figures["psnr_gain"] = figures["psnr"] - figures["raw_psnr"]
        if isinstance(self.data, InverseScene):
            figures |= self.figures_of_truth(self.data, [buffer for _, buffer in seen])
        return figures

    def figures_of_truth(self, data: InverseScene, buffers: list[GBuffer]) -> dict[str, float]:
        """Relit PSNR under the data's new light, and the mean alpha where the model can and cannot explain the pixels.

        Only the product of light and albedo is seen, so the new light is given in the unit of the recovered one.
        """
        unit = exposure(self.light.radiance().detach(), data.environment.to(self.device))
        relit = self.scene().relight(data.new_environment.to(self.device) * unit)
        views = [relit.render(data.relit.camera(index))[0] for index in range(len(data.relit))]
        alpha = torch.cat([buffer.alpha for buffer in buffers]).cpu()
        opacity, share = torch.cat([buffer.opacity for buffer in buffers]).cpu(), data.unexplained.reshape(-1)
        return {
            "relit_psnr": mean_psnr(views, data.relit, self.spec.background),
            "alpha_inside": float(alpha[share > SURE].mean()),
            "alpha_outside": float(alpha[(share == 0) & (opacity > SURE)].mean()),
        }

    def published(self) -> Mapping[str, RelightableScene]:
        return {"scene": self.scene()}

    def references(self) -> Mapping[str, Scene]:
        return {"raw": Scene(self.teacher, self.occupied, self.spec, self.num_steps)}


def density_normals(field: RadianceField, positions: Tensor, step: float, delta: float) -> Tensor:
    """Unit normals (N, 3) at `positions` (N, 3), away from where the opacity over `delta` is; without gradient.

    n ~ -sum_k o(x + step u_k) u_k over directions u_k around. Opacity, since the log-density inside a solid, which no
    ray sees, is noise; many directions, since a hard edge along six would give the corners of a cube.
    """
    with torch.no_grad():
        around = even_directions(NORMAL_TAPS).to(positions)
        taps = (positions[:, None] + step * around).reshape(-1, 3)
        opacity = -torch.expm1(-field.log_density(taps).exp() * delta)
        return F.normalize(-opacity.reshape(-1, NORMAL_TAPS) @ around, dim=-1)


def even_directions(count: int) -> Tensor:
    """Unit vectors (count, 3), evenly on a golden-angle spiral, their sum taken out."""
    index = torch.arange(count, dtype=torch.float32)
    z, turn = 1 - (2 * index + 1) / count, math.radians(GOLDEN_ANGLE) * index
    aside = (1 - z.square()).sqrt()
    spiral = torch.stack([aside * turn.cos(), aside * turn.sin(), z], -1)
    return F.normalize(spiral - spiral.mean(0), dim=-1)


def exposure(recovered: Tensor, true: Tensor) -> Tensor:
    """Factor (3,) per colour that brings the light `true` nearest to the `recovered` one, maps of any two sizes."""
    height, width = recovered.shape[:2]
    true = F.adaptive_avg_pool2d(true.permute(2, 0, 1), (height, width)).permute(1, 2, 0).reshape(-1, 3)
    solid, recovered = texels(height)[1].to(recovered)[:, None], recovered.reshape(-1, 3)
    return (solid * recovered * true).sum(0) / (solid * true.square()).sum(0)


def mean_psnr(pictures: list[Tensor], views: PosedImages, background: tuple[float, float, float]) -> float:
    """Mean over views of the PSNR of `pictures` (H, W, 3) against them, laid over `background`."""
    judged = views.judged(pictures, background)
    return sum(psnr(*view) for view in judged) / len(judged)


def _check(teacher: Scene, data: SceneSource) -> None:
    if not isinstance(data, SceneSource):
        raise ConfigError(
            "prd needs posed images; set data.name to inverse_scene, capture or blender", field="data.name"
        )
    if not isinstance(teacher, Scene) or not isinstance(teacher.field, RadianceField):
        raise ConfigError(
            "prd needs a radiance field as teacher, of the same scene as the data; train one with radiance_field",
            field="teacher",
        )
    if min(data.train.images.shape[1:3]) < WINDOW:
        raise ConfigError(f"prd needs views of at least {WINDOW} pixels per side", field="data.size")
