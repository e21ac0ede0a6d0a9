"""Validated, frozen configuration, and the recipe: the TOML file that says everything about a training run."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from copy import deepcopy
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from distill_core.errors import ConfigError, nearest
from distill_core.meant import check_no_pipeline, meant, no_such_recipe
from distill_core.plain_text import read_text

NAME_PATTERN = r"^[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?$"
NAME_RULE = (
    "allowed are 1 to 64 characters a-z, 0-9, '.', '_', '-', beginning and ending with a letter or digit"
)
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class PathMark:
    """Mark of a value that names a file or folder of the machine that runs the recipe.

    `inside` is the option beside it whose folder a relative name begins in.
    """

    def __init__(self, inside: str = "") -> None:
        self.inside = inside


class RecipeMark:
    """Mark of a recipe's name, which may be that of a file."""


class WordsMark:
    """Mark of text that is data (a title, a prompt, the name of a class or column) and never a path."""


class TableMark:
    """Mark of a table whose schema is elsewhere.

    `data`: that of a data source, by its `name`, or what is otherwise than in `[data]`; `network`: arguments of a
    network; `method`, `evaluate`: of the recipe's method, and of its result's kind; `changes`: overrides by dotted key.
    """

    def __init__(self, of: Literal["data", "network", "method", "evaluate", "changes"]) -> None:
        self.of = of


DataPath = Annotated[str, PathMark()]
Words = Annotated[str, WordsMark()]
Name = Annotated[Words, StringConstraints(pattern=NAME_PATTERN)]
RecipeName = Annotated[str, RecipeMark()]
DataTable = Annotated[dict[str, Any], TableMark("data")]
NetworkArgs = Annotated[dict[str, Any], TableMark("network")]
Changes = Annotated[dict[str, Any], TableMark("changes")]


class Config(BaseModel):
    """Base of every configuration: frozen, unknown keys are errors, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        kinds = set(get_args(kind) or (kind,))
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError(f"{str(value).lower()} is no number")
        return value

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, where: str = "") -> Self:
        """Validate `values`; a mistake becomes one `ConfigError` sentence that names the key under `where`."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise _as_config_error(cls, error, where) from None


def is_reserved_alias(alias: str) -> bool:
    """Whether no alias may be called so: it already means the newest version, or a version's number."""
    return alias == "latest" or alias.isdecimal()


def check_name(name: str, *, what: str, field: str | None = None) -> str:
    """`name` if it is a plain name (lower case, digits, `.`, `_`, `-`), which can never leave a folder."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise ConfigError(
            f"{what} {name!r} is not a plain name; {NAME_RULE}",
            field=field,
        )
    return name


def _as_config_error(cls: type[BaseModel], error: ValidationError, where: str) -> ConfigError:
    first = error.errors()[0]
    path = ".".join(str(part) for part in ([where] if where else []) + list(first["loc"]))
    if first["type"] == "extra_forbidden":
        owner = _model_at(cls, first["loc"][:-1])
        return ConfigError(
            f"unknown key {path}{nearest(str(first['loc'][-1]), owner.model_fields)}", field=path
        )
    if first["type"] == "missing":
        return ConfigError(f"missing key {path}: it has no default", field=path)
    if first["type"] == "value_error":
        return ConfigError(f"{path or cls.__name__}: {first['ctx']['error']}", field=path)
    given = repr(first.get("input"))
    given = given if len(given) <= 80 else given[:77] + "..."
    return ConfigError(f"{path} = {given} is not allowed: {_said(first, path)}", field=path)


def _said(error: Any, path: str) -> str:
    """What is allowed, in words; pydantic's own for most."""
    if error["type"] in ("dict_type", "model_type"):
        return f"a table of keys belongs here, e.g. {path}.KEY = VALUE"
    if error["type"] == "string_pattern_mismatch" and error["ctx"]["pattern"] == NAME_PATTERN:
        return NAME_RULE
    return str(error["msg"][0].lower() + error["msg"][1:])


def _model_at(cls: type[BaseModel], path: Iterable[int | str]) -> type[BaseModel]:
    for part in path:
        annotation = cls.model_fields[part].annotation if part in cls.model_fields else None
        for option in (annotation, *getattr(annotation, "__args__", ())):
            if isinstance(option, type) and issubclass(option, BaseModel):
                cls = option
    return cls


class ModelSource(Config):
    """Where a frozen model comes from: one of a store artifact, a folder, a recipe that trains it, a formula."""

    artifact: Words | None = None  # name@version or name@alias in the artifact store
    path: DataPath | None = None  # a diffusers folder or an artifact folder on disk
    recipe: RecipeName | None = None  # trained once, then cached under the recipe's content
    scene: Literal["procedural", "alcove"] | None = None  # a radiance field in closed form, without training

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(value is not None for value in (self.artifact, self.path, self.recipe, self.scene)) != 1:
            raise ValueError("give exactly one of artifact, path, recipe, scene")
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
        return None if self.targets == "all-linear" else self.targets  # type: ignore[return-value]


class StudentConfig(Config):
    """What the student begins as; with nothing set, a trainable copy of the teacher."""

    artifact: Words | None = None  # begin as this student instead of the teacher: a store artifact,
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
    """How a run's result is measured; the kind of the result adds what it is measured with."""

    data: DataTable | None = None  # what to compare with; unset: the data of the training
    num_samples: int = Field(1797, ge=2, le=100_000)
    batch_size: int = Field(128, ge=1, le=4096)
    seed: Seed = 0

    @property
    def sources(self) -> dict[str, ModelSource]:
        """The models that measure, by key."""
        return {}


class CheckAblation(Config):
    """The same recipe with the method's key part off, which must be worse by a factor or an amount."""

    set: Changes
    ratio_at_least: float | None = None  # ablation / method, for metrics where less is better
    gap_at_least: float | None = None  # method - ablation, for metrics where more is better


class Claim(Config):
    """A figure's bounds, alone or against another figure of the same run, and what switching the key part off does."""

    metric: Words
    reference: Words | None = None  # another figure of the same run, e.g. teacher_frechet_distance
    ratio_at_most: float | None = None  # metric / reference
    ratio_at_least: float | None = None
    at_most: float | None = None
    at_least: float | None = None
    ablation: CheckAblation | None = None

    @model_validator(mode="after")
    def _against_something(self) -> Self:
        ratios = self.ratio_at_most is not None or self.ratio_at_least is not None
        if ratios != (self.reference is not None):
            raise ValueError("a ratio needs a reference, and a reference a ratio_at_most or ratio_at_least")
        return self


class CheckConfig(Claim):
    """The recipe's claim, and others on the same runs."""

    set: Changes = {}  # overrides for the check's size
    seeds: list[Seed] = Field([0], min_length=1)  # figures are means over these
    also: list[Claim] = []


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


MODEL_SOURCES = frozenset(ModelSource.model_fields)
STUDENT_SOURCES = ("artifact", "path", "recipe", "network")
MADE_OF = (
    "data",
    "teacher",
    "student",
    "network",
    "extractor",
)  # tables that a title and a licence are about
IN_TITLES = ("levels", "level", "step_counts", "parts")  # and of [config] what a title may count


class Recipe(Config):
    """Everything that decides a run's result. Data only: it travels through the queue and executes nothing."""

    method: Words
    title: Words = ""
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
    log_every: int = Field(20, ge=1)
    sample_every: int = Field(500, ge=1)
    checkpoint_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    config: Annotated[dict[str, Any], TableMark("method")] = {}
    data: DataTable | None = None  # `[data.NAME]` within it are further data sets
    teacher: ModelSource | None = None
    teachers: dict[str, ModelSource] = {}  # further ones, by the names that the method gives them
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
        return tomli_w.dumps(_without_none(self.model_dump(mode="json")))

    def differences(self, before: Recipe) -> dict[str, tuple[Any, Any]]:
        """What is otherwise in `before`: its value and ours, by dotted key; None is unset."""
        old, new = (_dotted(recipe.model_dump(mode="json")) for recipe in (before, self))
        keys = [*old, *(key for key in new if key not in old)]
        pairs = {key: (old.get(key), new.get(key)) for key in keys}
        return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}

    def override(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy with dotted keys replaced, e.g. `{"config.guidance": 2.0}`; validated again."""
        return Recipe.parse(_changed(_without_none(self.model_dump(mode="json")), changes))


_T = TypeVar("_T")


def _without_none(value: _T) -> _T:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}  # type: ignore[return-value]
    if isinstance(value, list):
        return [_without_none(entry) for entry in value]  # type: ignore[return-value]
    return value


def _dotted(table: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= _dotted(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return found


def _changed(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with dotted keys replaced, and without what they said of other data or another teacher."""
    before = deepcopy(values)
    for key, value in changes.items():
        _set_dotted(values, key, value)
    said = {key for key in changes if key in ("title", "publish", "publish.licence")}
    made_otherwise = any(before.get(table) != values.get(table) for table in MADE_OF)
    if "title" not in said and (made_otherwise or _counts(before) != _counts(values)):
        values.pop("title", None)
    if said <= {"title"} and made_otherwise and isinstance(values.get("publish"), dict):
        values["publish"].pop("licence", None)
    _note_teacher(before, values, changes)
    return values


def _counts(values: Mapping[str, Any]) -> list[Any]:
    table = values.get("config")
    return [table.get(key) for key in IN_TITLES] if isinstance(table, Mapping) else []


def _note_teacher(before: Mapping[str, Any], values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Keep whom the recipe was written for: its levels and learning rates are those of that teacher."""
    former = before.get("replaced")
    teacher = before.get("teacher")
    if former is None and isinstance(teacher, Mapping) and values.get("teacher") not in (None, teacher):
        former = {"recipe": teacher["recipe"]} if isinstance(teacher.get("recipe"), str) else None
    if isinstance(former, Mapping) and "replaced" not in changes:
        given = sorted({*former.get("given", ()), *changes})
        values["replaced"] = {**former, "given": given}


def _set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    table = values
    for parent in parents:
        nested = table.setdefault(parent, {})
        if not isinstance(nested, dict):
            raise ConfigError(f"cannot set {key}: {parent} is a value, not a table", field=key)
        table = nested
    if last in MODEL_SOURCES and table.keys() <= MODEL_SOURCES:
        table.clear()  # one source replaces the other
    if parents == ["network"] and last == "name" and table.get("name") != value:
        table.pop("args", None)  # they were those of another class
    if parents == ["student"] and last in STUDENT_SOURCES:
        for other in STUDENT_SOURCES:
            table.pop(other, None)
    table[last] = deepcopy(value)


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """`["config.guidance=2", "data.path=/x"]` as a dictionary; values are TOML, anything else is a string."""
    changes: dict[str, Any] = {}
    for item in items:
        key, separator, text = item.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"override {item!r} is not KEY=VALUE, e.g. config.guidance=2")
        try:
            changes[key.strip()] = tomllib.loads(f"v = {text}")["v"]
        except ValueError:  # also a number of thousands of digits
            changes[key.strip()] = text.strip()
    return changes


def recipe_names() -> list[str]:
    """Names of the recipes that come with the library."""
    folder = resources.files("distill_core.recipes")
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by name, from a .toml file, or from values; then `overrides` by dotted key.

    Raises:
        NotFound: no such recipe name or file.
        ConfigError: not TOML, an unknown key, a value of the wrong type or out of range.
    """
    values = dict(source) if isinstance(source, Mapping) else _read_toml(str(source))
    check_no_pipeline(values)
    try:
        return Recipe.parse(_changed(values, overrides or {}))
    except ConfigError as error:
        raise meant(error, overrides or {}, values, Recipe) from None


def _read_text(path: Path) -> str:
    try:
        return read_text(path)
    except UnicodeDecodeError:
        raise ConfigError(f"recipe {path} is not a text file; a recipe is TOML in UTF-8") from None
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}") from None


def _read_toml(source: str) -> dict[str, Any]:
    path = Path(source)
    if path.suffix == ".toml":
        if not path.is_file():
            raise no_such_recipe(source, recipe_names())
        text = _read_text(path)
    else:
        if source not in recipe_names():
            raise no_such_recipe(source, recipe_names())
        text = (resources.files("distill_core.recipes") / f"{source}.toml").read_text(encoding="utf-8")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and endless nesting
        raise ConfigError(f"recipe {source} is not valid TOML: {error}") from None
