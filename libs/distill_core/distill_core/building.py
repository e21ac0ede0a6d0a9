"""From a recipe to the objects a method asks for: teachers, student, data."""

from __future__ import annotations

import copy
import inspect
import re
import typing
from collections.abc import Mapping
from typing import Any

from torch import nn

from distill_core.config import NAME_PATTERN, NAME_RULE
from distill_core.context import Context
from distill_core.data import Source, build_source, named_tables
from distill_core.data.classes import check_same_classes
from distill_core.data.pairs import build_pairs
from distill_core.errors import ArtifactError, ConfigError
from distill_core.kinds import find_kind
from distill_core.method import Method
from distill_core.methods import find_method, needs
from distill_core.networks.adapters import LoraDenoiser, plain
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.fake_tensors import real_tensors
from distill_core.recipe import Recipe
from distill_core.recipe.published_models import check_teacher_fits, check_teacher_named
from distill_core.recipe.tables import ModelSource, StudentConfig
from distill_core.recipe.transfer import suited
from distill_core.training.seeding import derive, seed_everything


def build(recipe: Recipe, context: Context) -> tuple[Method, Source]:
    """The method with everything its constructor names, and its data source.

    Raises:
        ConfigError: the recipe lacks a table that the method needs.
    """
    check_teacher_named(recipe)
    recipe = for_its_teacher(recipe, context)
    cls = find_method(recipe.method)
    config = cls.Config.parse(recipe.config, where="config")
    wanted = needs(cls)
    sources = build_sources(recipe, context)
    source = sources["data"]
    arguments: dict[str, Any] = {**sources, "seed": recipe.seed, "network": recipe.network}
    arguments |= {"steps": recipe.steps, "batch_size": recipe.batch_size}
    if "network" in wanted and recipe.network is None and _is_required(cls, "network"):
        raise ConfigError(f"method {recipe.method} needs a [network] table: name and args", field="network")
    _refuse_unused(recipe, wanted, sources)
    _check_columns(recipe, cls.columns(config), source)
    arguments["extractor"] = None
    if recipe.extractor is not None:
        arguments["extractor"] = _loaded(recipe.extractor, context, nn.Module, "extractor")
    if {"teacher", "student"} & set(wanted):
        arguments |= _models(recipe, context, cls, source)
    for name, given in recipe.teachers.items():
        arguments[name] = _loaded(given, context, _annotated(cls, name), f"teachers.{name}")
    wanted = [name for name in wanted if name in arguments or _is_required(cls, name)]
    unknown = [name for name in wanted if name not in arguments]
    if unknown:
        raise ConfigError(f"method {recipe.method} asks for {unknown[0]!r}, which no recipe table provides")
    seed_everything(derive(recipe.seed, "init"))
    method = cls(config, **{name: arguments[name] for name in wanted})
    if "network" in wanted:  # a model made for this data is given the data's conditions
        find_kind(cls.kind).fit(getattr(method, method.result), source)
    if recipe.publish is not None:
        names_of_results(method, recipe.publish.name)
    return method, source


def names_of_results(method: Method, name: str) -> dict[str, str]:
    """Names under which the models of a run are published, by role: `name` for the main one, else NAME-ROLE.

    Raises:
        ConfigError: one of them is no name of a model; said before the training, not after it.
    """
    main, *others = method.published()
    names = {main: name} | {role: f"{name}-{role}" for role in others}
    for role, full in names.items():
        if not re.fullmatch(NAME_PATTERN, full):
            raise ConfigError(
                f"publish.name = {name!r} would publish the model of {role} as {full!r}, which is no name; {NAME_RULE}",
                field="publish.name",
            )
    return names


def for_its_teacher(recipe: Recipe, context: Context) -> Recipe:
    """`recipe`, without what belonged to the schedule of another teacher that it was written for."""

    def former(made: Recipe) -> nn.Module:
        method, _ = build(made, context)
        return getattr(method, method.result)  # type: ignore[no-any-return]

    return suited(recipe, context, former)


def fit(source: Source, model: Any) -> None:
    """Make the data give what a model is conditioned on, as its kind knows, or say why it cannot.

    Raises:
        ConfigError, DataError: pictures of another shape, no or too many classes, no prompts.
    """
    if kind := getattr(model, "kind", ""):
        find_kind(kind).fit(model, source)


def _check_columns(recipe: Recipe, needed: Mapping[str, str], source: Source) -> None:
    table = recipe.data or {}
    named = next(
        (f"data.{key} = {table[key]!r}" for key in ("ref", "recipe", "name") if key in table), "data"
    )
    for column, purpose in needed.items():
        if column not in source.columns:
            what = {"x0": "real pictures", "class_label": "class labels"}.get(column, f"a column {column}")
            raise ConfigError(
                f"method {recipe.method} needs {what} for {purpose}, and {named} has none; "
                f"choose data with {what.removeprefix('real ')}",
                field="data.name",
            )


def _refuse_unused(recipe: Recipe, wanted: list[str], sources: Mapping[str, Source]) -> None:
    unused = {
        "student": "has no student to set up" if recipe.student != StudentConfig() else "",
        "pairs": "uses no pairs" if recipe.pairs is not None else "",
        "extractor": "reads no pictures" if recipe.extractor is not None else "",
        **{name: f"uses no further teacher {name}" for name in recipe.teachers},
        **{name: f"uses no further data {name}" for name in sources if name != "data"},
    }
    for name, sentence in unused.items():
        if sentence and name not in wanted:
            table = f"teachers.{name}" if name in recipe.teachers else name
            table = f"data.{name}" if name in sources else table
            raise ConfigError(f"method {recipe.method} {sentence}; leave [{table}] out", field=table)


def _models(recipe: Recipe, context: Context, cls: type[Method], source: Source) -> dict[str, Any]:
    """Teacher, student and pairs, as far as the constructor names them."""
    wanted = needs(cls)
    found: dict[str, Any] = {}
    begins = recipe.student.source if "student" in wanted else None
    if "teacher" in wanted or "pairs" in wanted or begins is None:
        found["teacher"] = _teacher(recipe, context, _annotated(cls, "teacher", "student"))
        if recipe.for_model is not None:
            network = type(getattr(found["teacher"], "network", found["teacher"])).__name__
            pooled = found["teacher"].cond.pooled_dim is not None
            check_teacher_fits(recipe.for_model, network, pooled=pooled)
        fit(source, found["teacher"])
        if recipe.student.gradient_checkpointing:  # for the fake scores that are made from it
            found["teacher"].enable_gradient_checkpointing()
    if "student" in wanted:
        like = _annotated(cls, "teacher", "student")
        base = found["teacher"] if begins is None else _loaded(begins, context, like, "student")
        check_same_classes(found.get("teacher"), base)
        fit(source, base)
        seed_everything(derive(recipe.seed, "student"))  # after that: what is not cached yet is trained there
        found["student"] = _student(base, recipe.student)
        if recipe.publish is not None and isinstance(found["student"], LoraDenoiser):
            found["student"].form = recipe.publish.form
    found["pairs"] = None
    if recipe.pairs is not None:
        found["pairs"] = build_pairs(found["teacher"], source, recipe.pairs, context.pairs(recipe))
    return found


def _student(base: nn.Module, wish: StudentConfig) -> nn.Module:
    """What `base` is to become before training: a copy, an adapter over it, or another network in its place."""
    if wish == StudentConfig() or not isinstance(base, Denoiser):
        return copy.deepcopy(base).requires_grad_(True)
    if wish.network is not None:
        from distill_core.networks.diffusers_new import build_like

        student: Denoiser = build_like(base, wish.network)  # type: ignore[arg-type]
    else:
        student = LoraDenoiser(base, wish.lora) if wish.lora else copy.deepcopy(base)
    if wish.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    return student if wish.lora else student.requires_grad_(True)


def _is_required(cls: type[Method], name: str) -> bool:
    return inspect.signature(cls.__init__).parameters[name].default is inspect.Parameter.empty


def build_sources(recipe: Recipe, context: Context) -> dict[str, Source]:
    """The recipe's data sets by name: `data`, and each of `[data.NAME]`."""
    if recipe.data is None:
        raise ConfigError(
            f"method {recipe.method} needs a [data] table, e.g. data.name = 'digits'", field="data"
        )
    with real_tensors():  # in a plan too: only networks are without weights
        return {
            name: build_source(table, where="data" if name == "data" else f"data.{name}", folders=context)
            for name, table in named_tables(recipe.data).items()
        }


def _annotated(cls: type[Method], *names: str) -> type[nn.Module]:
    """The class that the constructor is annotated with for the first of these names that it has."""
    hints = typing.get_type_hints(cls.__init__)
    wanted = next((hints[name] for name in names if name in hints), nn.Module)
    return wanted if isinstance(wanted, type) else nn.Module


def _teacher(recipe: Recipe, context: Context, kind: type[nn.Module]) -> nn.Module:
    if recipe.teacher is None:
        raise ConfigError(
            f"method {recipe.method} needs a teacher: set teacher.artifact, teacher.path or teacher.recipe",
            field="teacher",
        )
    return _loaded(recipe.teacher, context, kind, "teacher")


def _loaded(source: ModelSource, context: Context, kind: type[nn.Module], what: str) -> nn.Module:
    model = plain(context.load(source))
    if not isinstance(model, kind):
        raise ArtifactError(
            f"the {what} must be a {kind.__name__}, and this is a {type(model).__name__}; "
            "`distillery models` shows the kinds",
            field=what,
        )
    if isinstance(model, nn.Module):  # a scene is more than its field, and was loaded frozen
        model.requires_grad_(False).eval()
    return model
