"""int8 and float16 on real, tiny models: what is calibrated on, what is written, what the gates refuse."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from distill_core.artifacts import ArtifactStore, FrechetReport, Manifest, SamplerSpec
from distill_core.diffusion.noise import unit_normal
from distill_core.errors import ArtifactError, Unavailable
from distill_core.kinds.cards import described
from distill_core.networks.generation import generate
from distill_core.recipe import load_recipe
from distill_service.settings import settings as service_settings
from distillery_cli.app import main
from distillery_converter import frechet, int8, parity, writing
from distillery_converter import onnx as exporting
from distillery_converter.convert import convert
from distillery_converter.frechet import Real, Side
from distillery_converter.graph import Graph
from distillery_converter.graphs import denoiser_graph
from distillery_converter.prompts import text_graph
from distillery_converter.targets import TARGETS
from distillery_sampler.engine.requests import GenerateRequest
from tests.services.converter.test_converter import publish, tiny_denoiser
from tests.services.sampler.helpers import answer

STUDENT = SamplerSpec.few_step((5.0, 1.0), noise_scale=5.0)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def student():
    denoiser = tiny_denoiser()
    with torch.no_grad():  # a new DiT answers 0: weights of the size that training gives them
        for value in denoiser.network.parameters():
            value.add_(
                0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel()))
            )
    denoiser.sampler = STUDENT
    return denoiser


@pytest.fixture(scope="module")
def graph(student) -> Graph:
    return denoiser_graph(student, student.sampler)


@pytest.fixture(scope="module")
def store(student, tmp_path_factory) -> ArtifactStore:
    return publish(tmp_path_factory.mktemp("int8"), student)


@pytest.fixture(scope="module")
def converted(store) -> Manifest:
    return convert(store, "digits@1", "onnx-int8")


# -- calibration --------------------------------------------------------------------------------------------


def test_calibration_is_the_students_own_sampling_from_noise(graph):
    feeds = list(int8.calibration_feeds(graph))
    levels = [float(feed["sigma"][0]) for feed in feeds]
    assert levels == [5.0, 1.0] * 4  # 128 items: four trajectories of sixteen
    assert all((feed["class_label"] == np.arange(16) % 10).all() for feed in feeds)
    shape, seed = (1, 8, 8), int8.FIRST_SEED
    begun = np.stack([5.0 * unit_normal(seed, index, 0, shape) for index in range(16)])
    np.testing.assert_allclose(feeds[0]["x_sigma"], begun, rtol=1e-6)
    noise = np.stack([unit_normal(seed, index, 1, shape) for index in range(16)])
    np.testing.assert_allclose(feeds[1]["x_sigma"], graph.run(feeds[0]) + noise, rtol=1e-5, atol=1e-6)
    assert not np.array_equal(feeds[0]["x_sigma"], feeds[2]["x_sigma"])


def test_a_walk_ends_where_the_models_own_sampling_does(student, graph):
    expected = generate(student, {"class_label": torch.arange(3)}, 3, seed=7).numpy()
    found = graph.trajectory.x0(graph.run, seed=7, indices=range(3), num_steps=2)
    np.testing.assert_allclose(np.clip(found, -1, 1), expected, atol=1e-5)
    (last,) = graph.trajectory.x0(graph.run, seed=7, indices=range(2, 3), num_steps=2)
    np.testing.assert_allclose(last, found[2], atol=1e-5)


def test_guidance_is_walked_too_and_a_teacher_over_its_whole_range(student):
    spec = SamplerSpec(kind="heun", noise_scale=80.0, num_steps=32, max_steps=100, guidance=2.0)
    guided = denoiser_graph(student, spec)
    feeds = guided.feeds(3)
    labels = [set(feed["class_label"].tolist()) for feed in feeds]
    assert {10} in labels
    assert set(range(10)) in labels
    levels = {round(float(feed["sigma"][0]), 3) for feed in feeds}
    assert (len(levels), max(levels), min(levels)) == (8, 80.0, 0.002)
    expected = generate(student, {"class_label": torch.arange(2)}, 2, seed=7, num_steps=8, sampler=spec)
    found = guided.trajectory.x0(guided.run, seed=7, indices=range(2), num_steps=8)
    np.testing.assert_allclose(np.clip(found, -1, 1), expected.numpy(), atol=1e-4)


# -- int8 ---------------------------------------------------------------------------------------------------


def test_int8_is_published_with_what_it_costs(store, converted):
    report = converted.exports["onnx-int8"]
    assert report.files == ("exports/onnx-int8/denoiser.onnx",)
    graph = report.graphs["denoiser"]
    assert graph.precision == "int8"
    assert graph.size == converted.files[report.files[0]].size
    assert 25 <= graph.snr_db < 80
    assert report.snr_db == graph.snr_db
    assert 0 < graph.changed_pixels < 1
    assert "input layer" in graph.left_in_float
    assert report.frechet.ratio <= 1.05
    assert (report.frechet.samples, report.frechet.num_steps) == (512, 1)
    assert report.frechet.reference == "other samples of the model"
    assert {"snr_db", "frechet_ratio", "megabytes"} <= set(report.figures)
    assert Manifest.model_validate_json(converted.model_dump_json()) == converted


def test_the_command_line_shows_what_a_conversion_costs(store, converted, monkeypatch, capsys):
    monkeypatch.setenv("DISTILLERY_STORE_URL", store.url)
    service_settings.cache_clear()
    try:
        assert main(["models", converted.ref]) == 0
    finally:
        service_settings.cache_clear()
    shown = " ".join(capsys.readouterr().out.split())  # long lines are broken
    graph = converted.exports["onnx-int8"].graphs["denoiser"]
    assert f"relative L2 {graph.rel_l2:.2g}, {graph.snr_db:.1f} dB" in shown
    assert "of pixels differ, in float: input layer" in shown
    assert "512 samples of 1 steps, mean and deviation of 8x8 cells, to other samples of the model" in shown


def test_layers_with_weights_run_in_int8_with_a_scale_per_channel_and_the_input_layer_does_not(
    store, converted
):
    model = onnx.load(store.fetch(converted.ref) / converted.exports["onnx-int8"].files[0])
    weights = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    kinds = {}
    for node in layers:
        maker = makers.get(node.input[1])
        quantised = maker is not None and maker.op_type == "DequantizeLinear" and maker.input[0] in weights
        kinds.setdefault(node.op_type, []).append(quantised)
        if quantised:
            assert weights[maker.input[0]].dtype == np.int8
            assert np.abs(weights[maker.input[0]].astype(int)).max() <= 64  # 7 bits
            assert weights[maker.input[1]].size in weights[maker.input[0]].shape  # one scale per channel
            assert weights[maker.input[1]].size > 1
    assert kinds["Conv"] == [False]
    assert sum(kinds["MatMul"]) >= 4
    assert sum(kinds["Gemm"]) >= 4


def test_int8_is_the_same_bytes_each_time(store, converted, student, tmp_path):
    again = publish(tmp_path, student)
    found = convert(again, "digits@1", "onnx-int8")
    path = converted.exports["onnx-int8"].files[0]
    assert found.files[path] == converted.files[path]
    assert found.exports["onnx-int8"].frechet == converted.exports["onnx-int8"].frechet


def test_a_sampler_serves_int8_when_told_to(store, converted, tmp_path):
    request = GenerateRequest(converted.ref, class_labels=(0, 1, 2), seed=4)
    (there,) = answer(store, tmp_path, request, backend="torch")
    (found,) = answer(store, tmp_path, request, backend="onnxruntime", targets=("onnx-int8",))
    difference = np.linalg.norm(found - there) / np.linalg.norm(there)
    assert 0 < difference < 0.0562


def test_what_is_converted_already_is_found_by_its_weights_target_and_tools(
    converted, store, tmp_path, monkeypatch
):
    copy = ArtifactStore(shutil.copytree(store.url, tmp_path / "store"))
    assert convert(copy, "digits@1", "onnx-int8").ref == converted.ref
    child = copy.publish(
        copy.fetch(converted.ref), converted.model_copy(update={"parents": (converted.ref,)})
    )
    assert convert(copy, "digits@1", "onnx-int8").ref == child.ref  # not made from it: the same weights
    begun = pytest.raises(Unavailable, match="cannot convert")
    with begun:
        convert(copy, "digits@1", "onnx-fp16", work=tmp_path / "gone")
    monkeypatch.setattr(int8, "CALIBRATION", "0")
    with begun:
        convert(copy, "digits@1", "onnx-int8", work=tmp_path / "gone")
    monkeypatch.undo()
    other = tiny_denoiser()
    other.save(tmp_path / "other")
    changed = copy.publish(tmp_path / "other", Manifest(name="digits", **described(other)))
    copy.publish(copy.fetch(converted.ref), converted)  # newer, and of other weights
    with begun:
        convert(copy, changed.ref, "onnx-int8", work=tmp_path / "gone")


# -- gates --------------------------------------------------------------------------------------------------


def noisy(graph: Graph, size: float):
    def run(inputs):
        x0 = graph.run(inputs)
        return x0 + np.float32(size) * np.random.default_rng(0).standard_normal(x0.shape).astype(np.float32)

    return run


def test_noise_is_told_in_decibels_and_pixels_and_refused_below_25(graph):
    goal = TARGETS["onnx-int8"]
    power = np.concatenate([graph.run(feed) for feed in graph.feeds(parity.HELD_OUT)]).std()
    quiet = parity.compare(graph, noisy(graph, 0.03 * power), as_served=True)
    loud = parity.compare(graph, noisy(graph, 0.08 * power), as_served=True)
    assert quiet.snr_db == pytest.approx(30.5, abs=1.5)
    assert 0 < quiet.changed_pixels < loud.changed_pixels
    parity.require(quiet, goal, model="m@1", part="denoiser")
    with pytest.raises(ArtifactError, match=r"in its denoiser, 2\d\.\d of at least 25.0 dB, so nothing"):
        parity.require(loud, goal, model="m@1", part="denoiser")
    same = parity.compare(graph, graph.run)
    assert (same.snr_db, same.changed_pixels) == (None, 0)


@pytest.mark.parametrize("with_data", [True, False])
def test_a_model_whose_pictures_are_others_is_refused(graph, with_data):
    real = None
    if with_data:
        drawn = graph.trajectory.x0(graph.run, seed=1, indices=range(128), num_steps=1)
        real = Real(np.clip(drawn, -1, 1), "128 pictures")
    torch_side = Side(graph.run, None)
    same = frechet.compare_samples(graph.trajectory, torch_side, torch_side, real=real, seconds=1e9)
    paler = Side(lambda inputs: 0.5 * graph.run(inputs), None)
    other = frechet.compare_samples(graph.trajectory, torch_side, paler, real=real, seconds=1e9)
    assert isinstance(same, FrechetReport)
    assert same.ratio == 1
    assert other.before == same.before
    assert other.reference == ("128 pictures" if with_data else "other samples of the model")
    frechet.require(same, TARGETS["onnx-int8"], model="m@1")
    with pytest.raises(
        ArtifactError, match=r"m@1 as onnx-int8 makes other pictures.*times it \(allowed 1.05"
    ):
        frechet.require(other, TARGETS["onnx-int8"], model="m@1")


def test_samples_that_are_too_dear_are_left_out(graph):
    side = Side(graph.run, None)
    assert frechet.compare_samples(graph.trajectory, side, side, seconds=1e-6) is None


def test_the_data_of_the_models_recipe_is_the_reference_where_it_is_here(tmp_path):
    assert frechet.real_pictures(tmp_path, (1, 8, 8)) is None
    (tmp_path / "recipe.toml").write_text(load_recipe("edm_digits").to_toml())
    found = frechet.real_pictures(tmp_path, (1, 8, 8))
    assert found.pictures.shape == (512, 1, 8, 8)
    assert found.name == "512 pictures of the data 'digits'"
    assert frechet.real_pictures(tmp_path, (3, 8, 8)) is None
    elsewhere = load_recipe("edm_digits", {"data": {"name": "idx", "path": "/gone"}})
    (tmp_path / "recipe.toml").write_text(elsewhere.to_toml())
    assert frechet.real_pictures(tmp_path, (1, 8, 8)) is None


def test_features_see_the_mean_and_the_deviation_of_cells():
    flat = np.full((2, 1, 16, 16), 0.25, np.float32)
    rough = flat + 0.1 * (-1.0) ** np.arange(16, dtype=np.float32)
    assert torch.allclose(frechet.features(flat)[:, :64], frechet.features(rough)[:, :64])
    assert torch.allclose(frechet.features(rough)[:, 64:], torch.tensor(0.1, dtype=torch.float64))
    assert frechet.features(flat).shape == (2, 128)


# -- parts --------------------------------------------------------------------------------------------------


class Encoder(torch.nn.Module):
    """Stands where a text encoder does: a table and a layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer = torch.nn.Embedding(50, width), torch.nn.Linear(width, width)

    def forward(self, tokens):
        return self.layer(self.table(tokens))


def text(width: int) -> Graph:
    tokens = {"input_ids": np.arange(16 * 8, dtype=np.int64).reshape(16, 8) % 50}
    return Graph(
        "text_encoder",
        Encoder(width),
        ("prompt_embeds",),
        lambda batch: {"input_ids": tokens["input_ids"][:batch]},
        served=lambda seed: [tokens],
    )


def test_a_part_is_put_into_int8_only_where_that_saves_enough(tmp_path):
    goal = TARGETS["onnx-int8"]
    (large,) = writing.write_graphs([text(256)], tmp_path / "m/exports/onnx-int8", goal, tmp_path)
    assert large.precision == "int8"
    assert large.parity.snr_db > 25
    with pytest.raises(
        ArtifactError, match=r"no part of this model gains.*of its bytes in int8.*choose onnx-fp32"
    ):
        writing.write_graphs([text(4)], tmp_path / "s/exports/onnx-int8", goal, tmp_path)


def test_a_part_that_the_gate_refuses_stays_in_float_and_says_why(tmp_path):
    strict = TARGETS["onnx-int8"]._replace(rel_l2=1e-6)
    exports = tmp_path / "m/exports/onnx-int8"
    with pytest.raises(ArtifactError, match=r"relative L2 in int8, of 1e-06 allowed"):
        writing.write_graphs([text(256)], exports, strict, tmp_path)
    kept = onnx.load(exports / "text_encoder.onnx")
    assert {one.data_type for one in kept.graph.initializer} <= {TensorProto.FLOAT, TensorProto.INT64}


def test_a_graph_without_layers_is_not_pretended_to_be_int8(tmp_path):
    class Twice(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    graph = replace(text(4), module=Twice(), inputs=lambda n: {"x": np.ones((n, 3), np.float32)}, served=None)
    with pytest.raises(ArtifactError, match="no part of this model gains"):
        writing.write_graphs([graph], tmp_path / "m/exports/onnx-int8", TARGETS["onnx-int8"], tmp_path)


def test_example_prompts_calibrate_a_text_encoder(tmp_path):
    from transformers import CLIPTextModel

    from distill_core.networks.text import TextEncoder
    from tests.helpers import letter_tokenizer, tiny_text_config

    text = TextEncoder(letter_tokenizer(tmp_path / "tokens", 8), CLIPTextModel(tiny_text_config(8)))
    (feed,) = text_graph(text, ("cat", "dog")).feeds(0)
    assert len({tuple(row) for row in feed["input_ids"].tolist()}) == 2
    np.testing.assert_array_equal(
        feed["input_ids"][0], text.tokenizer("cat", padding="max_length")["input_ids"]
    )


# -- more than protobuf can hold ----------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["onnx-fp32", "onnx-int8"])
def test_weights_in_a_side_file_are_hashed_and_served(target, student, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "INLINE_BYTES", 1000)
    store = publish(tmp_path, student)
    manifest = convert(store, "digits@1", target)
    files = manifest.exports[target].files
    assert files == tuple(f"exports/{target}/denoiser.onnx{end}" for end in ("", ".data"))
    assert set(files) <= set(manifest.files)
    assert manifest.exports[target].graphs["denoiser"].size == sum(
        manifest.files[file].size for file in files
    )
    assert min(manifest.files[file].size for file in files) > 1000
    request = GenerateRequest(manifest.ref, class_labels=(3,), seed=4)
    (there,) = answer(store, tmp_path, request, backend="torch")
    (found,) = answer(store, tmp_path, request, backend="onnxruntime", targets=(target,))
    np.testing.assert_allclose(found, there, atol=1e-3 if target == "onnx-fp32" else 0.3)
    side = Path(store.url) / "digits" / "versions" / str(manifest.version) / files[1]
    side.write_bytes(side.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ArtifactError, match=r"checksum of exports/.*denoiser.onnx.data differs"):
        store.fetch(manifest.ref)
