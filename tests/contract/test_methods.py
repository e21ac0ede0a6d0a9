"""What every method must do, ours and those to come: found by discovery, not by a list."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from distill_core.data import named_tables
from distill_core.kinds import find_kind, kind_names
from distill_core.kinds.cards import described
from distill_core.kinds.loading import load_model
from distill_core.methods import find_method, method_names, needs
from distill_core.recipe import load_recipe
from distill_core.training.checkpoint import load_latest
from tests.helpers import changed, parameters_by_module, recipe_of, tiny_recipe, tiny_trainer

METHODS = method_names()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_names_its_paper_its_roles_and_its_result(name):
    method = find_method(name)
    assert re.search(r"\b(19|20)\d\d\b", method.paper), "the paper needs its year"
    assert method.roles
    assert method.result in method.roles
    recipe = load_recipe(recipe_of(name))
    own = {*recipe.teachers, *named_tables(recipe.data or {})}
    given = {"teacher", "student", "network", "data", "pairs", "extractor", "seed", "steps", "batch_size"}
    assert set(needs(method)) <= given | own


@pytest.mark.parametrize("name", METHODS)
def test_a_config_survives_the_trip_through_a_recipe_file(name):
    recipe = load_recipe(recipe_of(name))
    method = find_method(name)
    config = method.Config.parse(recipe.config)
    assert method.Config.parse(config.model_dump(mode="json", exclude_none=True)) == config


@pytest.mark.parametrize("name", METHODS)
def test_an_update_moves_only_its_own_role(name, context, tmp_path, monkeypatch):
    trainer = tiny_trainer(recipe_of(name), context, tmp_path)
    method = trainer.method
    before = parameters_by_module(method)
    seen = []
    apply = trainer.apply

    def watched(updates):
        nonlocal before
        values = apply(updates)
        after = parameters_by_module(method)
        moved = {child for child in after if changed(before[child], after[child])}
        seen.append((updates[0].role, moved))
        before = after
        return values

    monkeypatch.setattr(trainer, "apply", watched)
    for _ in range(2):
        trainer.enter_next()
        before = parameters_by_module(method)
        values = trainer.train_step()
        trainer.step += 1
        assert all(torch.isfinite(torch.as_tensor(value)).all() for value in values.values())
    assert {role for role, _ in seen} == set(method.roles)
    for role, moved in seen:
        assert moved == {role}


@pytest.mark.parametrize("name", METHODS)
def test_an_interrupted_run_ends_bit_for_bit_where_an_undisturbed_one_does(name, context, tmp_path):
    straight = tiny_trainer(recipe_of(name), context, tmp_path / "straight", steps=4)
    straight.train()
    polls = iter([False, False, True])
    first = tiny_trainer(recipe_of(name), context, tmp_path / "resumed", steps=4)
    assert first.train(lambda: next(polls)).stopped
    second = tiny_trainer(recipe_of(name), context, tmp_path / "resumed", steps=4)
    second.resume()
    assert second.step == 2
    second.train()
    one = load_latest(straight.run.checkpoints, method=name)
    two = load_latest(second.run.checkpoints, method=name)
    assert one is not None
    assert two is not None
    assert one[1].keys() == two[1].keys()
    for part, tensors in one[1].items():
        for key, value in tensors.items():
            assert torch.equal(value, two[1][part][key]), f"{part}: {key}"


def test_adapters_begin_alike_whether_or_not_their_base_is_cached(context, tmp_path):
    own = replace(context, cache=tmp_path / "cache")
    cold, warm = (tiny_trainer(recipe_of("pso"), own, tmp_path / f"{run}").tensors() for run in range(2))
    for key, value in cold["student"].items():
        assert torch.equal(value, warm["student"][key]), key


@pytest.mark.parametrize("name", METHODS)
def test_a_result_is_saved_and_loads_again_with_the_same_output(name, context, tmp_path):
    trainer = tiny_trainer(recipe_of(name), context, tmp_path / "run")
    trainer.train()
    with trainer.averaged():
        for role, model in trainer.method.published().items():
            model.save(tmp_path / role)
            assert described(model)["kind"] in kind_names()
            files = [file for file in (tmp_path / role).rglob("*") if file.is_file()]
            assert any(file.suffix in (".safetensors", ".parquet") for file in files)
            saved, loaded = (shown(one, trainer.source) for one in (model, load_model(tmp_path / role)))
            assert saved
            for output, again in zip(saved, loaded, strict=True):
                assert output.double().std() > 0, "a constant would hide a difference"
                torch.testing.assert_close(again, output, rtol=0.01, atol=0.01)  # scenes are saved in halves


def shown(model, source) -> list[torch.Tensor]:
    """What a model gives: the pictures of its kind's preview, and what it answers to its kind's probe."""
    kind = find_kind(model.kind)
    pictures = kind.preview(model, source, 3, {})
    answers = [torch.as_tensor(values) for part in kind.probe(model).values() for values in part.values()]
    return answers if pictures is None else [pictures, *answers]


@pytest.mark.parametrize("name", METHODS)
def test_an_unknown_config_key_names_the_nearest_one(name):
    from distill_core.errors import ConfigError

    recipe = tiny_recipe(recipe_of(name))
    method = find_method(name)
    field = next(iter(method.Config.model_fields), "")
    said = f"did you mean '{field}'" if field else "unknown key config.x"
    with pytest.raises(ConfigError, match=said):
        method.Config.parse({**recipe.config, field + "x": 1}, where="config")
