"""`claims`: every recipe's claim, measured one after the other, and the documents that show the results."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from distill_core.errors import ConfigError, DataError, DistilleryError, NotFound, nearest
from distill_core.recipe import Recipe, load_recipe, recipe_names
from distill_core.recipe.claims import CheckConfig, Claim
from distillery_cli.terminal.output import (
    AsJson,
    bar,
    emit_json,
    figure,
    markdown_table,
    notes,
    results,
    styled,
)
from tools import field_kinds

BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"
EVIDENCE, KEPT, README = Path("docs/evidence.md"), Path("docs/evidence.json"), Path("README.md")
METHODS = Path("docs/methods.md")
RUNS_ONLY, UNMEASURED, HOLDS = "runs; no claim", "not measured yet", "claim holds"
COLUMNS = (
    "recipe",
    "method",
    "paper",
    "claim",
    "measured",
    "reference",
    "ablation",
    "passed",
    "seconds",
    "commit",
)
FAMILY_COLUMNS = ("family", "methods", "claims that hold", "that do not", "not measured as they are")
Outcome = Mapping[str, Any]  # what api.check gives, or an error's sentence; with commit and recipe_sha256


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(
        epilog="Examples: python -m tools claims  ·  python -m tools claims dmd2  ·  python -m tools claims --no-run"
    )(claims)


def claims(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[RECIPE]...", help="Without any: all that claim something.")
    ] = None,
    run: Annotated[bool, typer.Option("--run/--no-run", help="Measure, or only write the documents.")] = True,
    out: Annotated[Path, typer.Option("--out", help="Where each result goes, as JSON.")] = Path("out/claims"),
    repository: Annotated[Path, typer.Option(help="The checkout whose documents are written.")] = Path(),
    as_json: AsJson = False,
) -> int:
    """Measure the recipes' claims, and write the figures into docs/evidence.md, docs/methods.md and the README's table.

    Exits with 1 if a claim that was asked for did not hold.
    """
    chosen = chosen_recipes(names or [])
    read_readme(repository)  # before an hour of training, not after it
    for name in chosen if run else []:
        _store(out, measured(name, repository))
    known = kept_outcomes(repository) | stored_outcomes(out)
    write_documents(repository, known)
    chosen_checks = [known[name] for name in chosen if name in known]
    if as_json:
        emit_json(chosen_checks)
    else:
        written = f"{EVIDENCE}, {KEPT}, {METHODS}, {README}"
        results.print(f"{len(chosen_checks)} of {len(chosen)} claims measured; written: {written}")
    return 0 if not run or all(outcome["passed"] for outcome in chosen_checks) else 1


def chosen_recipes(names: Sequence[str]) -> list[str]:
    """The recipes asked for, or all with a claim.

    Raises:
        NotFound: no such recipe. ConfigError: one that claims nothing.
    """
    for name in names:
        if name not in recipe_names():
            raise NotFound(f"no recipe is called {name!r}{nearest(name, recipe_names())}", field="names")
        if load_recipe(name).check is None:
            raise ConfigError(
                f"recipe {name} has no [check] table, so it claims nothing; add one, or leave it out",
                field="names",
            )
    return list(names) or [name for name in recipe_names() if load_recipe(name).check is not None]


def measured(name: str, repository: Path) -> dict[str, Any]:
    """The outcome of one check; a run that breaks off is an outcome too, and the next claim goes on."""
    from distill_core import api
    from distillery_cli.training.train import local_context

    made = {"commit": commit(repository), "recipe_sha256": fingerprint(load_recipe(name))}
    with bar(f"claim {name}") as line:
        try:
            verdict = api.check(name, local_context(), listener=line.tell)
        except DistilleryError as error:
            verdict = {"name": name, "passed": False, "error": str(error)}
    word = ("holds", "green") if verdict["passed"] else ("does not hold", "red")
    notes.print(styled(f"{name}: the claim ", word))
    return {**verdict, **made}


def fingerprint(recipe: Recipe) -> str:
    """Identity of a figure's recipe: a changed one makes it old, a new key that keeps its default does not."""
    unmeasured = {"publish": {"licence"}}  # of the model, not of its figures
    chosen = recipe.model_dump(mode="json", exclude_defaults=True, exclude=unmeasured)
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def commit(repository: Path) -> str:
    """The checkout's commit, `-dirty` where files differ from it; empty outside of git."""
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except OSError:  # no git on this machine
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _store(out: Path, outcome: Outcome) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{outcome['name']}.json").write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")


def stored_outcomes(out: Path) -> dict[str, Outcome]:
    """The results in a folder, by recipe."""
    return {path.stem: _read(path) for path in sorted(out.glob("*.json"))}


def kept_outcomes(repository: Path) -> dict[str, Outcome]:
    """The results that the checkout itself keeps, so that measuring one claim anew forgets no other."""
    path = repository / KEPT
    return dict(_read(path)) if path.is_file() else {}


def _read(path: Path) -> Outcome:
    try:
        kept_figures = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}); delete it and measure again") from None
    if not isinstance(kept_figures, dict):
        raise DataError(f"{path} holds no result; delete it and measure again")
    return kept_figures


def write_documents(repository: Path, outcomes: Mapping[str, Outcome]) -> None:
    """Write evidence.md, evidence.json, methods.md and the README's table of families from these results alone."""
    from distill_core import api
    from distill_core.methods import method_files

    known = {name: outcomes[name] for name in recipe_names() if name in outcomes}
    ours = [entry for entry in api.describe_methods() if entry["name"] in method_files()]
    readme = with_table(read_readme(repository), families_table(ours, known))
    (repository / EVIDENCE).parent.mkdir(parents=True, exist_ok=True)
    (repository / KEPT).write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    page = evidence(ours, known) + field_kinds.section(repository)
    (repository / EVIDENCE).write_text(page, encoding="utf-8")
    table = methods_table(ours, known)
    (repository / METHODS).write_text(f"{_METHODS_PREAMBLE}\n{table}", encoding="utf-8")
    (repository / README).write_text(readme, encoding="utf-8")


def read_readme(repository: Path) -> str:
    """The README's text.

    Raises:
        ConfigError: there is none, or it has no place for the table.
    """
    path = repository / README
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ConfigError(
            f"{path.absolute()} has no table between {BEGIN} and {END}; run this in a checkout, "
            "or name one with --repository",
            field="repository",
        )
    return text


def with_table(readme: str, table: str) -> str:
    """The README with `table` between its markers."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table}{END}{rest.split(END)[1]}"


def families_table(described: Sequence[Mapping[str, Any]], outcomes: Mapping[str, Outcome]) -> str:
    """A line for each family: its methods, how many claims hold, and the recipes whose claims do not or may not."""
    rows = []
    for family in sorted({entry["family"] for entry in described}):
        methods = [entry for entry in described if entry["family"] == family]
        claimed = [
            name for entry in methods for name in entry["recipes"] if load_recipe(name).check is not None
        ]
        holding = [name for name in claimed if state(load_recipe(name), outcomes.get(name)) == HOLDS]
        failed = [name for name in claimed if name in outcomes and not outcomes[name]["passed"]]
        unknown = set(claimed) - {*holding, *failed}  # never measured, or before the recipe changed
        names = [entry["name"] for entry in methods]
        counted = f"{len(holding)} of {len(claimed)}"
        rows.append([family, _named(names), counted, _named(failed), _named(unknown)])
    return markdown_table(FAMILY_COLUMNS, rows)


def _named(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def methods_table(described: Sequence[Mapping[str, Any]], outcomes: Mapping[str, Outcome]) -> str:
    """A line for each method: what it is, its recipes, and whether their claims hold."""
    rows = []
    for entry in sorted(described, key=lambda entry: (entry["family"], entry["name"])):
        states = [(name, state(load_recipe(name), outcomes.get(name))) for name in entry["recipes"]]
        yours = "<br>".join(f"`{name}`: {title}" for name, title in entry["model_recipes"].items())
        rows.append([f"`{entry['name']}`", entry["family"], entry["paper"], _states(states), yours])
    columns = (
        "method",
        "family",
        "paper",
        "recipes and their state",
        "with published settings for a model of yours",
    )
    return markdown_table(columns, rows)


def _states(states: Sequence[tuple[str, str]]) -> str:
    if not states:
        return "no recipe"
    return "<br>".join(f"`{name}`: {said}" for name, said in states)


def state(recipe: Recipe, outcome: Outcome | None) -> str:
    """State of a recipe's claim, in a few words."""
    if recipe.check is None:
        return RUNS_ONLY
    if outcome is None:
        return UNMEASURED
    word = HOLDS if outcome["passed"] else "claim does **not** hold"
    return word if outcome["recipe_sha256"] == fingerprint(recipe) else f"{word} (an earlier recipe)"


def evidence(described: Sequence[Mapping[str, Any]], outcomes: Mapping[str, Outcome]) -> str:
    """The page of all recipes, their claims and what was measured."""
    papers = {entry["name"]: entry["paper"] for entry in described}
    rows, remarks = [], []
    for name in recipe_names():
        recipe, outcome = load_recipe(name), outcomes.get(name)
        if (
            recipe.method not in papers or recipe.for_model is not None
        ):  # these claim nothing, and run elsewhere
            continue
        rows.append([f"`{name}`", f"`{recipe.method}`", papers[recipe.method], *_figures(recipe, outcome)])
        rows += [["", "", "", *cells] for cells in _further(recipe, outcome)]
        if outcome is not None and recipe.check is not None:
            remarks += _remarks(name, recipe, outcome)
    return "\n".join([_PREAMBLE, markdown_table(COLUMNS, rows), *remarks])


def _figures(recipe: Recipe, outcome: Outcome | None) -> list[str]:
    """The cells from `claim` on."""
    if recipe.check is None:
        return [RUNS_ONLY, *[""] * 6]
    if outcome is None:
        return [claim_text(recipe.check), UNMEASURED, *[""] * 5]
    shown = [_cell(outcome.get(key)) for key in ("measured", "reference", "ablation")]
    passed = "yes" if outcome["passed"] else "**no**"
    return [claim_text(recipe.check), *shown, passed, _cell(outcome.get("seconds")), outcome["commit"]]


def _further(recipe: Recipe, outcome: Outcome | None) -> list[list[str]]:
    """The same cells for the check's other claims."""
    rows = []
    for index, claim in enumerate(recipe.check.also if recipe.check else []):
        judged = dict(enumerate((outcome or {}).get("also", []))).get(index)
        if judged is None:
            rows.append([_said(claim), UNMEASURED, *[""] * 5])
            continue
        shown = [_cell(judged[key]) for key in ("measured", "reference", "ablation")]
        rows.append([_said(claim), *shown, "yes" if judged["passed"] else "**no**", "", ""])
    return rows


def _cell(value: Any) -> str:
    return "" if value is None else figure(value)


def _remarks(name: str, recipe: Recipe, outcome: Outcome) -> list[str]:
    sentences = []
    if "error" in outcome:
        sentences.append(f"- `{name}` broke off: {outcome['error']}")
    if outcome["recipe_sha256"] != fingerprint(recipe):
        sentences.append(
            f"- `{name}` was measured before its recipe changed; the figures are the earlier recipe's."
        )
    return sentences


def claim_text(check: CheckConfig) -> str:
    """A claim as a sentence, e.g. `psnr >= 23; with config.grid_every = 1000000 lower by >= 0.6`."""
    sized = f" at {_settings(check.set)}" if check.set else ""
    seeds = "" if len(check.seeds) == 1 else f", mean of {len(check.seeds)} seeds"
    return _said(check, sized + seeds)


def _said(claim: Claim, circumstances: str = "") -> str:
    bounds = {
        f"<= {claim.ratio_at_most or 0:g} x {claim.reference}": claim.ratio_at_most,
        f">= {claim.ratio_at_least or 0:g} x {claim.reference}": claim.ratio_at_least,
        f"<= {claim.at_most or 0:g}": claim.at_most,
        f">= {claim.at_least or 0:g}": claim.at_least,
    }
    bound = " and ".join(text for text, value in bounds.items() if value is not None)
    sentence = f"{claim.metric} {bound}{circumstances}"
    off = claim.ablation
    if off is None:
        return sentence
    worse = [] if off.ratio_at_least is None else [f">= {off.ratio_at_least:g} x as much"]
    worse += [] if off.gap_at_least is None else [f"lower by >= {off.gap_at_least:g}"]
    return f"{sentence}; with {_settings(off.set)} {' and '.join(worse)}"


def _settings(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {json.dumps(value)}" for key, value in changes.items())


_METHODS_PREAMBLE = """# Methods

Written by `python -m tools claims` (`make claims`) from `docs/evidence.json`; not edited by hand.

"Claim holds" means that `distillery check RECIPE` passed: the result against a reference and against the same recipe
with the method's key part off, in one run. The figures are in [evidence.md](evidence.md).
"""

_PREAMBLE = """# Evidence

Written by `python -m tools claims` (`make claims`) from `docs/evidence.json`; not edited by hand.

A claim is a comparison inside one run: the recipe as it is, against a reference measured beside it or a fixed
bound, and against the same recipe with the method's key part off. A claim that does not hold is listed as such.
`measured`, `reference` and `ablation` are values of the claim's metric; `seconds` is the time of all runs of the
check, without a teacher or judge that had to be trained first. Fréchet distances use the features of the judge
that the recipe's `[evaluate]` table names, on its `num_samples` pictures and its `seed`. `commit` is the checkout
that was measured; `-dirty` says that it had changes of its own.
"""
