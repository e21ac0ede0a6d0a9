"""The pages say what is there: commands, options, snippets, links, settings, tables."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.data import source_types
from distill_core.errors import ERROR_CODES
from distill_core.kinds.cards import described
from distill_core.methods import find_method
from distill_core.recipe import load_recipe, parse_overrides
from distill_service.settings import Settings
from distillery_cli.app import app
from distillery_cli.jobs.pipelines import read_pipeline
from distillery_cli.terminal.parsing import split_sweep
from distillery_sampler.settings import SamplerSettings
from tests.helpers import REPOSITORY, tiny_context, tiny_trainer
from tests.services.sampler.helpers import SamplerProcess, publish_denoiser
from tools.claims import COLUMNS, write_documents
from tools.claims import kept_outcomes as kept

ROOT = REPOSITORY
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "services/*/README.md", "examples/*.md")
    for path in ROOT.glob(pattern)
)
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CLI = typer.main.get_command(app)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every `distillery …` in shell blocks, indented blocks and inline code."""
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"^ {4}(distillery .*)$", text, re.M)
    lines += re.findall(r"`(distillery [a-z][^`]*)`", text)
    for line in lines:
        words = shlex.split(line, comments=True)
        if words and words[0] == "distillery":
            yield words[1:]


COMMANDS = [
    pytest.param(command, id=f"{name_of(page)}: {' '.join(command)[:60]}")
    for page in PAGES
    for command in commands(page.read_text(encoding="utf-8"))
]
TRAININGS = [
    case
    for case in COMMANDS
    if case.values[0][0] in ("train", "submit") and {"-s", "--sweep"} & {*case.values[0]}
]
SNIPPETS = [
    pytest.param(code, id=f"{name_of(page)}: {code.splitlines()[0][:50]}")
    for page in PAGES
    for code in blocks(page.read_text(encoding="utf-8"), "python")
]


def parsed(command: list[str]) -> typer.Context:
    """The context of the innermost command; raises on an unknown command, option or a missing argument."""
    group, parent = CLI, None
    while hasattr(group, "resolve_command"):
        parent = typer.Context(group, parent=parent)
        _, group, command = group.resolve_command(parent, command)
    return group.make_context(group.name, list(command), parent=parent)


def test_the_readme_begins_with_the_two_commands():
    first = re.findall(r"^ {4}make (\w+)", README.split("##")[0], re.M)
    assert first == ["demo", "test"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists_with_these_options(command):
    parsed(command)


def test_the_parser_of_this_test_notices_a_wrong_option():
    with pytest.raises(typer.BadParameter.__bases__[0]):
        parsed(["train", "dmd2", "--steps", "3"])
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("command", TRAININGS)
def test_every_override_is_a_key_of_its_recipe(command):
    params = parsed(command).params
    single, axes = split_sweep(params["overrides"] or [], params.get("sweep") or [])
    each = [f"{key}={values[0]}" for key, values in axes.items()]
    recipe = load_recipe(params["recipe"], parse_overrides([*single, *each]))
    find_method(recipe.method).Config.parse(recipe.config, where="config")
    assert recipe.data is not None
    source_types()[recipe.data["name"]].Config.parse(recipe.data, where="data")


def test_the_pipeline_that_the_readme_submits_can_be_read():
    found = [command for command in commands(README) if "--pipeline" in command]
    assert found
    for command in found:
        assert read_pipeline(ROOT / command[command.index("--pipeline") + 1]).stages


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    targets |= {f"prove-{proof.stem.removeprefix('test_')}" for proof in ROOT.glob("tests/proofs/test_*.py")}
    named = {
        name
        for page in PAGES
        for name in re.findall(r"(?:`|^\s*)make ([a-z]+(?:-[a-z]+)*)", page.read_text(encoding="utf-8"), re.M)
    }
    assert {"demo", "test", "setup", "lint", "claims"} <= named <= targets


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith(("http://", "https://", "#")):
            assert (page.parent / link.split("#")[0]).exists(), link


@pytest.mark.parametrize("code", SNIPPETS)
def test_every_python_snippet_compiles(code):
    compile(code, "snippet", "exec")


# -- snippets that run


def run_snippet(words: str, old: str, new: str) -> dict[str, object]:
    """Run the README's one snippet that contains `words`, with `old` replaced; its variables."""
    (code,) = [code for code in blocks(README, "python") if words in code]
    assert old in code
    variables: dict[str, object] = {}
    exec(compile(code.replace(old, new), words, "exec"), variables)
    return variables


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> ArtifactStore:
    """A DMD2 student of a real recipe after two steps, as a store holds it; version 2 has the ONNX export."""
    from distillery_converter.convert import convert

    folder = tmp_path_factory.mktemp("readme")
    trainer = tiny_trainer("dmd2", tiny_context(folder), folder / "run")
    trainer.train()
    trainer.method.main.save(folder / "model")
    store = ArtifactStore(folder / "store")
    store.publish(folder / "model", Manifest(name="dmd2-digits", **described(trainer.method.main)))
    assert convert(store, "dmd2-digits@1", "onnx-fp32").version == 2
    return store


def expected(store: ArtifactStore, x: torch.Tensor) -> torch.Tensor:
    from distill_core.networks.diffusers_io import load_denoiser

    denoiser = load_denoiser(store.fetch("dmd2-digits@1"))
    with torch.no_grad():
        return denoiser(x, torch.full((len(x),), 5.0), {"class_label": torch.arange(len(x))})


def test_the_student_opens_in_plain_diffusers_as_the_readme_says(student):
    folder = student.fetch("dmd2-digits@1")
    variables = run_snippet("DiTTransformer2DModel", "dmd2-digits/versions/1", str(folder))
    torch.testing.assert_close(variables["digits"], expected(student, variables["x"]), atol=1e-5, rtol=1e-4)


def test_the_export_runs_in_plain_onnxruntime_as_the_readme_says(student):
    folder = student.fetch("dmd2-digits@2")
    variables = run_snippet("InferenceSession", "dmd2-digits/versions/2", str(folder))
    wanted = expected(student, torch.from_numpy(variables["x"])).numpy()
    np.testing.assert_allclose(variables["digits"], wanted, atol=1e-3)


def test_both_clients_of_the_readme_get_the_same_digits(tmp_path):
    store = ArtifactStore(tmp_path / "store")
    publish_denoiser(store, tmp_path / "model", name="dmd2-digits")
    with SamplerProcess(store.url) as sampler:
        ours = run_snippet("SamplerClient", "127.0.0.1:50052", sampler.address)
        triton = run_snippet("tritonclient", "127.0.0.1:50052", sampler.address)
        assert np.stack(ours["digits"]).shape == triton["images"].shape == (10, 8, 8, 1)
        assert np.stack(ours["digits"]).dtype == triton["images"].dtype == np.uint8
        with sampler.client() as client:  # Triton's request gives a seed an image, ours one seed for all
            same = client.generate("dmd2-digits", class_labels=range(10), seeds=range(10))
        np.testing.assert_array_equal(np.stack(same), triton["images"])


def test_the_worked_example_of_contributing_trains_as_it_stands(tmp_path, monkeypatch, context):
    """Its file and its recipe, changed in size and pace only, found as an installed package's method."""
    from distill_core import api

    (code,), (recipe,) = blocks(CONTRIBUTING, "python"), blocks(CONTRIBUTING, "toml")
    (tmp_path / "ode_regression.py").write_text(code)
    (tmp_path / "ode_regression.toml").write_text(recipe)
    info = tmp_path / "worked_example-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: worked-example\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[distillery.methods]\node_regression = ode_regression\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    size = {"steps": 60, "batch_size": 16, "log_every": 1, "evaluate": {}, "optim.student.lr": 2e-3}
    loaded = load_recipe(str(tmp_path / "ode_regression.toml"), size)
    assert loaded.check is not None
    assert loaded.check.ablation is not None
    losses: list[float] = []
    api.train(
        loaded.model_copy(update={"publish": None}),
        tmp_path / "run",
        context,
        listener=lambda e: losses.append(e["values"]["student_loss"]) if e["event"] == "metrics" else None,
    )
    sys.modules.pop("ode_regression", None)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert (tmp_path / "run" / "model" / "transformer" / "config.json").is_file()


# -- pages that repeat what code says


def test_the_tables_of_methods_and_evidence_are_those_of_the_kept_results(tmp_path):
    """`python -m tools claims --no-run` would change nothing."""
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs/scenes.json", tmp_path / "docs")
    write_documents(tmp_path, kept(ROOT))
    for name in ("README.md", "docs/methods.md", "docs/evidence.md", "docs/evidence.json"):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), (
            f"{name}: python -m tools claims --no-run"
        )
    assert all(column in (ROOT / "docs/evidence.md").read_text() for column in COLUMNS)


def test_the_deployment_page_lists_every_setting():
    page = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `((?:DISTILLERY|OTEL)_\w+)` \|", page, re.M)
    wanted = [
        field.validation_alias or f"DISTILLERY_{name.upper()}"
        for name, field in Settings.model_fields.items()
    ]
    wanted += [f"DISTILLERY_SAMPLER_{name.upper()}" for name in SamplerSettings.model_fields]
    assert sorted(listed) == sorted(wanted)


def test_the_numbers_of_the_deployment_page_are_the_defaults():
    page = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `DISTILLERY_(\w+)` \| `([\d.]+)` \|", page, re.M))
    fields = {name.upper(): field for name, field in Settings.model_fields.items()}
    fields |= {f"SAMPLER_{name.upper()}": field for name, field in SamplerSettings.model_fields.items()}
    assert len(shown) > 20
    for name, value in shown.items():
        assert str(fields[name].default) in (value, f"{value}.0"), name


def test_the_table_of_errors_is_the_code_s():
    page = (ROOT / "docs/conventions.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| (\d+) \| (\w+) \| (yes|no) \|$", page, re.M)
    said = {name: (int(code), status, again == "yes") for name, code, status, again in rows}
    assert said == {cls.__name__: tuple(meaning) for cls, meaning in ERROR_CODES.items()}


def test_a_decision_fits_on_a_page_and_has_a_number_of_its_own():
    pages = sorted((ROOT / "docs/decisions").glob("*.md"))
    numbers = [page.name[:4] for page in pages]
    assert numbers == [f"{number:04}" for number in range(1, len(pages) + 1)]
    for page in pages:
        lines = page.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 40
        assert lines[0].startswith(f"# {page.name[:4]}: ")
