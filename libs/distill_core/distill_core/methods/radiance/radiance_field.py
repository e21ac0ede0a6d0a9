"""Radiance field from posed images: the field whose volume renderings equal the pictures.

    C(r) = sum_i T_i alpha_i c_i + (1 - sum_i T_i alpha_i) background,   alpha_i = 1 - exp(-density_i delta)
    min E_r |C(r) - C_image(r)|^2,   T_i = exp(-sum_{j<i} density_j delta)

Rays are marched where the occupancy grid is set, as many as fit a budget of samples.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from statistics import fmean as mean
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from distill_core.data.posed import SceneSource
from distill_core.errors import ConfigError
from distill_core.files.paths import user_path
from distill_core.kinds.field.card import Evaluate
from distill_core.method import Batch, Method, MethodConfig, Update
from distill_core.metrics.image import depth_error, psnr, ssim
from distill_core.metrics.lpips import LPIPS
from distill_core.networks.fields import build_field
from distill_core.networks.fields.regularizers import RegularizerWeights, check_trainable, regularization
from distill_core.radiance.cameras.camera import Rays
from distill_core.radiance.rendering.march import fit_budget, march, step_length
from distill_core.radiance.rendering.occupancy import OccupancyGrid
from distill_core.radiance.rendering.quadrature import over
from distill_core.radiance.scenes.scene import Rendering, Scene, render, render_samples
from distill_core.recipe.tables import EvaluateConfig, NetworkConfig

log = logging.getLogger(__name__)


class Config(MethodConfig):
    max_samples: int = Field(
        8192, ge=64, le=2**22
    )  # field evaluations per micro-batch: 8 k on a CPU, 2^18 on a GPU
    num_steps: int = Field(96, ge=8, le=4096)  # samples along the box's diagonal
    foreground_share: float = Field(0.5, ge=0, le=1)  # of the rays; the rest from anywhere
    background: Literal["random", "scene"] = (
        "random"  # behind transparent pixels; random keeps the field honest
    )
    grid_resolution: int = Field(32, ge=4, le=256)
    grid_every: int = Field(16, ge=1)  # steps between looks at the occupancy
    grid_warmup: int = Field(256, ge=0)  # steps during which every cell is looked at
    regularizers: RegularizerWeights = RegularizerWeights()
    compile: bool = False  # the field by torch.compile in training; pays on a GPU and in long runs


def pixel_loss(rendered: Tensor, rgba: Tensor, background: Tensor) -> Tensor:
    """Mean squared error of rays (R, 5) against pixels (R, 4), both laid over `background` (R, 3)."""
    predicted = over(rendered[:, :3], rendered[:, 4:], background)
    return (predicted - over(rgba[:, :3], rgba[:, 3:], background)).square().mean()


class RadianceFieldFromImages(Method):
    paper = (
        "Mildenhall et al. 2020, NeRF, arXiv 2003.08934; "
        "Müller et al. 2022, Instant Neural Graphics Primitives, arXiv 2201.05989"
    )
    roles = ("field",)
    result = kind = "field"
    plan = "step"

    def __init__(self, config: Config, *, network: NetworkConfig, data: SceneSource) -> None:
        super().__init__()
        if not isinstance(data, SceneSource):
            raise ConfigError(
                "radiance_field needs posed images; set data.name to capture, blender or procedural_scene",
                field="data.name",
            )
        self.config, self.data = config, data
        self.spec = data.spec.model_copy(update={"field": network.name})
        self.field = build_field(network, self.spec.bound)
        check_trainable(self.field, config.regularizers)
        if config.compile:
            self.field.compile(dynamic=True)  # the number of samples differs from step to step
        delta = step_length(self.spec.bound, config.num_steps)
        self.grid = OccupancyGrid(config.grid_resolution, self.spec.bound, delta)
        self.foreground = data.train.foreground()
        self.random_background = config.background == "random" and data.train.transparent

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        if step % self.config.grid_every == 0:
            self.grid.update(self.field.log_density, every_cell=step < self.config.grid_warmup)
        rays, rgba = self.draw_rays(batch.size)
        offset = torch.rand(len(rgba)).to(rgba.device)
        marched = march(
            rays,
            bound=self.spec.bound,
            num_steps=self.config.num_steps,
            occupied=self.grid.occupied,
            offset=offset,
        )
        samples = fit_budget(marched, self.config.max_samples)
        used = samples.num_rays
        loss = pixel_loss(render_samples(self.field, rays, samples), rgba[:used], self.draw_background(used))
        figures: dict[str, float | Tensor] = {
            "psnr": -10 * loss.detach().log10(),
            "rays": used,
            "occupancy": self.grid.occupied.float().mean(),
        }
        yield Update("field", loss + regularization(self.field, self.config.regularizers), figures)

    def draw_rays(self, count: int) -> tuple[Rays, Tensor]:
        """Rays and their pixels (R, 4), a share of them from the foreground, in random order."""
        views = self.data.train
        pixels = views.draw(count)
        chosen = self.foreground[torch.randint(len(self.foreground), (count,))]
        pixels = torch.where(torch.rand(count) < self.config.foreground_share, chosen, pixels)
        rays, rgba = views.take(pixels)
        return Rays(*(part.to(self.device) for part in rays)), rgba.to(self.device)

    def draw_background(self, count: int) -> Tensor:
        """Colours (R, 3) behind the rays."""
        if self.random_background:
            return torch.rand(count, 3).to(self.device)
        return torch.tensor(self.spec.background, device=self.device).expand(count, 3)

    def state(self) -> dict[str, Tensor]:
        return dict(self.grid.state_dict())

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.grid.load_state_dict(state)

    def scene(self) -> Scene:
        """The field as it is now."""
        return Scene(self.field, self.grid.occupied, self.spec, self.config.num_steps)

    def render_test(self, index: int) -> Rendering:
        """The held-out view `index` as the field sees it."""
        return render(self.scene(), self.data.test.camera(index))

    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """Means over the held-out views, on the scene's background: PSNR, SSIM (Gaussian window), maybe more.

        `depth_error` (scene units) where the data knows the truth, LPIPS where `config.lpips` names its weights.
        """
        assert isinstance(config, Evaluate)  # that of the kind
        test = self.data.test
        renderings = [self.render_test(index) for index in range(len(test))]
        judged = test.judged([one.rgb for one in renderings], self.spec.background)
        figures = {
            "psnr": mean(psnr(*view) for view in judged),
            "ssim": mean(ssim(*view) for view in judged),
            "test_views": float(len(judged)),
        }
        if test.distance is not None:
            covered = test.images[..., 3] == 1
            figures["depth_error"] = mean(
                depth_error(one.depth.cpu().numpy(), truth.numpy(), full.numpy())
                for one, truth, full in zip(renderings, test.distance, covered)
                if full.any()
            )
        if config.lpips is None:
            log.info("LPIPS is not available: evaluate.lpips names no folder with its weights")
            return figures
        lpips = LPIPS(user_path(config.lpips))
        return figures | {
            lpips.name: mean(
                lpips(torch.from_numpy(view.picture), torch.from_numpy(view.truth)) for view in judged
            )
        }

    def published(self) -> Mapping[str, Scene]:
        return {"field": self.scene()}
