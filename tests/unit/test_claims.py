"""The writer of the documents about claims, and one real measurement."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from distill_core import api
from distill_core.errors import ConfigError, DataError, NotFound
from distill_core.recipe import load_recipe, recipe_names
from distill_service.settings import settings
from distillery_cli.terminal.output import markdown_table
from distillery_cli.terminal.running import run
from tools import claims
from tools.__main__ import app

README = f"# Title\n\nbefore\n\n{claims.BEGIN}\nold table\n{claims.END}\n\nafter\n"
DMD2 = {
    "name": "dmd2",
    "passed": True,
    "metric": "frechet_distance",
    "measured": 1.25,
    "reference": 2.5,
    "ablation": 8.0,
    "seconds": 61.5,
    "commit": "0123456789",
    "recipe_sha256": claims.fingerprint(load_recipe("dmd2")),
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with a README of its own, and nothing measured."""
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    return tmp_path


def store(folder: Path, *outcomes: dict) -> Path:
    folder.mkdir(exist_ok=True)
    for outcome in outcomes:
        (folder / f"{outcome['name']}.json").write_text(json.dumps(outcome))
    return folder


def write(checkout: Path, *outcomes: dict) -> tuple[str, str]:
    """README and evidence page after `--no-run`."""
    out = store(checkout / "results", *outcomes)
    assert run(app, "tools", ["claims", "--no-run", "--out", str(out), "--repository", str(checkout)]) == 0
    return (checkout / "README.md").read_text(), (checkout / "docs/evidence.md").read_text()


def methods(checkout: Path) -> str:
    """The page of all methods that was written last."""
    return (checkout / "docs/methods.md").read_text()


def row(page: str, recipe: str) -> list[str]:
    (line,) = [line for line in page.splitlines() if line.startswith(f"| `{recipe}` ")]
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_only_the_table_between_the_markers_changes(checkout):
    readme, _ = write(checkout)
    assert readme.startswith(f"# Title\n\nbefore\n\n{claims.BEGIN}\n| family |")
    assert readme.endswith(f" |\n{claims.END}\n\nafter\n")
    assert "old table" not in readme
    again, _ = write(checkout)
    assert again == readme


def test_a_recipe_without_result_or_claim_shows_no_figure(checkout):
    _, evidence = write(checkout)
    models = [name for name in recipe_names() if load_recipe(name).for_model]
    assert not any(f"| `{name}` " in evidence for name in models), "their settings are of others"
    assert "`sdxl_dmd2`: Stable Diffusion XL" in methods(checkout)
    for name in set(recipe_names()) - set(models):
        cells = row(evidence, name)
        claimed = load_recipe(name).check is not None
        assert cells[3] == claims.RUNS_ONLY if not claimed else cells[4] == claims.UNMEASURED
        assert not any(any(char.isdigit() for char in cell) for cell in cells[4:])
    assert f"`dmd2`: {claims.UNMEASURED}" in methods(checkout)


def test_a_measured_claim_stands_on_both_pages_with_all_its_figures(checkout):
    _, evidence = write(checkout, DMD2)
    assert row(evidence, "dmd2")[4:] == ["1.25", "2.5", "8", "yes", "61.5", "0123456789"]
    assert "`dmd2`: claim holds" in methods(checkout)


def test_a_claim_that_failed_or_broke_off_is_shown_as_such(checkout):
    _, evidence = write(checkout, {**DMD2, "passed": False, "measured": 9.0})
    assert row(evidence, "dmd2")[7] == "**no**"
    assert "`dmd2`: claim does **not** hold" in methods(checkout)
    broken = {key: DMD2[key] for key in ("name", "commit", "recipe_sha256")}
    _, evidence = write(checkout, {**broken, "passed": False, "error": "the loss became nan"})
    assert row(evidence, "dmd2")[4:8] == ["", "", "", "**no**"]
    assert "- `dmd2` broke off: the loss became nan" in evidence


def test_figures_of_an_earlier_recipe_are_marked(checkout):
    _, evidence = write(checkout, {**DMD2, "recipe_sha256": "0" * 64})
    assert "claim holds (an earlier recipe)" in methods(checkout)
    assert "`dmd2` was measured before its recipe changed" in evidence


def test_a_family_counts_its_claims_that_hold_and_names_those_that_do_not_or_may_not(checkout):
    fresh = {**DMD2, "name": "nasa", "recipe_sha256": claims.fingerprint(load_recipe("nasa"))}
    failed = {**DMD2, "name": "hipa", "passed": False, "recipe_sha256": "0" * 64}
    earlier = {**DMD2, "name": "pg_sb", "recipe_sha256": "0" * 64}
    elsewhere = {**DMD2, "name": "judge_digits", "passed": False}
    readme, _ = write(checkout, DMD2, fresh, failed, earlier, elsewhere)
    (line,) = [line for line in readme.splitlines() if line.startswith("| diffusion ")]
    _, named, holding, broken, unknown = (cell.strip() for cell in line.strip("|").split(" | "))
    family = [entry for entry in api.describe_methods() if entry["family"] == "diffusion"]
    assert named == ", ".join(f"`{entry['name']}`" for entry in family)
    claimed = {name for entry in family for name in entry["recipes"] if load_recipe(name).check is not None}
    assert holding == f"2 of {len(claimed)}"
    assert broken == "`hipa`"
    assert unknown == ", ".join(f"`{name}`" for name in sorted(claimed - {"dmd2", "nasa", "hipa"}))


def test_results_that_the_checkout_keeps_survive_a_machine_that_has_none(checkout, tmp_path):
    before = write(checkout, DMD2)
    (checkout / "results" / "dmd2.json").unlink()
    assert write(checkout) == before
    assert json.loads((checkout / "docs/evidence.json").read_text()) == {"dmd2": DMD2}


def test_a_new_result_replaces_the_kept_one(checkout):
    write(checkout, DMD2)
    _, evidence = write(checkout, {**DMD2, "measured": 1.5})
    assert row(evidence, "dmd2")[4] == "1.5"


def test_a_claim_is_said_with_its_size_its_bound_and_its_ablation():
    check = load_recipe("dmd2").check.model_copy(update={"set": {"steps": 9}, "ratio_at_most": 1.2})
    assert claims.claim_text(check).startswith(
        "frechet_distance <= 1.2 x teacher_frechet_distance at steps = 9; with config.critic_steps = 1 >= "
    )
    check = load_recipe("nerf_procedural").check
    assert claims.claim_text(check).startswith(f"psnr >= {check.at_least:g}; with config.grid_every = ")


def test_a_bar_inside_a_cell_does_not_end_it():
    assert markdown_table(("a", "b"), [["|x|", r"y \| z"]]).splitlines()[2] == r"| \|x\| | y \| z |"


def test_names_are_checked_before_anything_runs():
    with pytest.raises(NotFound, match="did you mean 'dmd2'"):
        claims.chosen_recipes(["dmd3"])
    silent = [name for name in recipe_names() if load_recipe(name).check is None]
    with pytest.raises(ConfigError, match="no \\[check\\] table"):
        claims.chosen_recipes(silent[:1])
    assert claims.chosen_recipes([]) == [name for name in recipe_names() if name not in silent]


def test_a_folder_without_the_markers_is_left_alone(tmp_path, capsys):
    (tmp_path / "README.md").write_text("# Another project\n")
    assert run(app, "tools", ["claims", "--no-run", "--repository", str(tmp_path)]) == 2
    assert "--repository" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_damaged_result_is_named(checkout):
    (checkout / "broken.json").write_text("{")
    with pytest.raises(DataError, match=r"broken\.json"):
        claims.stored_outcomes(checkout)


def test_the_commit_is_git_s_and_empty_elsewhere(tmp_path):
    assert claims.commit(tmp_path) == ""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    clean = claims.commit(tmp_path)
    assert len(clean) == 10
    (tmp_path / "file").write_text("2")
    assert claims.commit(tmp_path) == f"{clean}-dirty"


@pytest.mark.slow
def test_a_check_is_really_run_and_one_that_breaks_off_is_an_outcome(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DISTILLERY_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("DISTILLERY_CACHE_DIR", str(tmp_path / "cache"))
    settings.cache_clear()
    recipe = load_recipe("judge_digits").override({"steps": 40, "threads": 1, "network.args.width": 8})
    ours = tmp_path / "ours.toml"
    ours.write_text(recipe.override({"check.at_least": 0.3, "check.ablation.gap_at_least": 0.1}).to_toml())
    found = claims.measured(str(ours), tmp_path)
    assert found["passed"] is True
    assert found["measured"] > 0.3 > found["ablation"]
    assert found["recipe_sha256"] == claims.fingerprint(load_recipe(str(ours)))
    ours.write_text(recipe.override({"data": {"name": "images", "path": str(tmp_path / "none")}}).to_toml())
    found = claims.measured(str(ours), tmp_path)
    settings.cache_clear()
    assert found["passed"] is False
    assert "does not exist" in found["error"]
    assert "does not hold" in capsys.readouterr().err
