"""Tables of a recipe: models, networks, adapters, optimisers, stages, evaluation, publication."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from distill_core.config import (
    ArtifactRef,
    Beta,
    Config,
    DataPath,
    DataTable,
    Name,
    NetworkArgs,
    RecipeName,
    Seed,
    Words,
    is_reserved_alias,
)


class ModelSource(Config):
    """Source of a frozen model: one of a store artifact, a folder, a recipe that trains it, a formula."""

    artifact: ArtifactRef | None = None  # name@version or name@alias in the artifact store
    path: DataPath | None = None  # a diffusers folder or an artifact folder on disk
    recipe: RecipeName | None = None  # trained once, then cached under the recipe's content
    scene: Literal["procedural", "alcove"] | None = None  # a radiance field in closed form, without training

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(value is not None for value in (self.artifact, self.path, self.recipe, self.scene)) != 1:
            raise ValueError("give exactly one of artifact, path, recipe, scene")
        return self


class AdapterTerm(Config):
    """An adapter that is added to a model, times `scale`."""

    ref: ArtifactRef  # name@version or name@alias in the artifact store
    scale: float = 1.0  # factor of what it adds


class TeacherSource(ModelSource):
    """Source of a teacher: a model, and for a denoiser the adapters that are added to it."""

    adapters: tuple[AdapterTerm, ...] | None = None  # LoRA of the store, over this model

    @model_validator(mode="after")
    def _has_weights(self) -> Self:
        if self.adapters is not None and self.scene is not None:
            raise ValueError("a scene has no weights that adapters could be added to; leave adapters out")
        return self


class NetworkConfig(Config):
    """A network built from scratch: a class that `networks` knows, and that class's own arguments."""

    name: Words
    args: NetworkArgs = {}


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class LoraConfig(Config):
    """Size and place of the low-rank factors; their product is scaled by alpha / rank."""

    rank: int = Field(64, ge=1, le=4096)
    alpha: float = Field(64.0, gt=0)
    targets: Literal["all-linear"] | tuple[Words, ...] = ATTENTION  # ends of layer names, as in peft

    @property
    def layers(self) -> tuple[str, ...] | None:
        """The layers' names; None is every linear layer."""
        return None if self.targets == "all-linear" else self.targets


class StudentConfig(Config):
    """Initial student; with nothing set, a trainable copy of the teacher."""

    artifact: ArtifactRef | None = None  # begin as this student instead of the teacher: a store artifact,
    path: DataPath | None = None  # a folder,
    recipe: RecipeName | None = None  # or what a recipe trained, once, then cached
    network: NetworkConfig | None = None  # a new network instead, of another size; begins random
    lora: LoraConfig | None = None  # train low-rank factors over what it begins as, whose weights stay
    gradient_checkpointing: bool = False  # less memory for about a third more time; results are the same

    @model_validator(mode="after")
    def _one_beginning(self) -> Self:
        given = [self.artifact, self.path, self.recipe, self.network]
        if sum(value is not None for value in given) > 1:
            raise ValueError("give at most one of artifact, path, recipe, network")
        if self.network is not None and self.lora is not None:
            raise ValueError(
                "lora needs a trained network to adapt, and network begins random: leave one out"
            )
        return self

    @property
    def source(self) -> ModelSource | None:
        """The model it begins as, if that is not the teacher."""
        if self.artifact is None and self.path is None and self.recipe is None:
            return None
        return ModelSource(artifact=self.artifact, path=self.path, recipe=self.recipe)


class PairsConfig(Config):
    """Noise and what the teacher's own sampler makes of it; made once, then cached."""

    count: int = Field(2048, ge=1, le=10_000_000)
    num_steps: int | None = Field(None, ge=1, le=1000)  # unset: the teacher's own
    guidance: float | None = None  # unset: the teacher's own
    seed: Seed = 0
    batch_size: int = Field(128, ge=1, le=4096)
    max_gib: float = Field(64.0, gt=0)  # on disk; more is refused before the first pair is made


class ParameterGroup(Config):
    """Parameters by pattern, with what is different for them; of several patterns the first that fits counts."""

    match: Words  # of parameter names, as in a shell: "head.*", "*.bias"
    lr_scale: float = Field(1.0, ge=0)
    weight_decay: float | None = Field(None, ge=0)  # unset: that of the optimiser


class OptimConfig(Config):
    """One role's optimiser. The learning rate is a function of the step alone, so resuming needs no scheduler state."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = Field(1e-4, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    momentum: float | None = Field(None, ge=0, lt=1)  # of sgd; unset: the first of betas
    nesterov: bool = False  # of sgd
    decay: Literal["constant", "cosine", "exponential", "milestones"] = "constant"
    milestones: tuple[float, ...] = ()  # shares of the steps at which lr is multiplied by `gamma`
    gamma: float = Field(0.1, gt=0, le=1)
    groups: tuple[ParameterGroup, ...] = ()  # parameters that differ in lr or weight decay
    final_lr_ratio: float = Field(0.0, ge=0, le=1)  # lr at the last step / lr, for cosine and exponential
    grad_clip: float | None = Field(None, gt=0)  # norm

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.name != "sgd" and (self.momentum is not None or self.nesterov):
            raise ValueError(f"{self.name} takes betas; momentum and nesterov belong to name = 'sgd'")
        if (self.decay == "milestones") != bool(self.milestones):
            raise ValueError("decay = 'milestones' goes with milestones, e.g. [0.5, 0.75]")
        if list(self.milestones) != sorted(self.milestones) or not all(0 < at < 1 for at in self.milestones):
            raise ValueError("milestones are shares of the steps, ascending, above 0 and below 1")
        return self


class StageConfig(Config):
    """Optimisers of one stage of a run; with a table of its own a stage begins its learning-rate schedule anew."""

    optim: dict[str, OptimConfig] = {}


class EvaluateConfig(Config):
    """Evaluation of a run's result; the kind of the result adds the models that measure."""

    data: DataTable | None = None  # what to compare with; unset: the data of the training
    num_samples: int = Field(1797, ge=2, le=100_000)
    batch_size: int = Field(128, ge=1, le=4096)
    seed: Seed = 0

    @property
    def sources(self) -> dict[str, ModelSource]:
        """The models that measure, by key."""
        return {}


class PublishConfig(Config):
    name: Name
    licence: Words = ""  # of the model; unset: nobody has chosen one
    alias: Name | None = None
    form: Literal["merged", "adapter"] = "merged"  # of a LoRA student; adapter: without its base's weights

    @field_validator("alias")
    @classmethod
    def _free(cls, alias: str | None) -> str | None:
        if alias is not None and is_reserved_alias(alias):  # said before the training, not after it
            raise ValueError(f"alias {alias!r} is reserved; choose another name, e.g. 'prod'")
        return alias


class ReplacedTeacher(Config):
    """Whom a recipe was written for, where overrides name another teacher."""

    recipe: RecipeName  # that trains the former teacher
    given: tuple[Words, ...] = ()  # keys that were set since: they are meant for the new one
