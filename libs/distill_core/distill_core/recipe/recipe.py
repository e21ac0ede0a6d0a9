"""The recipe: the TOML file that says everything about a training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import (
    Field,
    model_validator,
)

from distill_core.config import (
    Config,
    DataTable,
    Seed,
    TableMark,
    Words,
)
from distill_core.recipe.claims import CheckConfig
from distill_core.recipe.overrides import changed, dotted, without_none
from distill_core.recipe.published_models import PublishedModel
from distill_core.recipe.tables import (
    ModelSource,
    NetworkConfig,
    OptimConfig,
    PairsConfig,
    PublishConfig,
    ReplacedTeacher,
    StageConfig,
    StudentConfig,
    TeacherSource,
)


class Recipe(Config):
    """Everything that decides a run's result. Data only: it travels through the queue and executes nothing."""

    method: Words
    title: Words = ""
    for_model: PublishedModel | None = None  # whose published settings these are; the teacher is one of yours
    seed: Seed = 0
    steps: int = Field(ge=1, le=100_000_000)
    batch_size: int = Field(
        64, ge=1, le=1_000_000
    )  # items of one update, over all micro-batches and processes
    accumulate: int = Field(1, ge=1, le=4096)  # micro-batches per update
    # auto: begin at `accumulate`, and double it while a step does not fit into memory
    micro_batch: Literal["auto"] | None = None
    processes: int | None = Field(None, ge=1, le=64)  # of one job, a GPU each where there are any; unset: one
    # fsdp: each process holds a share of the trained networks, of their optimiser state and EMA; unset: all of them
    sharding: Literal["fsdp"] | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    threads: int | None = Field(None, ge=1, le=1024)  # torch CPU threads; unset: torch's own choice
    # batches that are read and decoded ahead, by a thread each, 0 for none; no result depends on it
    prefetch: int = Field(2, ge=0, le=64)
    log_every: int = Field(20, ge=1)
    sample_every: int = Field(500, ge=1)
    checkpoint_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    config: Annotated[dict[str, Any], TableMark("method")] = {}
    data: DataTable | None = None  # `[data.NAME]` within it are further data sets
    teacher: TeacherSource | None = None
    teachers: dict[str, TeacherSource] = {}  # further ones, by the names that the method gives them
    student: StudentConfig = StudentConfig()
    pairs: PairsConfig | None = None
    extractor: ModelSource | None = None  # frozen; what a loss or a reward reads pictures with
    network: NetworkConfig | None = None
    optim: dict[str, OptimConfig] = {}
    stages: dict[str, StageConfig] = {}  # by the names that the method gives its stages
    ema: dict[str, Annotated[float, Field(ge=0, lt=1)]] = {}
    # the result's kind says which keys; see `kinds/*/card.py`
    evaluate: Annotated[dict[str, Any], TableMark("evaluate")] = {}
    check: CheckConfig | None = None
    publish: PublishConfig | None = None
    replaced: ReplacedTeacher | None = None  # written by overrides that name another teacher

    @model_validator(mode="after")
    def _batch_is_shared_out(self) -> Self:
        if self.batch_size % (self.processes or 1):
            raise ValueError(
                f"batch_size = {self.batch_size} is not divisible by processes = {self.processes}"
            )
        return self

    @model_validator(mode="after")
    def _sharding_fits(self) -> Self:
        if self.sharding is None:
            return self
        if (self.processes or 1) == 1:
            raise ValueError("sharding = 'fsdp' divides networks among processes; set processes to 2 or more")
        if self.micro_batch == "auto":
            raise ValueError(
                "micro_batch = 'auto' tries steps that a process takes alone, which sharding = 'fsdp' has not; "
                "set accumulate instead"
            )
        if self.precision == "fp16":
            raise ValueError("sharding = 'fsdp' goes with precision = 'fp32' or 'bf16', not with 'fp16'")
        return self

    @model_validator(mode="after")
    def _base_is_published(self) -> Self:
        if self.publish is None or self.publish.form == "merged":
            return self
        if self.student.lora is None:
            raise ValueError(
                "publish.form = 'adapter' needs a LoRA student; add [student.lora], or leave form out"
            )
        base = self.student.source or self.teacher
        if base is not None and base.artifact is None:
            raise ValueError(
                "publish.form = 'adapter' needs a base that is in the store; give teacher.artifact (or "
                "student.artifact) instead of a path or recipe, or leave form out"
            )
        return self

    def to_toml(self) -> str:
        """The resolved recipe as TOML, defaults written out."""
        return tomli_w.dumps(without_none(self.model_dump(mode="json")))

    def differences(self, before: Recipe) -> dict[str, tuple[Any, Any]]:
        """Differences from `before`: its value and ours, by dotted key; None is unset."""
        old, new = (dotted(recipe.model_dump(mode="json")) for recipe in (before, self))
        keys = [*old, *(key for key in new if key not in old)]
        pairs = {key: (old.get(key), new.get(key)) for key in keys}
        return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}

    def override(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy with dotted keys replaced, e.g. `{"config.guidance": 2.0}`; validated again."""
        return Recipe.parse(changed(without_none(self.model_dump(mode="json")), changes))
