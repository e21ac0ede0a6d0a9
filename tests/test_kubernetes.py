"""The Kubernetes manifests: strictly valid, confined, and in step with the settings, ports and images they name."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from distill_service.jobs.table import MULTI
from distill_service.settings import Settings
from distillery_sampler.settings import SamplerSettings
from distillery_trainer.worker import DEFAULT_QUEUES
from tests.helpers import REPOSITORY

FOLDER = REPOSITORY / "deploy" / "k8s"
VERSION = "1.37"
OVERLAYS = ("base", "overlays/gpu", "overlays/keda", "overlays/monitoring")
FOREIGN = (
    "keda.sh/",
    "monitoring.coreos.com/",
    "kustomize.config.k8s.io/",
)  # their schemas are not Kubernetes'
COMPOSE = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())["services"]
DEFAULTS = {name: field.default for name, field in Settings.model_fields.items()}
PORTS = {
    "trainer": "jobs",
    "trainer-worker": "worker",
    "trainer-multi": "worker",
    "converter": "converter",
    "sampler": "sampler",
}
Document = dict[str, Any]


def documents(folder: Path) -> list[Document]:
    return [
        document
        for path in sorted(folder.rglob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text())
        if document.get("kind") != "Kustomization"
    ]


def rendered(overlay: str) -> list[Document]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed (Debian: kubernetes-client)")
    command = ["kubectl", "kustomize", str(FOLDER / overlay)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def validate(document: Document) -> None:
    """Strictly; of a ScaledJob the Job inside it."""
    if document["kind"] == "ScaledJob":
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
        document = {**job, "spec": document["spec"]["jobTargetRef"]}
    if not document["apiVersion"].startswith(FOREIGN):
        kubernetes_validate.validate(document, VERSION, strict=True)


def pods(found: list[Document]) -> Iterator[tuple[str, Document]]:
    """The name and the pod template's specification of everything that runs."""
    for document in found:
        if document["kind"] == "Deployment":
            yield document["metadata"]["name"], document["spec"]["template"]["spec"]
        if document["kind"] == "ScaledJob":
            yield "trainer-job", document["spec"]["jobTargetRef"]["template"]["spec"]


BASE = documents(FOLDER / "base")
KEDA = [doc for doc in documents(FOLDER / "overlays/keda") if "$patch" not in doc]
GPU = list(yaml.safe_load_all((FOLDER / "overlays/gpu/trainer-multi.yaml").read_text()))
PODS = dict(pods([*BASE, *KEDA, *GPU]))


def container(name: str) -> Document:
    (only,) = PODS[name]["containers"]
    return only


@pytest.mark.parametrize(
    "document", [*BASE, *KEDA, *GPU], ids=lambda doc: f"{doc['kind']}-{doc['metadata']['name']}"
)
def test_every_manifest_is_strictly_valid(document):
    validate(document)


def test_the_validator_would_notice_a_misspelt_key():
    (wrong,) = [doc for doc in BASE if doc["kind"] == "ConfigMap"]
    with pytest.raises(kubernetes_validate.ValidationError):
        validate({**wrong, "dataa": {}})
    job = next(doc for doc in KEDA if doc["kind"] == "ScaledJob")
    with pytest.raises(kubernetes_validate.ValidationError):
        validate({**job, "spec": {"jobTargetRef": {**job["spec"]["jobTargetRef"], "backofLimit": 1}}})


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_renders_to_valid_manifests(overlay):
    found = rendered(overlay)
    assert {"trainer", "sampler"} <= {doc["metadata"]["name"] for doc in found if doc["kind"] == "Service"}
    for document in found:
        validate(document)


def test_every_file_is_named_by_its_kustomization():
    for folder in (FOLDER / overlay for overlay in OVERLAYS):
        kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
        named = {*kustomization["resources"], *kustomization.get("patchesStrategicMerge", ())} - {
            "../../base"
        }
        assert named == {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}


def test_gpu_workers_ask_for_a_gpu_and_land_on_nodes_that_have_one():
    found = dict(pods(rendered("overlays/gpu")))
    for name in ("trainer-worker", "converter", "sampler"):
        (only,) = found[name]["containers"]
        assert only["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert only["resources"]["limits"]["memory"] == container(name)["resources"]["limits"]["memory"]
        assert only["image"] == container(name)["image"] + "-gpu"
        assert found[name]["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
        assert found[name]["tolerations"][0]["key"] == "nvidia.com/gpu"
    worker, multi = (found[name]["containers"][0] for name in ("trainer-worker", "trainer-multi"))
    assert set(worker["command"][3:]) == set(DEFAULT_QUEUES) - {MULTI}
    assert multi["command"][3:] == [MULTI]
    assert multi["resources"]["limits"]["nvidia.com/gpu"] > 1
    assert found["trainer-multi"]["nodeSelector"] == found["trainer-worker"]["nodeSelector"]
    assert found["trainer-multi"]["tolerations"] == found["trainer-worker"]["tolerations"]
    (sampler,) = found["sampler"]["containers"]
    assert {"DISTILLERY_SAMPLER_DEVICE", "DISTILLERY_SAMPLER_HOST"} == {
        entry["name"] for entry in sampler["env"]
    }


def test_with_keda_no_trainer_stands_and_one_comes_for_each_job():
    found = rendered("overlays/keda")
    assert "trainer-worker" not in dict(pods(found))
    assert container("trainer-job")["command"][-1] == "--once"
    assert PODS["trainer-job"]["restartPolicy"] == "Never"


@pytest.mark.parametrize("name", PODS)
def test_a_pod_is_confined(name):
    pod, own = PODS[name], container(name)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001  # the images' user
    assert pod["automountServiceAccountToken"] is False
    assert own["securityContext"]["readOnlyRootFilesystem"] is True
    assert own["securityContext"]["allowPrivilegeEscalation"] is False
    assert own["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert {"cpu", "memory"} <= set(own["resources"]["requests"])
    assert "memory" in own["resources"]["limits"]
    assert "/tmp" in {mount["mountPath"] for mount in own["volumeMounts"]}


@pytest.mark.parametrize("name", PODS)
def test_images_and_programs_are_those_of_compose(name):
    service = "trainer-worker" if name == "trainer-job" else name
    image = COMPOSE[service]["image"].replace("${DISTILLERY_IMAGE_TAG:-0.1.0}", "0.1.0")
    assert container(name)["image"] == image + ("-gpu" if name == "trainer-multi" else "")
    command = [part for part in container(name)["command"] if part != "--once"]
    assert command == COMPOSE[service]["command"]
    assert importlib.util.find_spec(command[2]) is not None


@pytest.mark.parametrize("name", PODS)
def test_every_variable_is_a_setting_and_its_folders_are_mounted(name):
    (settings,) = [doc["data"] for doc in BASE if doc["kind"] == "ConfigMap"]
    given = settings | {entry["name"]: entry["value"] for entry in container(name).get("env", ())}
    values = {key.removeprefix("DISTILLERY_").lower(): value for key, value in given.items()}
    Settings(**{key: value for key, value in values.items() if key in DEFAULTS})
    rest = {key.removeprefix("sampler_"): value for key, value in values.items() if key not in DEFAULTS}
    SamplerSettings(**rest)
    mounted = {mount["mountPath"] for mount in container(name)["volumeMounts"]}
    wanted = {values["cache_dir"], values["store_url"]}
    wanted |= set() if name == "sampler" else {values["runs_dir"], "/run/secrets"}
    wanted |= {values["data_roots"]} if name.startswith("trainer") else set()
    assert wanted <= mounted
    assert {mount["name"] for mount in container(name)["volumeMounts"]} == {
        v["name"] for v in PODS[name]["volumes"]
    }


@pytest.mark.parametrize("name", PORTS)
def test_ports_and_probes_are_the_settings_defaults(name):
    own, setting = container(name), PORTS[name]
    ports = {port["name"]: port["containerPort"] for port in own["ports"]}
    assert ports["metrics"] == DEFAULTS[f"{setting}_metrics_port"]
    if "grpc" in ports:
        assert ports["grpc"] == DEFAULTS[f"{setting}_port"]
        probes = [own[kind]["grpc"]["port"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")]
        (service,) = [doc for doc in BASE if doc["kind"] == "Service" and doc["metadata"]["name"] == name]
        assert {*probes, service["spec"]["ports"][0]["port"]} == {ports["grpc"]}
        assert service["spec"]["selector"] == {"app.kubernetes.io/name": name}
    else:
        assert own["livenessProbe"]["exec"]["command"] == COMPOSE[name]["healthcheck"]["test"][1:]


def test_a_worker_has_time_to_write_its_checkpoint():
    for name in ("trainer-worker", "trainer-multi", "converter", "trainer-job"):
        assert PODS[name]["terminationGracePeriodSeconds"] >= DEFAULTS["stop_grace_s"] + 20
    assert PODS["sampler"]["terminationGracePeriodSeconds"] > SamplerSettings.model_fields["grace_s"].default


def test_a_disruption_budget_for_each_deployment_selects_its_pods():
    budgets = {
        doc["metadata"]["name"]: doc["spec"]["selector"]["matchLabels"]
        for doc in (*BASE, *GPU)
        if doc["kind"] == "PodDisruptionBudget"
    }
    deployments = {
        doc["metadata"]["name"]: doc["spec"]["template"]["metadata"]["labels"]
        for doc in (*BASE, *GPU)
        if doc["kind"] == "Deployment"
    }
    assert set(budgets) == set(deployments) == set(PORTS)
    assert all(labels.items() <= deployments[name].items() for name, labels in budgets.items())


def test_the_network_is_closed_but_for_the_services_ports_and_metrics():
    policies = {doc["metadata"]["name"]: doc["spec"] for doc in BASE if doc["kind"] == "NetworkPolicy"}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    (clients,) = policies["clients"]["ingress"]
    assert {port["port"] for port in clients["ports"]} == {DEFAULTS["jobs_port"], DEFAULTS["sampler_port"]}
    (metrics,) = policies["metrics"]["ingress"]
    first, last = metrics["ports"][0]["port"], metrics["ports"][0]["endPort"]
    assert all(first <= DEFAULTS[f"{setting}_metrics_port"] <= last for setting in PORTS.values())


def test_secrets_are_files_that_the_settings_read_and_no_manifest_holds_one():
    keys = [
        doc["spec"]["secretTargetRef"][0]["key"] for doc in KEDA if doc["kind"] == "TriggerAuthentication"
    ]
    assert keys == ["distillery_database_url"]
    assert "database_url" in DEFAULTS
    assert not [doc for doc in (*BASE, *KEDA) if doc["kind"] == "Secret"]
