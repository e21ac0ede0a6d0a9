"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer

from distill_core.api import Result
from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.errors import ConfigError, NotFound
from distill_core.recipe import load_recipe, parse_overrides
from distill_service.settings import load_settings, settings
from distillery.v1 import jobs_pb2
from distillery_cli.app import app, main
from distillery_cli.jobs.listing import exit_code
from distillery_cli.jobs.pipelines import flattened, pipeline_message, read_pipeline
from distillery_cli.jobs.values import job_values
from distillery_cli.models.generate import parse_labels, save_pictures, sheet
from distillery_cli.stack import demo_report as reports
from distillery_cli.stack.demo import serving_command, stack_settings, users_store
from distillery_cli.stack.up import environment
from distillery_cli.terminal.output import duration, emit_json
from tests.helpers import REPOSITORY

DEMO = REPOSITORY / "libs/distillery_cli/distillery_cli/stack/demo_pipeline.toml"
DMD2 = REPOSITORY / "libs/distill_core/distill_core/recipes/dmd2.toml"
TINY = ["-s", "steps=2", "-s", "network.args.width=8"]


def commands(group: typer.core.TyperGroup, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    found: dict[tuple[str, ...], object] = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= commands(command, (*prefix, name))
        else:
            found[(*prefix, name)] = command
    return found


COMMANDS = commands(typer.main.get_command(app))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """State, store and cache of a user of their own."""
    monkeypatch.setenv("DISTILLERY_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("DISTILLERY_CACHE_DIR", str(tmp_path / "cache"))
    settings.cache_clear()
    yield tmp_path
    settings.cache_clear()


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_help_loads_no_model_library():
    script = (
        "import sys; from distillery_cli import main; code = main(['--help']);"
        "print({'torch', 'grpc', 'celery', 'diffusers', 'matplotlib'} & set(sys.modules), file=sys.stderr);"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "set()"
    assert "demo" in done.stdout


def test_the_commands_of_the_architecture_are_there():
    wanted = "demo up submit jobs watch cancel retry train check methods reference models convert alias generate render"
    assert {(name,) for name in (*wanted.split(), "doctor")} <= set(COMMANDS)


@pytest.mark.parametrize("path", sorted(COMMANDS), ids=" ".join)
def test_every_command_has_json_and_an_example(path, capsys):
    code, out, _ = run(capsys, *path, "--help")
    assert code == 0
    assert "--json" in out
    assert COMMANDS[path].epilog.startswith("Example")
    assert f"distillery {' '.join(path)}" in COMMANDS[path].epilog


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["train", "edm_digit"], 67, "did you mean 'edm_digits'?"),
        (["train", "edm_digits", "-s", "stepps=3"], 2, "unknown key stepps; did you mean 'steps'?"),
        (["train", "edm_digits", "-s", "steps"], 2, "is not KEY=VALUE"),
        (["train", "edm_digits", "-s", "steps=-1"], 2, "steps = -1 is not allowed"),
        (["train", "nowhere.toml"], 67, "recipe file nowhere.toml does not exist"),
        (["train", "dmd2.toml"], 67, "recipe file dmd2.toml does not exist; did you mean the recipe 'dmd2'?"),
        (["submit", "nowhere.yaml"], 67, "recipe file nowhere.yaml does not exist; a recipe is a .toml file"),
        (["train", "/"], 2, "/ is a folder, and a recipe is a .toml file"),
        (["train", __file__], 2, "is a file, but no recipe: a recipe is a .toml file"),
        (["submit", __file__], 2, "is a file, but no recipe: a recipe is a .toml file"),
        (["check", __file__], 2, "is a file, but no recipe: a recipe is a .toml file"),
        (
            ["train", str(DEMO)],
            2,
            "this is a pipeline, not a recipe; queue it with: distillery submit --pipeline",
        ),
        (["submit", "--pipeline", str(DMD2)], 2, f"{DMD2} is a recipe, not a pipeline; queue it with"),
        (["train", "edm_digits", "-s", "lr=1e-4"], 2, "unknown key lr; did you mean 'optim.teacher.lr'?"),
        (["train", "dmd2", "-s", "lr=1"], 2, "did you mean 'optim.student.lr' or 'optim.fake_score.lr'?"),
        (
            ["train", "edm_digits", "-s", "optim.lr=1e-4"],
            2,
            "unknown key optim.lr; did you mean 'optim.teacher.lr'?",
        ),
        (["train", "edm_digits", "-s", "weight_decay=1"], 2, "did you mean 'optim.teacher.weight_decay'?"),
        (
            ["train", "dmd2", "-s", "critic_steps=3"],
            2,
            "unknown key critic_steps; did you mean 'config.critic_steps'?",
        ),
        (["train", "edm_digits", "-s", "rank=4"], 2, "unknown key rank; did you mean 'student.lora.rank'?"),
        (["train", "edm_digits", "-s", "optim.teacher.lr=x"], 2, "optim.teacher.lr = 'x' is not allowed"),
        (["check", "edm_digits_"], 67, "did you mean"),
        (["methods", "dmd"], 67, "did you mean 'dmd2'?"),
        (["methods", "--schema"], 2, "needs a method's name"),
        (["models", "../x"], 2, "is not a plain name"),
        (["models", "nope"], 67, "no model is called 'nope'"),
        (["alias", "nope@1", "prod"], 67, "no model is called 'nope'"),
        (["submit"], 2, "give either a RECIPE or --pipeline FILE"),
        (["submit", "--pipeline", "nowhere.toml"], 67, "pipeline file nowhere.toml cannot be read"),
        (["generate", "x", "--labels", "a"], 2, "not a list of numbers"),
        (["generate", "x", "--labels", "²"], 2, "not a list of numbers"),
        (["generate", "x", "--out", "x.xyz"], 2, "no kind of picture that can be saved; end it in .png"),
        (["render", "x", "--orbit", "0"], 2, "--orbit 0 is not allowed"),
        (["generate", "x", "--seed", "-5"], 2, "seeds are 0 to 2**63 - 1"),
        (["generate", "x", "--labels", "1", "--prompt", "p"], 2, "not both"),
        (["generate", "x", "--count", "0"], 2, "--count 0 is not allowed"),
        (["tran"], 2, "no such command 'tran'"),
        (["train"], 2, "missing argument"),
        (["jobs", "--limit", "x"], 2, "see distillery jobs --help"),
        (["health", "grpc", "127.0.0.1:1"], 75, "no server answers at 127.0.0.1:1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_gets_one_sentence_and_its_exit_code(arguments, code, sentence, home, capsys):
    given, out, err = run(capsys, *arguments)
    assert given == code
    assert sentence in err
    assert err.rstrip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
    assert out == ""


def test_running_out_of_memory_is_a_sentence_with_its_own_exit_code(home, monkeypatch, capsys):
    def full(*_args, **_options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr("distill_core.api.train", full)
    code, _, err = run(capsys, "train", "judge_digits")
    assert code == 70
    assert "out of memory" in err
    assert "lower batch_size" in err


def test_models_lists_the_others_beside_a_damaged_one(home, capsys):
    store = ArtifactStore(settings().store_url)
    (home / "model").mkdir()
    for _ in range(2):
        store.publish(home / "model", Manifest(name="digits", kind="denoiser"))
    Path(store.root, "digits", "versions", "1", "manifest.json").write_text("{")
    code, out, err = run(capsys, "models", "--json")
    assert code == 0
    assert [entry["kind"] for entry in json.loads(out)] == ["damaged", "denoiser"]
    assert "digits/versions/1/manifest.json" in err


def test_a_stopped_run_says_the_whole_command_that_continues_it(home, monkeypatch, capsys):
    stopped = Result(home, 7, stopped=True)
    monkeypatch.setattr("distill_core.api.train", lambda *_args, **_options: stopped)
    code, _, err = run(capsys, "train", "judge_digits", *TINY, "--out", str(home / "a run"))
    assert code == 143
    wanted = f"distillery train judge_digits {' '.join(TINY)} --out '{home / 'a run'}'"
    assert err.splitlines()[-1] == f"stopped at step 7; continue with: {wanted}"


def test_resuming_with_another_recipe_says_what_differs(home, monkeypatch, capsys):
    monkeypatch.setattr("distill_core.api.train", lambda *_args, **_options: Result(home, 7, stopped=True))
    folder = home / "run"
    (folder / "checkpoints" / "000000007").mkdir(parents=True)
    (folder / "recipe.toml").write_text(load_recipe("judge_digits", parse_overrides(TINY[1::2])).to_toml())

    def said(*more: str) -> str:
        return run(capsys, "train", "judge_digits", *TINY, *more, "--out", str(folder))[2]

    assert "begun with" not in said("-s", "seed=5")  # there is nothing to go on from yet
    (folder / "checkpoints" / "000000007" / "state.json").write_text("{}")
    assert "begun with" not in said()
    assert "begun with seed = 0, now 5; give another --out to begin anew" in said("-s", "seed=5")
    (folder / "recipe.toml").write_text("method = ")
    assert "begun with" not in said("-s", "seed=5")


def test_a_run_folder_takes_one_training_at_a_time(home, capsys):
    folder = home / "run"
    folder.mkdir()
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = run(capsys, "train", "judge_digits", *TINY, "--out", str(folder))
    assert code == 75
    assert f"another process trains in {folder}; wait for it, or give another --out" in err
    assert [entry.name for entry in folder.iterdir()] == [".lock"]


def test_no_server_is_said_with_its_address(home, monkeypatch, capsys):
    monkeypatch.setenv("DISTILLERY_JOBS_PORT", "1")
    settings.cache_clear()
    code, _, err = run(capsys, "jobs")
    assert code == 75
    assert "no server answers at 127.0.0.1:1 (Connection refused); `distillery up` starts one" in err


def test_debug_shows_the_traceback(home):
    with pytest.raises(NotFound):
        main(["train", "nothing", "--debug"])


def test_methods_are_listed_as_json(capsys):
    code, out, _ = run(capsys, "methods", "--json")
    listed = {entry["name"]: entry for entry in json.loads(out)}
    assert code == 0
    assert listed["dmd2"]["family"] == "diffusion"
    assert listed["dmd2"]["needs"] == ["teacher", "student", "pairs"]
    assert "dmd2" in listed["dmd2"]["recipes"]
    assert all(
        set(entry) == {"name", "family", "paper", "needs", "recipes", "model_recipes"}
        for entry in listed.values()
    )


def test_the_schema_of_a_method_accepts_its_recipe_and_refuses_another_key(capsys):
    jsonschema = pytest.importorskip("jsonschema")
    _, out, _ = run(capsys, "methods", "dmd2", "--schema")
    schema = json.loads(out)
    recipe = json.loads(load_recipe("dmd2").model_dump_json(exclude_none=True))
    jsonschema.validate(recipe, schema)
    recipe["config"]["critic_step"] = 5
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(recipe, schema)


def test_a_model_is_trained_published_listed_and_given_an_alias(home, capsys):
    code, out, _ = run(capsys, "train", "judge_digits", *TINY, "--out", str(home / "run"), "--json")
    trained = json.loads(out)
    assert code == 0
    assert trained["artifact"] == "judge-digits@1"
    assert Path(trained["model"], "model.safetensors").is_file()
    assert run(capsys, "alias", "judge-digits@1", "prod")[0] == 0
    _, out, _ = run(capsys, "models", "--json")
    assert json.loads(out)[0]["aliases"] == ["latest", "prod"] or json.loads(out)[0]["aliases"] == [
        "prod",
        "latest",
    ]
    _, out, _ = run(capsys, "alias", "judge-digits", "--history", "--json")
    assert [move["version"] for move in json.loads(out)] == [1]
    _, out, _ = run(capsys, "models", "judge-digits@prod", "--json")
    assert json.loads(out)["recipe_sha256"]


@pytest.mark.parametrize(("at_least", "code"), [(0.0, 0), (1.1, 1)], ids=["claim holds", "claim fails"])
def test_check_ends_with_one_json_object_and_says_it_by_its_exit_code(at_least, code, home, capsys):
    recipe = load_recipe("judge_digits", {"steps": 2, "network.args.width": 8, "publish": {"name": "x"}})
    claim = recipe.override({"check": {"metric": "accuracy", "at_least": at_least}})
    path = home / "claim.toml"
    path.write_text(claim.to_toml(), encoding="utf-8")
    given, out, _ = run(capsys, "check", str(path))
    verdict = json.loads(out.splitlines()[-1])
    assert given == code
    assert verdict["passed"] is (code == 0)
    assert {"name", "passed", "measured", "ablation", "seconds"} <= set(verdict)


def test_doctor_names_a_folder_that_cannot_be_written(home, monkeypatch, capsys):
    (home / "file").write_text("")
    monkeypatch.setenv("DISTILLERY_STORE_URL", str(home / "file" / "store"))
    settings.cache_clear()
    code, out, _ = run(capsys, "doctor", "--json")
    findings = {finding["what"]: finding for finding in json.loads(out)["findings"]}
    assert code == 1
    assert findings["artifact store"]["state"] == "problem"
    assert findings["torch"]["state"] == "ok"
    assert findings["run folders"]["state"] == "ok"


def test_a_wrong_setting_is_named_by_doctor(home, monkeypatch, capsys):
    monkeypatch.setenv("DISTILLERY_JOBS_PORT", "many")
    settings.cache_clear()
    code, out, _ = run(capsys, "doctor", "--json")
    assert code == 1
    assert "DISTILLERY_JOBS_PORT" in json.dumps(json.loads(out)["findings"])


def test_json_has_no_nan(capsys):
    emit_json({"a": float("nan"), "b": [float("inf"), 1.5]})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5]}


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 s"), (59, "59 s"), (61, "1:01"), (7384, "2:03:04")])
def test_durations_read_well(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("text", "labels"), [("3", [3]), ("0-3", [0, 1, 2, 3]), ("1,1,7-8", [1, 1, 7, 8]), ("", [])]
)
def test_labels_are_numbers_and_ranges(text, labels):
    assert parse_labels(text) == labels


def test_pictures_become_a_sheet_or_a_folder(tmp_path):
    pictures = [np.full((8, 8, 1), value, np.uint8) for value in range(12)]
    assert sheet(pictures).size == (10 * 33 - 1, 2 * 33 - 1)
    assert len(save_pictures(pictures, tmp_path / "many")) == 12
    assert save_pictures(pictures[:1], tmp_path / "one.png") == [tmp_path / "one.png"]


PIPELINE = """
name = "p"
[[stages]]
name = "teacher"
recipe = "edm_digits"
set = { steps = 5, network.args.num_layers = 1 }
[[stages]]
name = "onnx"
convert = "{teacher}"
after = ["teacher"]
"""


def test_a_pipeline_file_becomes_stages(tmp_path):
    (tmp_path / "p.toml").write_text(PIPELINE, encoding="utf-8")
    message = pipeline_message(read_pipeline(tmp_path / "p.toml"), tmp_path)
    teacher, onnx = message.stages
    assert dict(teacher.train.overrides) == {"steps": "5", "network.args.num_layers": "1"}
    assert (onnx.convert.artifact, onnx.convert.target, list(onnx.after)) == (
        "{teacher}",
        "onnx-fp32",
        ["teacher"],
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("recipe =", "recip ="), "unknown key stages.0.recip; did you mean 'recipe'?"),
        (('convert = "{teacher}"', ""), "exactly one of recipe, convert, evaluate"),
        (('name = "onnx"', 'name = "../x"'), "stages.1.name"),
        (("[[stages]]", "[[stages"), "is not valid TOML"),
    ],
)
def test_a_wrong_pipeline_file_is_answered_with_its_key(change, sentence, tmp_path):
    (tmp_path / "p.toml").write_text(PIPELINE.replace(*change), encoding="utf-8")
    with pytest.raises(ConfigError, match=".*") as caught:
        read_pipeline(tmp_path / "p.toml")
    assert sentence in str(caught.value)


def test_nested_tables_become_dotted_keys():
    assert flattened({"a": {"b": 1, "c": {"d": [2]}}, "e": {}}) == {"a.b": 1, "a.c.d": [2], "e": {}}


@pytest.mark.parametrize(
    ("state", "error", "code"),
    [
        ("SUCCEEDED", "", 0),
        ("FAILED", "ConfigError", 2),
        ("FAILED", "DataError", 65),
        ("FAILED", "DivergedError", 68),
        ("FAILED", "OutOfMemory", 70),
        ("FAILED", "RuntimeError", 1),
        ("FAILED", "Overloaded", 1),
        ("CANCELLED", "Cancelled", 143),
    ],
)
def test_a_jobs_outcome_is_an_exit_code(state, error, code):
    job = jobs_pb2.Job(id="a", state=f"JOB_STATE_{state}", error=jobs_pb2.JobError(type=error, message="why"))
    assert exit_code(job) == code


def test_a_job_as_json_has_numbers_and_short_names():
    job = jobs_pb2.Job(id="a", state="JOB_STATE_RUNNING", kind="JOB_KIND_TRAIN")
    job.progress.step = 2**40
    values = job_values(job)
    assert (values["state"], values["kind"], values["progress"]["step"]) == ("RUNNING", "train", 2**40)


def test_a_password_is_not_put_on_a_command_line():
    known = load_settings(broker_url="redis://:secret@host/0", token="secret")
    assert "secret" not in json.dumps(environment(known))
    assert environment(known)["DISTILLERY_JOBS_PORT"] == str(known.jobs_port)


def a_report(**changes) -> reports.Report:
    row = reports.Row(1.0, 0.99, 2.0)
    values = {
        "teacher": row,
        "teacher_one_step": row,
        "student": row,
        "onnx": row,
        "max_abs_difference": 1e-6,
    }
    rest = {"field": {"psnr": 25.0}, "seconds": {"total": 1.0}, "models": {}, "num_samples": 10}
    return reports.Report(**{**values, **rest, **changes})


@pytest.mark.parametrize(
    ("changes", "held"),
    [
        ({}, [True, True, True]),
        ({"student": reports.Row(1.51, 0.99, 1.0)}, [False, True, True]),
        ({"onnx": reports.Row(1.0, 0.94, 1.0)}, [True, False, True]),
        ({"max_abs_difference": 2e-3}, [True, True, False]),
        ({"max_abs_difference": float("nan")}, [True, True, False]),
    ],
)
def test_the_demo_demands_what_the_figures_show(changes, held):
    assert [demand.holds for demand in reports.demands(a_report(**changes))] == held


def test_the_report_has_the_promised_keys():
    values = a_report().values()
    for name in ("teacher", "teacher_one_step", "student", "onnx"):
        assert {"frechet_distance", "accuracy", "ms_per_image"} <= set(values[name])
    assert values["onnx"]["max_abs_difference"] == 1e-6


def test_curves_and_contact_sheet_are_drawn(tmp_path):
    pictures = np.random.default_rng(0).uniform(-1, 1, (13, 1, 8, 8)).astype(np.float32)
    assert reports.grid(pictures).shape == (18, 90)
    reports.save_contact_sheet({"teacher": pictures, "student": pictures}, tmp_path / "sheet.png")
    reports.save_curves(
        {"teacher": [(1, {"teacher_loss": 1.0}), (2, {"teacher_loss": 0.5})]}, tmp_path / "c.png"
    )
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    assert (tmp_path / "c.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("on_path", "typed", "program"),
    [
        (True, "anything", "distillery"),
        (False, "/opt/a venv/bin/distillery", "'/opt/a venv/bin/distillery'"),
        (False, "/lib/distillery_cli/__main__.py", f"{sys.executable} -m distillery_cli"),
        (False, "-c", f"{sys.executable} -m distillery_cli"),
    ],
)
def test_the_next_command_is_one_that_can_be_typed(home, monkeypatch, on_path, typed, program):
    monkeypatch.setattr(
        "distillery_cli.stack.demo.shutil.which", lambda name: f"/bin/{name}" if on_path else None
    )
    monkeypatch.setattr("sys.argv", [typed])
    assert serving_command(str(home / "a b")) == f"{program} up --store '{home}/a b'"


def test_what_the_demo_makes_is_where_the_next_command_looks(home, monkeypatch, capsys):
    settings = stack_settings(home / "demo", users_store())
    store = ArtifactStore(settings.store_url)
    (home / "model").mkdir()
    store.publish(home / "model", Manifest(name="digits", kind="denoiser"))
    assert "digits@1" in run(capsys, "models")[1]
    assert serving_command(settings.store_url).endswith(" up")
    assert settings.state_dir == home / "demo"


@pytest.mark.parametrize("url", ["memory://shared", "{home}/locked/store"])
def test_a_demo_keeps_its_models_where_the_user_s_store_is_not_theirs_to_write(
    url, home, monkeypatch, capsys
):
    (home / "locked").mkdir()
    monkeypatch.setattr(
        "os.access", lambda path, mode: "locked" not in str(path)
    )  # the tests may run as root
    monkeypatch.setenv("DISTILLERY_STORE_URL", url.format(home=home))
    settings.cache_clear()
    own = stack_settings(home / "a demo", users_store()).store_url
    assert own == str(home / "a demo" / "store")
    assert serving_command(own).endswith(f" up --store '{own}'")


def test_another_store_is_read_and_written_where_it_is_named(home, capsys):
    (home / "model").mkdir()
    ArtifactStore(home / "other").publish(home / "model", Manifest(name="digits", kind="denoiser"))
    other = ["--store", str(home / "other")]
    assert run(capsys, "models", "digits")[0] == 67
    assert run(capsys, "models", "digits", *other)[0] == 0
    assert run(capsys, "alias", "digits@1", "prod", *other)[0] == 0
    assert ArtifactStore(home / "other").aliases("digits")["prod"] == 1
    code, out, _ = run(capsys, "train", "judge_digits", *TINY, "--out", str(home / "run"), *other, "--json")
    assert (code, json.loads(out)["artifact"]) == (0, "judge-digits@1")
    assert "judge-digits" in ArtifactStore(home / "other").names()


def test_every_command_that_reads_a_store_takes_another():
    takes = {
        " ".join(path) for path, command in COMMANDS.items() if "store" in {p.name for p in command.params}
    }
    reads = "adapter merge,alias,check,convert-field,demo,doctor,export-scene,models,render,train,up,view"
    reads += ",export-adapter,import"
    assert takes == set(reads.split(","))
