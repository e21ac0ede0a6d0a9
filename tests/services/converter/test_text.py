"""A tiny text-to-image pipeline with random weights, converted: denoiser, decoder and text encoder."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from peft import LoraConfig
from tritonclient.grpc import InferenceServerClient

from distill_core.artifacts import ArtifactStore, Manifest, SamplerSpec
from distill_core.kinds.cards import described
from distill_core.networks.diffusers_denoiser import DiffusersDenoiser
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.generation import generate
from distill_core.networks.steering import with_negative
from distillery_converter.convert import convert
from distillery_converter.graph import tensors
from distillery_converter.graphs import fuse_adapters, load_graphs
from distillery_converter.precision import lowered
from distillery_sampler.engine.requests import GenerateRequest
from tests.helpers import tiny_text_to_image
from tests.services.sampler.helpers import SamplerProcess, answer
from tests.services.sampler.test_kserve import tensors as triton_tensors

TOKENS = 8


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Manifest, Path, DiffusersDenoiser]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("text")
    tiny_text_to_image(root / "pipeline", tokens=TOKENS)
    denoiser = load_denoiser(root / "pipeline")
    denoiser.sampler = SamplerSpec.few_step((10.0,), noise_scale=10.0)  # a student
    denoiser.save(root / "student")
    store = ArtifactStore(root / "store")
    tokenizer = root / "student" / "tokenizer"  # as older pipelines on the hub are
    (tokenizer / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(root / "pipeline-tokenizer" / name, tokenizer)
    store.publish(root / "student", Manifest(name="prompted", **described(denoiser)))
    manifest = convert(store, "prompted", "onnx-fp32")
    return manifest, store.fetch(manifest.ref), denoiser


def run(folder: Path, name: str, **inputs: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(folder / f"exports/onnx-fp32/{name}.onnx")
    return session.run(None, inputs)[0]


def test_a_text_to_image_model_is_exported_as_four_graphs_and_a_tokenizer(exported):
    manifest, _, _ = exported
    files = {f"exports/onnx-fp32/{name}.onnx" for name in ("denoiser", "decoder", "encoder", "text_encoder")}
    files.add("exports/onnx-fp32/prompts.json")  # how they are read
    assert set(manifest.exports["onnx-fp32"].files) == files <= set(manifest.files)
    assert "tokenizer/tokenizer.json" in manifest.files


@torch.no_grad()
def test_a_prompt_becomes_the_same_picture_through_the_graphs_as_through_torch(exported):
    _, folder, denoiser = exported
    prompts = ["a cat", "", "two dogs and a very long tail of words"]
    tokens = denoiser.text.tokenizer(prompts, padding="max_length", max_length=TOKENS, truncation=True)
    embeds = run(folder, "text_encoder", input_ids=np.asarray(tokens["input_ids"], dtype=np.int64))
    torch_embeds = denoiser.encode_prompts(prompts)
    np.testing.assert_allclose(embeds, torch_embeds["prompt_embeds"], atol=1e-4)

    sigma = np.asarray([10.0, 1.0, 0.1], dtype=np.float32)
    x_sigma = np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float32)
    off = {"negative_prompt_embeds": embeds[::-1].copy(), "nasa_scale": np.zeros(3, np.float32)}
    x0 = run(folder, "denoiser", x_sigma=x_sigma, sigma=sigma, prompt_embeds=embeds, **off)
    torch_x0 = denoiser(torch.from_numpy(x_sigma), torch.from_numpy(sigma), torch_embeds)
    np.testing.assert_allclose(x0, torch_x0, atol=1e-3)

    picture = run(folder, "decoder", x0=x0)
    assert picture.shape == (3, 3, 16, 16)
    np.testing.assert_allclose(picture, denoiser.decode(torch_x0), atol=1e-3)
    given = np.tanh(np.random.default_rng(1).standard_normal((3, 3, 16, 16))).astype(np.float32)
    latent = run(folder, "encoder", picture=given)
    np.testing.assert_allclose(latent, denoiser.encode(torch.from_numpy(given)), atol=1e-3)


@pytest.mark.parametrize("scale", [None, 1.0])
def test_a_student_turns_away_from_negative_prompts_on_both_backends(exported, tmp_path, scale):
    manifest, folder, denoiser = exported
    store = ArtifactStore(folder.parents[2])
    options = {"prompts": ("a cat", "a dog", "a cat"), "seeds": (1, 2, 1), "negative_scale": scale}
    requests = [
        GenerateRequest(ref, negative_prompts=("red", "", ""), **options)
        for ref in ("prompted", "prompted@1")
    ]
    plain = GenerateRequest("prompted", prompts=options["prompts"], seeds=options["seeds"])
    onnx, there, without = answer(store, tmp_path, *requests, plain)
    np.testing.assert_allclose(onnx, there, atol=2e-3)
    np.testing.assert_allclose(onnx[1:], without[1:], atol=1e-5)  # an item without one is as ever
    assert np.abs(onnx[0] - without[0]).max() > 1e-3
    cond = denoiser.encode_prompts(["a cat"])
    steered = with_negative(denoiser, cond, ["red"], scale=0.2 if scale is None else scale)
    made = generate(denoiser, steered, 1, seed=1)
    np.testing.assert_allclose(there[0], made[0], atol=1e-3)


def test_prompts_get_the_same_bytes_through_both_protocols_on_both_backends(exported):
    _, folder, _ = exported
    prompts, negatives, seeds = ["a cat", "zw\u00f6lf Hunde"], ["red", ""], np.array([[1], [2]], np.uint64)
    texts = {
        name: np.array([[text.encode()] for text in column], dtype=object)
        for name, column in (("prompt", prompts), ("negative_prompt", negatives))
    }
    with (
        SamplerProcess(str(folder.parents[2])) as sampler,
        sampler.client() as client,
        InferenceServerClient(sampler.address) as triton,
    ):
        for version, backend in (("2", "onnxruntime"), ("1", "torch")):
            options = {"prompts": prompts, "negative_prompts": negatives, "seeds": [1, 2]}
            ours = client.generate(f"prompted@{version}", **options, image_format="PNG")
            theirs = triton.infer("prompted", triton_tensors(seed=seeds, **texts), version).as_numpy("images")
            assert theirs.shape == (2, 16, 16, 3)
            assert theirs.tobytes() == np.stack(ours).tobytes()
            assert client.model(f"prompted@{version}").backend == backend
            plain = triton.infer("prompted", triton_tensors(seed=seeds, prompt=texts["prompt"]), version)
            assert plain.as_numpy("images")[0].tobytes() != theirs[0].tobytes()
        metadata = triton.get_model_metadata("prompted", as_json=True)
        assert ("prompt", "BYTES") in {(found["name"], found["datatype"]) for found in metadata["inputs"]}


@torch.no_grad()
def test_adapters_are_fused_into_the_layers_they_adapt(exported):
    _, folder, _ = exported
    denoiser = load_denoiser(folder)
    x_sigma, sigma, cond = torch.ones(2, 4, 8, 8), torch.ones(2), denoiser.encode_prompts(["a", "b"])
    plain = denoiser(x_sigma, sigma, cond)
    denoiser.network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapted = denoiser(x_sigma, sigma, cond)
    fuse_adapters(denoiser.network)
    assert not [name for name, _ in denoiser.network.named_parameters() if "lora" in name]
    assert (adapted - plain).abs().max() > 1e-3
    torch.testing.assert_close(denoiser(x_sigma, sigma, cond), adapted)


def test_in_half_only_the_network_is_in_float16(exported):
    _, folder, denoiser = exported
    graphs = load_graphs(folder, Manifest(name="prompted", **described(denoiser)))
    halved = [lowered(graph, "fp16") for graph in graphs]
    assert halved[1:] == graphs[1:]
    kinds = [{weight.dtype for weight in graph.module.parameters()} for graph in (graphs[0], halved[0])]
    assert kinds == [{torch.float32}, {torch.float16}]
    inputs = tensors(graphs[0].inputs(3))
    with torch.no_grad():
        exact, rounded = graphs[0].module(*inputs), halved[0].module(*inputs)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 1e-2
