"""StableMaterials' semi-supervised training: a generator of material maps learns kinds that only pictures show.

    L   = L_diffusion(annotated maps) + lambda softplus(-D(P(x0_hat) + sigma eps, sigma, c))
    L_D = softplus(D(P(x0_hat) + sigma eps, sigma, c)) + softplus(-D(picture + sigma eps, sigma, c))

P keeps the channels that an un-annotated picture has too (the basecolor); how the other maps follow from these is what
the annotated ones teach. x0_hat is the student's own prediction, for the conditions of the pictures, at a random level
of its few-step sampling from noise: it ends as a generator of as many steps. With lambda = 0 it is flow matching.
A tileable student samples on a torus, in x0_hat too; the diffusion loss pads with zeros, since its pictures end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

import torch
from pydantic import Field, field_validator
from torch import Tensor

from distill_core.config import DataTable
from distill_core.data import Source, build_source
from distill_core.data.classes import use_classes_of
from distill_core.errors import ConfigError, DataError
from distill_core.losses.adversarial import discriminator_loss, generator_loss
from distill_core.losses.denoising import add_noise
from distill_core.method import Batch, Cond, Method, Update
from distill_core.methods.pretrain._flow_matching_loss import FlowConfig, flow_matching_loss
from distill_core.metrics.texture import seam_ratio, texture_distance
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.discriminator import NoisyDiscriminator
from distill_core.networks.generation import generate
from distill_core.networks.levels import Levels, descending, few_step_sampler, student_levels
from distill_core.networks.tileable import TiledDenoiser, Tiling, make_tileable, untiled
from distill_core.recipe.tables import EvaluateConfig

NUM_LEVELS = 4  # of a student whose recipe does not say them


class Config(FlowConfig):
    unannotated: DataTable = {}  # what to change in [data] to get pictures without maps, e.g. kind = "rgb"
    gan_weight: float = Field(0.1, ge=0)  # lambda; the paper's is not published
    levels: Levels = ()  # where x0_hat is predicted and sampled; data std, descending; () = four from the start on
    log_sigma_mean: float = -1.2  # noise on the discriminator's input, log-normal
    log_sigma_std: float = Field(1.2, gt=0)
    width: int = Field(32, ge=8, le=1024, multiple_of=8)  # of the discriminator's first layer
    tileable: bool = False  # the student's pictures repeat without a seam: its convolutions wrap around
    rolling: Tiling = Tiling(amplitude=256, plain_share=0.25)  # published; how `rolled_*` figures sample

    _descending = field_validator("levels")(descending)


class StableMaterialsGAN(Method):
    paper = (
        "Vecchio 2024, StableMaterials: Enhancing Diversity in Material Generation via Semi-Supervised Learning, "
        "arXiv 2406.09293"
    )
    roles = ("discriminator", "student")

    def __init__(self, config: Config, *, student: Denoiser, data: Source) -> None:
        super().__init__()
        self.config, self.student = config, student
        self.pictures = _pictures(config, student, data)
        assert self.pictures.shape is not None
        channels, size, _ = self.pictures.shape
        self.discriminator = NoisyDiscriminator(
            channels, size, num_classes=self.pictures.num_classes, width=config.width
        )
        self.levels = student_levels(student, config.levels, count=NUM_LEVELS, whose="student")
        student.sampler = few_step_sampler(student, self.levels)
        if config.tileable:
            make_tileable(student)

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return {"x0": "the diffusion loss"}

    @cached_property
    def bordered(self) -> Denoiser:
        """The student's weights with zeros around the picture; made when they have found their device."""
        return untiled(self.student) if self.config.tileable else self.student

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        diffusion = flow_matching_loss(self.bordered, batch, self.config)
        if not self.config.gan_weight:
            yield Update("student", diffusion)
            return
        real = self.draw_pictures(batch.size)
        x0 = real.columns["x0"]
        fake = self.generate(real.cond, real.size)[:, : x0.shape[1]]
        fake_logits, real_logits = self.logits(torch.cat([fake.detach(), x0]), real.cond).chunk(2)
        yield Update("discriminator", discriminator_loss(real_logits, fake_logits))

        adversarial = generator_loss(self.logits(fake, real.cond))
        yield Update(
            "student",
            diffusion + self.config.gan_weight * adversarial,
            {"diffusion": diffusion.detach(), "adversarial": adversarial.detach()},
        )

    def draw_pictures(self, count: int) -> Batch:
        """Un-annotated pictures and their conditions, at random."""
        return self.pictures.items(torch.randint(self.pictures.size, (count,))).to(self.device)

    def logits(self, x0: Tensor, cond: Cond) -> Tensor:
        """The discriminator's, of freshly noised pictures; conditions are repeated to as many."""
        normal = torch.randn(len(x0), device=x0.device)
        sigma = (self.config.log_sigma_mean + self.config.log_sigma_std * normal).exp()
        cond = {name: value.repeat(len(x0) // len(value)) for name, value in cond.items()}
        logits: Tensor = self.discriminator(add_noise(x0, sigma), sigma, cond)
        return logits

    def generate(self, cond: Cond, count: int) -> Tensor:
        """x0_hat (B, C, H, W) at a random level, its input simulated by the student; only the last call is trained."""
        image, levels = self.student.image, self.levels
        x = torch.randn(count, image.channels, image.height, image.width, device=self.device)
        x = x * self.student.sampler.noise_scale
        chosen = int(torch.randint(len(levels), ()))
        with torch.no_grad():
            for level, following in zip(levels[:chosen], levels[1 : chosen + 1]):
                x0 = self.student(x, x.new_full((count,), level), cond)
                x = add_noise(x0, x.new_full((count,), following))
        x0_hat: Tensor = self.student(x, x.new_full((count,), levels[chosen]), cond)
        return x0_hat

    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """Seams, and the distance to the un-annotated pictures, of the channels that these have.

        Of a tileable student also as `plain_*`, with zeros around, and as `rolled_*`, the plain one by `rolling`.
        """
        real, ways = self.pictures.all(config.num_samples), {"": self.student}
        x0 = real.columns["x0"]
        if self.config.tileable:
            rolled = TiledDenoiser(self.bordered, self.config.rolling)
            ways |= {"plain_": self.bordered, "rolled_": rolled}
        figures = {}
        for prefix, denoiser in ways.items():
            made = generate(denoiser, real.cond, real.size, seed=config.seed, batch_size=config.batch_size)
            made = made[:, : x0.shape[1]]
            figures[prefix + "seam_ratio"] = seam_ratio(made)
            figures[prefix + "texture_distance"] = texture_distance(made, x0)
        return figures


def _pictures(config: Config, student: Denoiser, data: Source) -> Source:
    """The un-annotated set.

    Raises:
        ConfigError: nothing says what it is, or the student cannot learn from it.
        DataError: pictures of another size than the maps, with more channels, or of other classes.
    """
    if config.gan_weight and not config.unannotated:
        raise ConfigError(
            "nothing says what un-annotated pictures are: set config.unannotated to what differs from [data]",
            field="config.unannotated",
        )
    image = student.image
    if data.shape is None or tuple(data.shape) != (image.channels, image.height, image.width):
        raise ConfigError(
            "the student makes latents; un-annotated pictures need one that makes the maps themselves"
        )
    if student.cond.kind == "prompt":
        raise ConfigError("un-annotated pictures come with class labels or none; this student takes prompts")
    same = {} if "name" in config.unannotated else data.config.model_dump(exclude_none=True)
    pictures = build_source({**same, **config.unannotated})
    shape = pictures.shape
    if shape is None or shape[1:] != data.shape[1:] or shape[0] > data.shape[0]:
        raise DataError(
            f"un-annotated pictures are {shape}, the maps {data.shape}: they may have fewer channels, "
            "but must be of the same size",
            field="config.unannotated",
        )
    if pictures.class_names != data.class_names and student.cond.class_names:
        use_classes_of(pictures, student.cond)
    if pictures.class_names != data.class_names:
        raise DataError(
            f"un-annotated pictures are of the classes {list(pictures.class_names)}, the maps of "
            f"{list(data.class_names)}; both need the same, though either may have no item of some",
            field="config.unannotated",
        )
    return pictures
