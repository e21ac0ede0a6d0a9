"""A model that has to be trained first tells how far it is, and never as the run's own progress."""

from __future__ import annotations

import pytest

from distill_core import api
from distill_core.recipe import load_recipe
from distillery_cli.terminal.output import Bars

LITTLE = {"steps": 2, "batch_size": 8, "threads": 1}


@pytest.mark.slow
def test_a_teacher_on_the_way_reports_as_preparing(tmp_path):
    teacher = tmp_path / "little_teacher.toml"
    teacher.write_text(load_recipe("edm_digits").override(LITTLE).to_toml(), encoding="utf-8")
    recipe = load_recipe("dmd2", {**LITTLE, "teacher.recipe": str(teacher), "evaluate.judge": None})
    events = []
    where = api.context(tmp_path / "store", tmp_path / "cache")
    api.train(recipe, tmp_path / "run", where, listener=events.append)
    first = [event for event in events if event["event"] == "preparing"]
    assert [event["step"] for event in first][-1] == 2
    assert {event["model"] for event in first} == {load_recipe("edm_digits").title}
    own = [event for event in events if event["event"] == "progress"]
    assert own
    assert all("model" not in event for event in own)
    api.train(recipe, tmp_path / "again", where, listener=events.append)
    assert len([event for event in events if event["event"] == "preparing"]) == len(first)  # it was kept


def test_the_bar_says_what_is_trained_first(capsys, monkeypatch):
    monkeypatch.setattr("distillery_cli.terminal.output.LINE_EVERY_S", 0.0)
    with Bars() as bars:
        event = {"event": "preparing", "model": "Small teacher", "step": 3, "steps": 9, "eta_s": 65.0}
        bars.add("claim x").tell(event)
    assert "claim x: first Small teacher: 3/9, 1:05 left" in capsys.readouterr().err
