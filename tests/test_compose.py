"""The deployment files: valid compose files, in step with the settings and metrics that they name."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from distill_service.jobs.database import Database
from distill_service.jobs.metrics import JobTableCollector, WorkerMetrics
from distill_service.jobs.table import MULTI
from distill_service.metrics import DiskCollector
from distill_service.settings import Settings
from distillery_sampler.metrics import Metrics
from distillery_sampler.settings import SamplerSettings
from distillery_trainer.server import CallMetrics
from distillery_trainer.worker import DEFAULT_QUEUES

ROOT = Path(__file__).resolve().parents[1]
FILES = ("docker-compose.yml", "docker-compose.gpu.yml")
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / FILES[0]).read_text())
SERVICES: dict[str, dict] = COMPOSE["services"]
GPU: dict[str, dict] = yaml.safe_load((ROOT / FILES[1]).read_text())["services"]
OURS = ("trainer", "trainer-worker", "trainer-multi", "converter", "sampler")
WANTED = {*OURS, "redis", "postgres", "prometheus", "grafana"}
DEFAULTS = {name: field.default for name, field in Settings.model_fields.items()}
SETTINGS = {
    field.validation_alias or f"DISTILLERY_{name.upper()}" for name, field in Settings.model_fields.items()
} | {f"DISTILLERY_SAMPLER_{name.upper()}" for name in SamplerSettings.model_fields}


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def plain(value: str) -> str:
    """A value with its `${NAME:-default}` at the default."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)


def mounts(service: str) -> dict[str, str]:
    """Target -> source of a service's volumes."""
    pairs = [plain(entry).split(":")[:2] for entry in SERVICES[service]["volumes"]]
    return {target: source for source, target in pairs}


def requirements(*arguments: str) -> str:
    command = [sys.executable, ROOT / "deploy" / "requirements.py", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_compose_files_are_valid_by_the_compose_specification():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", *FILES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_validator_would_notice_a_misspelt_key(tmp_path):
    wrong = (ROOT / FILES[0]).read_text().replace("stop_grace_period", "stop_grace_time")
    (tmp_path / "compose.yml").write_text(wrong)
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        "compose.yml",
    ]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode != 0


def test_the_whole_stack_is_there_and_each_part_says_whether_it_is_well():
    assert set(SERVICES) == WANTED | {"secrets"}
    assert all("test" in SERVICES[name]["healthcheck"] for name in WANTED)
    assert all(SERVICES[name]["restart"] == "unless-stopped" for name in WANTED)
    assert all(SERVICES[name]["read_only"] is True for name in WANTED)


def test_what_not_everybody_needs_is_a_profile_and_the_stack_is_whole_without_it():
    profiles = {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service}
    observability = ["observability"]
    assert profiles == {"prometheus": observability, "grafana": observability, "trainer-multi": ["multi"]}
    for name in set(SERVICES) - set(profiles):
        assert not set(SERVICES[name].get("depends_on", ())) & set(profiles)


@pytest.mark.parametrize("services", [SERVICES, GPU], ids=FILES)
def test_every_image_has_a_fixed_tag(services):
    for service in services.values():
        _, _, tag = plain(service["image"]).partition(":")
        assert re.search(r"\d", tag), service["image"]


def test_ports_are_published_on_this_machine_only_and_are_the_settings_defaults():
    ports = {name: [plain(port) for port in service.get("ports", ())] for name, service in SERVICES.items()}
    published = [port.rsplit(":", 2) for some in ports.values() for port in some]
    assert {host for host, _, _ in published} == {"127.0.0.1"}
    assert all(outside == inside for _, outside, inside in published)
    assert ports["trainer"] == [f"127.0.0.1:{DEFAULTS['jobs_port']}:{DEFAULTS['jobs_port']}"]
    assert ports["sampler"] == [f"127.0.0.1:{DEFAULTS['sampler_port']}:{DEFAULTS['sampler_port']}"]
    assert SERVICES["trainer"]["healthcheck"]["test"][-1] == f"127.0.0.1:{DEFAULTS['jobs_port']}"
    assert SERVICES["sampler"]["healthcheck"]["test"][-1] == f"127.0.0.1:{DEFAULTS['sampler_port']}"


@pytest.mark.parametrize("name", OURS)
def test_every_variable_is_a_setting_and_its_value_is_allowed(name):
    environment = {**SERVICES[name]["environment"], **GPU.get(name, {}).get("environment", {})}
    assert set(environment) <= SETTINGS
    values = {key.removeprefix("DISTILLERY_").lower(): plain(value) for key, value in environment.items()}
    aliased = {str(field.validation_alias).lower() for field in Settings.model_fields.values()}
    Settings(**{key: value for key, value in values.items() if key in DEFAULTS})
    others = {key: value for key, value in values.items() if key not in DEFAULTS and key not in aliased}
    sampler = {key.removeprefix("sampler_"): value for key, value in others.items()}
    SamplerSettings(**sampler)


@pytest.mark.parametrize("name", OURS)
def test_folders_that_the_settings_name_are_volumes(name):
    environment, mounted = SERVICES[name]["environment"], mounts(name)
    assert mounted[plain(environment["DISTILLERY_STORE_URL"])] == "store"
    assert environment["DISTILLERY_CACHE_DIR"] in mounted
    if name != "sampler":  # which neither runs jobs nor knows the database
        assert mounted[environment["DISTILLERY_RUNS_DIR"]] == "runs"
        assert mounted["/run/secrets"] == "secrets"
        assert mounted[environment["DISTILLERY_DATA_ROOTS"]] == "data"
        assert [entry for entry in SERVICES[name]["volumes"] if entry.endswith(":/data:ro")]


def test_named_volumes_are_declared_and_used_and_bound_files_exist():
    sources = {source for name in SERVICES for source in mounts(name).values()}
    named = {source for source in sources if not source.startswith(".")}
    assert named == set(COMPOSE["volumes"])
    assert all((ROOT / source).exists() for source in sources - named)


@pytest.mark.parametrize("name", OURS)
def test_our_services_are_confined_and_run_a_module_that_exists(name):
    service = SERVICES[name]
    assert service["init"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "/tmp" in service["tmpfs"]
    assert service["command"][:2] == ["python", "-m"]
    assert importlib.util.find_spec(service["command"][2]) is not None
    assert (ROOT / service["build"]["dockerfile"]).is_file()


def test_a_worker_has_time_to_write_its_checkpoint():
    for name in ("trainer-worker", "trainer-multi", "converter"):
        assert seconds(SERVICES[name]["stop_grace_period"]) >= DEFAULTS["stop_grace_s"] + 20
    own = SamplerSettings.model_fields["grace_s"].default
    assert seconds(SERVICES["sampler"]["stop_grace_period"]) > own
    assert SERVICES["trainer-worker"]["shm_size"] == "2gb"


def queues(services: dict[str, dict], name: str) -> set[str]:
    command = services.get(name, {}).get("command") or SERVICES[name]["command"]
    return set(command[3:]) or set(DEFAULT_QUEUES)


def test_jobs_of_several_processes_go_to_the_worker_that_owns_all_gpus():
    assert queues(SERVICES, "trainer-worker") == set(DEFAULT_QUEUES)  # without GPUs any worker runs them
    assert queues(GPU, "trainer-worker") == set(DEFAULT_QUEUES) - {MULTI}
    for services in (SERVICES, GPU):
        assert queues(services, "trainer-multi") == {MULTI}
    assert SERVICES["trainer-multi"]["healthcheck"]["test"][-1] == MULTI
    counts = {
        name: service["deploy"]["resources"]["reservations"]["devices"][0]["count"]
        for name, service in GPU.items()
    }
    assert counts == {"trainer-worker": 1, "trainer-multi": "all", "converter": 1, "sampler": 1}


def test_redis_keeps_its_messages_and_never_drops_one():
    command = " ".join(SERVICES["redis"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command


def test_the_gpu_file_changes_known_services_and_asks_for_gpus():
    assert set(GPU) <= set(SERVICES)
    for service in GPU.values():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        assert plain(service["image"]).endswith("-gpu")
        assert "/cu" in plain(service["build"]["args"]["TORCH_INDEX_URL"])


def test_secrets_are_made_once_and_read_by_the_settings(tmp_path):
    script = ["sh", ROOT / "deploy" / "secrets.sh", tmp_path]
    subprocess.run(script, check=True)
    first = {path.name: path.read_text() for path in tmp_path.iterdir()}
    subprocess.run(script, check=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == first
    values = Settings(_secrets_dir=tmp_path)
    assert values.database_url == (
        f"postgresql+psycopg://distillery:{first['postgres_password']}@postgres:5432/distillery"
    )
    assert values.broker_url == f"redis://:{first['redis_password']}@redis:6379/0"
    assert first["redis.conf"] == f"requirepass {first['redis_password']}\n"
    assert len({first[name] for name in first if name.endswith("password")}) == 3
    used = {
        word
        for text in (ROOT / name for name in FILES)
        for word in re.findall(r"/run/secrets/([\w.]+)", text.read_text())
    }
    assert used <= set(first)


# -- images


def test_images_are_slim_and_do_not_run_as_root():
    assert re.findall(r"^ARG PYTHON_IMAGE=(.*)$", DOCKERFILE, re.M) == ["python:3.11-slim-bookworm"]
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.M)
    assert bases == ["${PYTHON_IMAGE}"] * 2 + ["runtime"] * 3
    assert re.findall(r"^USER (\S+)$", DOCKERFILE, re.M) == ["10001:10001"]


@pytest.mark.parametrize("service", ["trainer", "converter", "sampler"])
def test_an_image_holds_what_its_service_needs(service):
    build = SERVICES[service]["build"]
    packages = requirements(*plain(build["args"]["EXTRAS"]).split())
    assert "celery" in packages or service == "sampler"
    assert "torch" in packages
    assert "typer" in packages  # of `distillery health`


@pytest.mark.parametrize("service", ["trainer", "converter", "sampler"])
def test_an_image_alone_runs_what_compose_runs(service):
    stage = DOCKERFILE.partition(f"FROM runtime AS {SERVICES[service]['build']['target']}\n")[2]
    assert json.loads(stage.splitlines()[0].removeprefix("CMD ")) == SERVICES[service]["command"]


def test_a_sampler_without_torch_can_be_built():
    example = re.findall(r'EXTRAS="(sampler .*)" \.$', DOCKERFILE, re.M)[0]
    assert "torch" not in requirements(*example.split())


@pytest.mark.parametrize("service", OURS)
def test_an_image_takes_the_cpu_build_of_torch_unless_told_otherwise(service):
    assert SERVICES[service]["build"]["dockerfile"] == "deploy/Dockerfile"
    arguments = SERVICES[service]["build"]["args"]
    default = plain(arguments["TORCH_INDEX_URL"])
    assert default.endswith("/whl/cpu")
    assert f"ARG TORCH_INDEX_URL={default}\n" in DOCKERFILE
    assert set(arguments) <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.M))


def test_the_stacks_sampler_serves_scenes_and_models_without_an_export():
    packages = requirements(*plain(SERVICES["sampler"]["build"]["args"]["EXTRAS"]).split())
    assert "torch" in packages
    assert "onnxruntime" in packages


def test_the_gpu_sampler_never_installs_both_builds_of_onnxruntime():
    packages = requirements(*GPU["sampler"]["build"]["args"]["EXTRAS"].split())
    assert "onnxruntime-gpu>" in packages
    assert "onnxruntime>" not in packages


def test_the_build_context_holds_what_the_images_copy_and_little_else():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.M)
        for source in line.split()
    }
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)


# -- verification


@pytest.mark.parametrize(
    "script",
    [
        "deploy/verify.sh",
        "deploy/verify/bases.sh",
        "deploy/verify/page.sh",
        "deploy/verify/postgres/entrypoint.sh",
    ],
)
def test_the_verification_scripts_are_shell_that_parses(script):
    assert subprocess.run(["bash", "-n", ROOT / script], capture_output=True).returncode == 0


def test_stand_ins_are_made_for_the_base_images_that_the_stack_names():
    script = (ROOT / "deploy/verify/bases.sh").read_text()
    for name in ("postgres", "redis", "prometheus"):
        assert SERVICES[name]["image"] in script
        assert (ROOT / "deploy/verify" / name / "Dockerfile").is_file()
    assert SERVICES["grafana"]["image"] in script
    assert "python:3.11-slim-bookworm" in script


def test_the_log_of_a_verified_run_replaces_the_one_on_the_page(tmp_path):
    page, log = tmp_path / "page.md", tmp_path / "log.txt"
    page.write_text("before\n<!-- verify -->\n<!-- /verify -->\nafter\n")
    for said in ("first", "second"):
        log.write_text(f"step  {said}\n")
        done = subprocess.run(["sh", ROOT / "deploy/verify/page.sh", log, page], capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")
    expected = "before\n<!-- verify -->\n```text\nstep  second\n```\n<!-- /verify -->\nafter\n"
    assert page.read_text() == expected


def test_the_page_tells_of_a_verified_run_without_naming_a_machine():
    page = (ROOT / "docs/deployment.md").read_text()
    log = page.partition("<!-- verify -->\n")[2].partition("<!-- /verify -->")[0]
    if not log:
        pytest.skip("no whole run is on the page yet: deploy/verify.sh --write puts one there")
    for step in (
        "compose up",
        "health of sampler",
        "convert it to ONNX",
        "Prometheus scrapes every process",
        "the same models, picture and view",
    ):
        assert re.search(rf"^{step}.* ok|^{step}.*ok$", log, re.M), step
    assert "FAILED" not in log
    assert not re.search(r"(^|\s)/(tmp|home|root|work|opt)/", log)


# -- observability


def exposed_metrics(folder: Path) -> set[str]:
    """Names of all series that the processes serve, from their real registries."""
    jobs = CollectorRegistry()
    jobs.register(JobTableCollector(Database.open(f"sqlite:///{folder / 'jobs.db'}")))
    CallMetrics(jobs)
    jobs.register(DiskCollector({"store": folder}))
    families = [
        family
        for registry in (jobs, WorkerMetrics().registry, Metrics().registry)
        for family in registry.collect()
    ]
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    return {family.name + suffix for family in families for suffix in suffixes[family.type]}


def expressions() -> list[str]:
    dashboard = json.loads((ROOT / "deploy/grafana/dashboards/distillery.json").read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    return shown + [rule["expr"] for rule in rules()]


def rules() -> list[dict]:
    groups = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_dashboard_and_rules_ask_only_for_metrics_that_are_served(tmp_path):
    known = exposed_metrics(tmp_path) | {rule["record"] for rule in rules() if "record" in rule}
    asked = {
        name for expression in expressions() for name in re.findall(r"\bdistillery[_:][\w:]+", expression)
    }
    assert len(asked) > 20
    assert asked <= known


def test_every_alert_says_what_is_wrong():
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len(alerts) >= 5
    assert all(rule["annotations"]["summary"] and rule["labels"]["severity"] for rule in alerts)


def test_prometheus_scrapes_the_ports_that_the_settings_name():
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    targets = set()
    for job in config["scrape_configs"]:
        targets |= {target for entry in job.get("static_configs", ()) for target in entry["targets"]}
        targets |= {
            f"{name}:{entry['port']}" for entry in job.get("dns_sd_configs", ()) for name in entry["names"]
        }
    ports = {name: name for name in ("converter", "sampler")} | {
        "trainer": "jobs",
        "trainer-worker": "worker",
        "trainer-multi": "worker",
    }
    wanted = {f"{service}:{DEFAULTS[f'{setting}_metrics_port']}" for service, setting in ports.items()}
    assert targets == wanted | {"127.0.0.1:9090"}


def test_the_dashboard_is_found_and_asks_the_provisioned_source():
    dashboard = json.loads((ROOT / "deploy/grafana/dashboards/distillery.json").read_text())
    folder = ROOT / "deploy/grafana/provisioning"
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((folder / "dashboards/distillery.yml").read_text())["providers"]
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"] if panel["type"] != "row"} == {
        source["uid"]
    }
    assert source["url"] == "http://prometheus:9090"
    assert mounts("grafana")[provider["options"]["path"]] == "./deploy/grafana/dashboards"


# -- Makefile


def test_the_makefile_has_the_promised_targets_with_short_recipes():
    text = (ROOT / "Makefile").read_text()
    recipes = re.findall(r"^([a-z$(][\w$()]*):.*\n((?:\t.*\n)*)", text, re.M)
    assert {"setup", "demo", "test", "lint", "proto", "claims", "bench"} <= {name for name, _ in recipes}
    assert all(len(lines.splitlines()) <= 3 for _, lines in recipes)


def test_the_extras_that_setup_installs_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"all", "dev"} <= set(extras)
    assert "[all,docs,dev]" in (ROOT / "Makefile").read_text()
