"""ED-NeRF: a scene in a diffusion model's latent space, then edited by words through the delta denoising score.

    1  Z_i = E(I_i);   min |Zhat_i - Z_i|^2 + w |F(Zhat_i) - Z_i|^2,     Zhat = the field's rays through latent pixels
    2  z = F(Zhat), s = F(Zhat of the unedited field) at one pose; one noise e, one level for both
       g = M (eps(z_sigma, y_target) - eps(s_sigma, y_source)),          min <g, z> + w_keep |(1 - M)(z - s)|^2

F is the refinement head (networks/refinement.py), for what the encoder mixes between neighbours. The mask M is that of
a box in the scene, or 1 everywhere; eps are under classifier-free guidance (losses/score_distillation.py). What the
paper leaves open is chosen so: in phase 2 the field is trained and F is not; s is a rendering, not the stored latent,
so that equal words change nothing; levels are uniform on the schedule's grid; w acts in the second half of phase 1.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill_core.config import Words
from distill_core.data.coloured_objects import ColouredObjectScene
from distill_core.data.posed import SceneSource
from distill_core.errors import ConfigError, nearest
from distill_core.losses.matching import surrogate_loss
from distill_core.losses.score_distillation import Predict, Source, score_direction
from distill_core.method import Batch, Cond, Method, MethodConfig, Stage, Update
from distill_core.metrics.editing import background_psnr, colour_moved
from distill_core.metrics.image import psnr
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.fake_tensors import real_tensors
from distill_core.networks.fields import build_field
from distill_core.networks.refinement import RefinementConfig, RefinementHead
from distill_core.radiance.analytic.coloured import COLOURS
from distill_core.radiance.cameras.camera import Rays
from distill_core.radiance.rendering.march import step_length
from distill_core.radiance.rendering.occupancy import OccupancyGrid
from distill_core.radiance.rendering.quadrature import over
from distill_core.radiance.scenes.latent import Box, LatentScene, latent_rays
from distill_core.recipe.tables import EvaluateConfig, NetworkConfig

ENCODED = 8  # pictures at once


class Config(MethodConfig):
    source: Words  # what the scene shows: a prompt, or the name of one of the teacher's classes
    target: Words  # what it is to show
    reconstruct_steps: int = Field(500, ge=1)  # of phase 1
    refinement: bool = True  # False: no head
    refinement_weight: float = Field(1.0, ge=0)  # of its loss beside the rays'
    head: RefinementConfig = RefinementConfig()
    gradient: Literal["dds", "sds"] = "dds"  # sds: without the source's term
    guidance: float = 7.5
    min_level: float = Field(0.05, ge=0, lt=1)  # range on the schedule's own grid of levels
    max_level: float = Field(0.95, gt=0, le=1)
    box: Box | None = None  # what may change, in scene units; unset: everything
    keep_weight: float = Field(1.0, ge=0)  # of what is outside the box
    num_steps: int = Field(64, ge=8, le=4096)  # samples along the box's diagonal
    grid_resolution: int = Field(24, ge=4, le=256)
    grid_every: int = Field(16, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_level >= self.max_level:
            raise ValueError("min_level must be below max_level")
        if self.box and any(low >= high for low, high in zip(self.box[:3], self.box[3:])):
            raise ValueError("box is the least x, y, z and then the greatest; each least must be below")
        return self


class EDNeRF(Method):
    paper = "Park et al. 2024, ED-NeRF: Efficient Text-Guided Editing of 3D Scene, arXiv 2310.02712"
    roles = ("field", "head")
    result = "field"
    kind = "latent_field"
    plan = "step"
    background: Tensor
    latents: Tensor
    origins: Tensor
    directions: Tensor

    def __init__(
        self, config: Config, *, teacher: Denoiser, network: NetworkConfig, data: SceneSource
    ) -> None:
        super().__init__()
        _check(teacher, data)
        self.config, self.teacher, self.data = config, teacher, data
        self.spec = data.spec.model_copy(update={"field": network.name})
        self.words = {name: condition(teacher, getattr(config, name), name) for name in ("source", "target")}
        size = teacher.image.channels, teacher.image.height, teacher.image.width
        args = {**network.args, "channels": size[0], "output": "linear"}
        self.field = build_field(NetworkConfig(name=network.name, args=args), self.spec.bound)
        self.head = RefinementHead(config.head, size[0])
        self.grid = OccupancyGrid(
            config.grid_resolution, self.spec.bound, step_length(self.spec.bound, config.num_steps)
        )
        background = torch.tensor(self.spec.background)
        plain = background.expand(1, *data.train.images.shape[1:3], 3)
        self.register_buffer("background", self.encode(plain)[0])
        views = over(data.train.images[..., :3], data.train.images[..., 3:], background)
        self.register_buffer("latents", torch.cat([self.encode(part) for part in views.split(ENCODED)]))
        with real_tensors():  # of data, not of a network
            cameras = [data.train.camera(index) for index in range(len(data.train))]
            rays = latent_rays(cameras, size)
        for name, part in zip(("origins", "directions"), rays):
            self.register_buffer(name, part.unflatten(0, (len(cameras), -1)), persistent=False)
        self.unedited: list[LatentScene] = []  # outside the module tree: it is never trained

    @classmethod
    def stages(cls, config: Config, steps: int) -> tuple[Stage, ...]:
        edit = Stage("edit", max(steps - config.reconstruct_steps, 1), ("field",))
        return Stage("reconstruct", config.reconstruct_steps, ("field", "head")), edit

    def enter(self, stage: Stage, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        if shapes is None:  # else the checkpoint has it
            self.keep_unedited()

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        if step % self.config.grid_every == 0:
            self.grid.update(self.field.log_density, every_cell=step < self.config.reconstruct_steps)
        views = torch.randint(len(self.data.train), (batch.size,))
        yield from self.reconstruction(views, step) if not self.unedited else self.edit(views)

    def reconstruction(self, views: Tensor, step: int) -> Iterator[Update]:
        """Phase 1 at the training views with these indices (B,)."""
        rendered, target = self.rendered(views), self.latents[views.to(self.device)]
        loss = (rendered - target).square().mean()
        figures = {"ray_loss": loss.detach()}
        if self.config.refinement and step >= self.config.reconstruct_steps // 2:
            refined = (self.head(rendered) - target).square().mean()
            loss = loss + self.config.refinement_weight * refined
        yield Update("field", loss, figures)
        if self.config.refinement:
            refined = (self.head(rendered.detach()) - target).square().mean()
            yield Update("head", refined, {"refined_loss": refined.detach()})

    def edit(self, views: Tensor) -> Iterator[Update]:
        """Phase 2 at the poses of the training views with these indices (B,)."""
        scene, unedited = self.scene(), self.unedited[0]
        rays = self.rays(views)
        offset = torch.rand(len(rays.origins)).to(self.device)
        with torch.no_grad():
            samples = unedited.march(rays, offset)
            source = unedited.head(unedited.render(rays, samples))
        mask = (
            torch.ones_like(source)
            if self.config.box is None
            else unedited.inside(self.config.box, rays, samples)
        )
        z = scene.head(scene.render(rays, scene.march(rays, offset)))
        direction = mask * self.direction(z.detach(), source)
        kept = ((1 - mask) * (z - source)).square().mean()
        loss = surrogate_loss(z, direction) + self.config.keep_weight * kept
        change = (z.detach() - source).square().mean().sqrt()
        yield Update("field", loss, {"direction": direction.abs().mean(), "latent_change": change})

    def direction(self, z: Tensor, source: Tensor) -> Tensor:
        """G (B, C, h, w) at a level and a noise drawn for each view."""
        low, high = self.config.min_level, self.config.max_level
        u = torch.rand(len(z)).to(z.device)
        sigma, noise = self.teacher.schedule.sigma_at(low + (high - low) * u), torch.randn_like(z)
        against = Source(source, self.predictor("source")) if self.config.gradient == "dds" else None
        return score_direction(z, self.predictor("target"), sigma, noise, against)

    def predictor(self, words: Literal["source", "target"]) -> Predict:
        """The teacher under the source's or the target's words: (x_sigma, sigma) -> x0."""

        def predict(x_sigma: Tensor, sigma: Tensor) -> Tensor:
            cond = {
                name: value.to(x_sigma.device).expand(len(x_sigma), *value.shape[1:])
                for name, value in self.words[words].items()
            }
            return self.teacher.guided(x_sigma, sigma, cond, self.config.guidance)

        return predict

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Latents (B, C, h, w) of pictures (B, H, W, 3) in [0, 1]."""
        return self.teacher.encode(pictures.permute(0, 3, 1, 2) * 2 - 1)

    def rays(self, views: Tensor) -> Rays:
        """Rays (B h w) through the latent pixels of training views."""
        chosen = views.to(self.device)
        return Rays(self.origins[chosen].flatten(0, 1), self.directions[chosen].flatten(0, 1))

    def rendered(self, views: Tensor) -> Tensor:
        """Zhat (B, C, h, w) at training views, at jittered samples."""
        scene, rays = self.scene(), self.rays(views)
        return scene.render(rays, scene.march(rays, torch.rand(len(rays.origins)).to(self.device)))

    def scene(self) -> LatentScene:
        """The latent scene as it is now."""
        return LatentScene(
            self.field,
            self.head,
            occupied=self.grid.occupied,
            background=self.background,
            spec=self.spec,
            num_steps=self.config.num_steps,
        )

    def keep_unedited(self) -> None:
        """Take the scene as it is for the source of the edit."""
        self.unedited = [copy.deepcopy(self.scene()).requires_grad_(False)]

    def state(self) -> dict[str, Tensor]:
        kept = {f"grid.{name}": value for name, value in self.grid.state_dict().items()}
        for scene in self.unedited:
            kept |= {f"unedited.{name}": value for name, value in scene.state_dict().items()}
        return kept

    def load_state(self, state: dict[str, Tensor]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"grid": {}, "unedited": {}}
        for name, value in state.items():
            owner, _, key = name.partition(".")
            parts[owner][key] = value
        self.grid.load_state_dict(parts["grid"])
        if parts["unedited"]:
            self.keep_unedited()
            self.unedited[0].load_state_dict(parts["unedited"])

    def pictures(self, scene: LatentScene) -> list[Tensor]:
        """The held-out views (H, W, 3) in [0, 1], decoded."""
        views = range(len(self.data.test))
        return [scene.picture(self.data.test.camera(index), self.teacher.decode).cpu() for index in views]

    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """Decoded PSNR of the unedited scene on held-out views; how much the edit changed, and where, if known."""
        test = self.data.test
        after = torch.stack(self.pictures(self.scene()))
        before = torch.stack(self.pictures(self.unedited[0])) if self.unedited else after
        truth = over(test.images[..., :3], test.images[..., 3:], torch.tensor(self.spec.background))
        decoded = [psnr(one.numpy(), other.numpy()) for one, other in zip(before, truth)]
        figures = {
            "decoded_psnr": sum(decoded) / len(decoded),
            "change": float((after - before).square().mean().sqrt()),
        }
        if isinstance(self.data, ColouredObjectScene) and self.config.target in COLOURS:
            target, shown = self.data.test_in(self.config.target), self.data.shown
            figures["colour_moved"] = colour_moved(before, after, target, shown)
            figures["background_psnr"] = background_psnr(before, after, shown)
        return figures

    def published(self) -> Mapping[str, LatentScene]:
        return {"field": self.scene().decoded_by(self.teacher)}


def condition(teacher: Denoiser, words: str, key: str) -> Cond:
    """The teacher's condition for `words`, of one item: an encoded prompt, or the label of the class of that name."""
    if teacher.cond.kind == "prompt":
        return teacher.encode_prompts([words])
    names = teacher.cond.class_names
    if words not in names:
        raise ConfigError(
            f"config.{key} = {words!r} is no class of the teacher{nearest(words, names)}",
            field=f"config.{key}",
        )
    return {"class_label": torch.tensor([names.index(words)])}


def _check(teacher: Denoiser, data: SceneSource) -> None:
    if not isinstance(data, SceneSource):
        raise ConfigError(
            "ed_nerf needs posed images; set data.name to capture, blender or coloured_scene",
            field="data.name",
        )
    seen, made = tuple(data.train.images.shape[1:3]), teacher.image.picture[1:]
    if seen != made:
        raise ConfigError(
            f"the views have {seen[1]} x {seen[0]} pixels, the teacher makes {made[1]} x {made[0]}; "
            "scale the capture to that",
            field="data",
        )
    if data.train.known is not None or data.test.known is not None:
        raise ConfigError(
            "ed_nerf encodes whole views, and masks of this capture ignore pixels; give views without masks, such as "
            "renders of a field that was trained with them",
            field="data",
        )
    if teacher.cond.kind == "none":
        raise ConfigError(
            "ed_nerf needs a teacher told by words or classes; this one takes none", field="teacher"
        )
