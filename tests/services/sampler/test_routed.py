"""Several experts published, converted and served as one model: same pictures on every backend and in every batch."""

from __future__ import annotations

import asyncio
import copy
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tritonclient.grpc import InferenceServerClient
from typer.testing import CliRunner

from distill_core.artifacts import ArtifactStore, ExportReport, Manifest
from distill_core.diffusion.sampling import SamplerSpec
from distill_core.errors import ArtifactError
from distill_core.kinds.cards import described, generator_card
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.networks.generation import generate
from distill_core.networks.routed import ConditionPartition, RoutedDenoiser
from distill_core.recipe.tables import NetworkConfig
from distill_service.settings import settings
from distillery_cli.app import app
from distillery_converter.convert import convert
from distillery_converter.graphs import DenoiserGraph, load_graphs
from distillery_converter.precision import lowered
from distillery_sampler.client import generate_request
from distillery_sampler.engine.engine import Engine
from distillery_sampler.engine.requests import GenerateRequest
from distillery_sampler.metrics import Metrics
from distillery_sampler.settings import SamplerSettings
from tests.helpers import tiny_text_to_image
from tests.services.sampler.helpers import SamplerProcess
from tests.services.sampler.test_kserve import digits
from tests.services.sampler.test_reload import until
from tests.services.sampler.test_torch import export_text_model

PARTS = 2
LABELS = [9, 0, 5, 4, 0, 7, 3, 2]  # of both parts, in no order
DIT = NetworkConfig(
    name="DiTTransformer2DModel",
    args={"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "patch_size": 4},
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def routed() -> RoutedDenoiser:
    torch.manual_seed(0)
    experts = []
    for _ in range(PARTS):
        expert = build_denoiser(DIT, parameterisation="edm", shape=(1, 8, 8), num_classes=10)
        with torch.no_grad():  # a new DiT answers zero whatever it is asked
            for parameter in expert.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        experts.append(expert)
    model = RoutedDenoiser(experts, ConditionPartition.blocks(9, PARTS))  # class 9 is in no list
    model.sampler = SamplerSpec(kind="few_step", sigmas=(5.0, 1.0), noise_scale=5.0, num_steps=2, max_steps=2)
    return model


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[ArtifactStore, RoutedDenoiser]:
    """`digits@1` as trained and `digits@2` with its export."""
    root, model = tmp_path_factory.mktemp("routed"), routed()
    model.save(root / "model")
    store = ArtifactStore(root / "store")
    store.publish(root / "model", Manifest(name="digits", method="msd", **described(model)))
    convert(store, "digits@1", "onnx-fp32")
    return store, model


def pictures(model: RoutedDenoiser, labels: list[int], **options: float) -> np.ndarray:
    """What the library makes, as the server's bytes (B, H, W, C)."""
    made = generate(model, {"class_label": torch.tensor(labels)}, len(labels), **options)
    return np.rint((made.numpy() + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)


def close(served: list[np.ndarray], made: np.ndarray) -> None:
    np.testing.assert_allclose(np.stack(served).astype(int), made.astype(int), atol=1)


# -- conversion ---------------------------------------------------------------------------------------------


def test_each_expert_becomes_a_graph_and_the_manifest_keeps_the_partition(published):
    store, model = published
    manifest = store.manifest("digits@2")
    report = manifest.exports["onnx-fp32"]
    assert report.files == tuple(f"exports/onnx-fp32/expert-{part}.onnx" for part in range(PARTS))
    assert set(report.files) < set(manifest.files)
    assert report.rel_l2 <= 1e-4
    assert (
        generator_card(manifest).partition
        == generator_card(store.manifest("digits@1")).partition
        == model.partition.spec
    )
    assert generator_card(manifest).partition.of_class == (0, 0, 0, 0, 0, 1, 1, 1, 1)


def test_an_expert_is_compared_on_what_is_routed_to_it(published):
    store, _ = published
    graphs = load_graphs(store.fetch("digits@1"), store.manifest("digits@1"))
    assert [graph.name for graph in graphs] == ["expert-0", "expert-1"]
    assert [sorted(set(graph.inputs(16)["class_label"])) for graph in graphs] == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8],
    ]
    assert all(isinstance(lowered(graph, "fp16").module, DenoiserGraph) for graph in graphs)


# -- one model over gRPC ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["onnxruntime", "torch"])
def sampler(published, request) -> Iterator[SamplerProcess]:
    settings = {
        "DISTILLERY_SAMPLER_BACKEND": request.param,
        "DISTILLERY_SAMPLER_MAX_BATCH": "8",
        "DISTILLERY_SAMPLER_INSTANCES": "1",
        "DISTILLERY_SAMPLER_PRELOAD": '["digits@2"]',
    }
    with SamplerProcess(published[0].url, settings) as process:
        yield process


def opened(sampler: SamplerProcess) -> set[int]:
    """Experts in memory, by the server's log."""
    return {event["part"] for event in sampler.events if event.get("event") == "expert loaded"}


def test_an_expert_is_loaded_by_the_first_request_for_it(sampler):
    with sampler.client() as client:
        client.generate("digits", class_labels=[0, 1, 2, 3, 9])
        assert opened(sampler) <= {0}
        client.generate("digits", class_labels=[8])
    until(lambda: 1 in opened(sampler))  # its log line comes by another way


@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_mixed_batch_gets_from_the_server_what_the_library_makes(sampler, published, num_steps):
    with sampler.client() as client:
        served = client.generate("digits", class_labels=LABELS, seed=7, num_steps=num_steps)
        close(served, pictures(published[1], LABELS, seed=7, num_steps=num_steps))
        summary = client.call_generate(generate_request("digits", class_labels=LABELS)).summary
    backend = sampler.environment["DISTILLERY_SAMPLER_BACKEND"]
    assert (summary.model, summary.backend, summary.count) == ("digits@2", backend, len(LABELS))


def test_neighbours_of_other_parts_change_no_picture(sampler):
    with sampler.client() as client:
        together = client.generate("digits", class_labels=LABELS, seeds=list(range(8)))
        for index, label in enumerate(LABELS):
            (alone,) = client.generate("digits", class_labels=[label], seeds=[index])
            np.testing.assert_allclose(alone.astype(int), together[index].astype(int), atol=1)


def test_guidance_is_the_conditions_own_experts(sampler, published):
    with sampler.client() as client:
        served = client.generate("digits", class_labels=LABELS, seed=3, guidance=2.0)
    close(served, pictures(published[1], LABELS, seed=3, guidance=2.0))


@pytest.fixture
def environment(sampler, monkeypatch) -> Iterator[None]:
    """The command line looks for this sampler."""
    monkeypatch.setenv("DISTILLERY_SAMPLER_PORT", str(sampler.port))
    settings.cache_clear()
    yield
    settings.cache_clear()


@pytest.mark.usefixtures("environment")
def test_kserve_and_the_command_line_work_unchanged(sampler, tmp_path):
    with sampler.client() as client, InferenceServerClient(sampler.address) as triton:
        seeds = list(range(8))
        served = triton.infer("digits", digits(LABELS, seeds)).as_numpy("images")
        close(client.generate("digits", class_labels=LABELS, seeds=seeds), served)
    options = ["generate", "digits", "--labels", "0-9", "--out", str(tmp_path / "sheet.png")]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "sheet.png").stat().st_size > 0


# -- prompts ------------------------------------------------------------------------------------------------

PROMPTS = ("abc", "xyz", "zzz", "q", "")


@pytest.fixture(scope="module")
def prompted(tmp_path_factory) -> tuple[ArtifactStore, RoutedDenoiser]:
    """`prompted@1` as trained, `prompted@2` with graphs."""
    root = tmp_path_factory.mktemp("routed-text")
    first = load_denoiser(tiny_text_to_image(root / "pipeline"))
    other = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 1.2
    embeds = first.encode_prompts(["aa", "ab", "ba", "xx", "xy", "zz"])["prompt_embeds"].mean(1)
    model = RoutedDenoiser([first, other], ConditionPartition.of_prompts(embeds, 2, seed=0))
    model.save(root / "model")
    store = ArtifactStore(root / "store")
    manifest = store.publish(root / "model", Manifest(name="prompted", **described(model)))
    first.text.tokenizer.backend_tokenizer.save(str(root / "model" / "tokenizer" / "tokenizer.json"))
    for part, expert in reversed(list(enumerate(model.experts))):
        graphs = root / f"graphs-{part}"
        export_text_model(expert, graphs)
        (graphs / "denoiser.onnx").rename(graphs / f"expert-{part}.onnx")
        shutil.copytree(graphs, root / "model" / "exports" / "onnx-fp32", dirs_exist_ok=True)
    report = ExportReport(
        target="onnx-fp32", files=(), max_abs_difference=0, rel_l2=0, tolerance=1, batches=(2,), seconds=0
    )
    store.publish(root / "model", manifest.model_copy(update={"exports": {"onnx-fp32": report}}))
    return store, model


def draw(store: ArtifactStore, cache: Path, ref: str, prompts: tuple[str, ...]) -> tuple[np.ndarray, str]:
    """Pictures (B, C, H, W) for prompts, and the backend that made them."""

    async def run() -> tuple[np.ndarray, str]:
        engine = Engine(store, cache, SamplerSettings(instances=1, max_batch=8), Metrics())
        request = GenerateRequest(ref, prompts=prompts, seed=2, num_steps=2, guidance=3.0)
        made, summary = await engine.generate(request)
        await engine.close()
        return np.stack([picture.pixels for picture in made]), summary.backend

    return asyncio.run(run())


@pytest.mark.parametrize(("ref", "backend"), [("prompted@1", "torch"), ("prompted@2", "onnxruntime")])
def test_prompts_go_to_the_expert_of_their_embedding_on_both_backends(prompted, tmp_path, ref, backend):
    store, model = prompted
    cond = model.encode_prompts(list(PROMPTS))
    assert set(model.partition.route(cond, len(PROMPTS)).tolist()) == {0, 1}
    served, by = draw(store, tmp_path, ref, PROMPTS)
    expected = generate(model, cond, len(PROMPTS), seed=2, num_steps=2, guidance=3.0).numpy()
    np.testing.assert_allclose(served, expected, atol=1e-3)
    assert by == backend


@pytest.mark.parametrize("lost", ["router.safetensors", "exports/onnx-fp32/expert-0.onnx"])
def test_a_model_that_lacks_a_part_is_refused_when_it_is_loaded(prompted, tmp_path, lost):
    folder = tmp_path / "model"
    shutil.copytree(prompted[0].fetch("prompted@2"), folder)
    (folder / lost).unlink()
    store = ArtifactStore(tmp_path / "store")
    store.publish(folder, prompted[0].manifest("prompted@2").model_copy(update={"name": "lossy"}))
    with pytest.raises(ArtifactError, match=Path(lost).name):
        draw(store, tmp_path, "lossy", ("abc",))
