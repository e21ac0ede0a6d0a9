"""The torch backend, text-to-image, and scenes: the engine in this process, with the library's own models."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distill_core.artifacts import ArtifactStore, ExportReport, Manifest
from distill_core.errors import ConfigError
from distill_core.kinds.cards import described
from distill_core.networks.diffusers_denoiser import DiffusersDenoiser
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.networks.generation import generate
from distill_core.networks.steering import with_negative
from distill_core.recipe.tables import NetworkConfig
from distillery_sampler.engine.image_formats import encode, to_uint8
from distillery_sampler.engine.requests import GenerateRequest, ImageInput
from tests.helpers import tiny_text_to_image
from tests.services.sampler.helpers import answer


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return ArtifactStore(tmp_path_factory.mktemp("torch") / "store")


@pytest.fixture(scope="module")
def denoiser(store, tmp_path_factory) -> DiffusersDenoiser:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    args = {
        "block_out_channels": (16,),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "norm_num_groups": 8,
    }
    denoiser = build_denoiser(
        NetworkConfig(name="UNet2DModel", args=args),
        parameterisation="edm",
        shape=(1, 8, 8),
        num_classes=10,
        num_steps=4,
    )
    folder = tmp_path_factory.mktemp("unet") / "model"
    denoiser.save(folder)
    store.publish(folder, Manifest(name="unet", **described(denoiser)))
    return load_denoiser(folder)


@pytest.fixture(scope="module")
def prompted(store, tmp_path_factory) -> DiffusersDenoiser:
    folder = tiny_text_to_image(tmp_path_factory.mktemp("text") / "pipeline")
    denoiser = load_denoiser(folder)
    store.publish(folder, Manifest(name="prompted", **described(denoiser)))
    return denoiser


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_server_samples_as_the_library_does(store, denoiser, tmp_path, guidance):
    labels = (3, 1, 4)
    (served,) = answer(
        store, tmp_path, GenerateRequest("unet", class_labels=labels, seed=7, guidance=guidance)
    )
    made = generate(denoiser, {"class_label": torch.tensor(labels)}, 3, seed=7, guidance=guidance)
    np.testing.assert_allclose(served, made.numpy(), atol=1e-4)


def test_neighbours_in_a_batch_do_not_change_a_picture(store, denoiser, tmp_path):
    wanted = GenerateRequest("unet", class_labels=(5,), seed=1)
    others = [GenerateRequest("unet", class_labels=(k, k + 1), seed=k) for k in range(4)]
    (alone,) = answer(store, tmp_path, wanted)
    together = answer(store, tmp_path, *others[:2], wanted, *others[2:])[2]
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_prompts_are_drawn_as_the_library_draws_them(store, prompted, tmp_path):
    request = GenerateRequest("prompted", prompts=("abc", "xyz"), seed=2, num_steps=2, guidance=3.0)
    (served,) = answer(store, tmp_path, request)
    assert served.shape == (2, 3, 16, 16)
    made = generate(prompted, prompted.encode_prompts(["abc", "xyz"]), 2, seed=2, num_steps=2, guidance=3.0)
    np.testing.assert_allclose(served, made.numpy(), atol=1e-4)
    assert np.abs(served[0] - served[1]).max() > 1e-3


def test_guidance_leads_away_from_a_negative_prompt(store, prompted, tmp_path):
    options = {"prompts": ("abc", "xyz"), "seed": 2, "num_steps": 2, "guidance": 3.0}
    request = GenerateRequest("prompted", negative_prompts=("red", ""), **options)
    served, plain = answer(store, tmp_path, request, GenerateRequest("prompted", **options))
    cond = with_negative(prompted, prompted.encode_prompts(["abc", "xyz"]), ["red", None])
    made = generate(prompted, cond, 2, seed=2, num_steps=2, guidance=3.0)
    np.testing.assert_allclose(served, made.numpy(), atol=1e-4)
    np.testing.assert_allclose(served[1], plain[1], atol=1e-4)
    assert np.abs(served[0] - plain[0]).max() > 1e-3


class _Part(torch.nn.Module):
    """A function of tensors as a module, which is what the exporter wants."""

    def __init__(self, function: Callable[..., torch.Tensor], *owners: torch.nn.Module) -> None:
        super().__init__()
        self.function, self.owners = function, torch.nn.ModuleList(owners)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs)


def export_text_model(denoiser: DiffusersDenoiser, folder: Path) -> None:
    """The three graphs of a text-to-image model, by torch's older exporter: the converter's takes a minute."""
    folder.mkdir(parents=True)
    ids = torch.zeros(2, denoiser.cond.max_tokens, dtype=torch.long)
    x, sigma, embeds = (
        torch.randn(2, 4, 8, 8),
        torch.ones(2),
        denoiser.encode_prompts(["a", "b"])["prompt_embeds"],
    )
    model = denoiser.text.model
    parts = {
        "text_encoder": (_Part(lambda ids: model(ids)[0], model), {"input_ids": ids}),
        "denoiser": (
            _Part(lambda x, s, e: denoiser(x, s, {"prompt_embeds": e}), denoiser),
            {"x_sigma": x, "sigma": sigma, "prompt_embeds": embeds},
        ),
        "decoder": (_Part(denoiser.decode, denoiser), {"x0": x}),
        "encoder": (_Part(denoiser.encode, denoiser), {"picture": torch.randn(2, 3, 16, 16)}),
    }
    for name, (module, inputs) in parts.items():
        torch.onnx.export(
            module,
            tuple(inputs.values()),
            folder / f"{name}.onnx",
            dynamo=False,
            input_names=list(inputs),
            output_names=["prompt_embeds" if name == "text_encoder" else "answer"],
            dynamic_axes={key: {0: "batch"} for key in inputs},
        )


@pytest.mark.filterwarnings("ignore")
def test_an_exported_text_model_draws_what_its_torch_weights_draw(store, prompted, tmp_path):
    folder = tmp_path / "exported"
    export_text_model(prompted, folder / "exports" / "onnx-fp32")
    store_folder = store.fetch("prompted@1")
    shutil.copytree(store_folder / "tokenizer", folder / "tokenizer")
    prompted.text.tokenizer.backend_tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    report = ExportReport(
        target="onnx-fp32",
        files=(),
        max_abs_difference=0,
        rel_l2=0,
        tolerance=1,
        batches=(2,),
        seconds=0,
    )
    fields = {**described(prompted), "exports": {"onnx-fp32": report}}
    store.publish(folder, Manifest(name="exported", **fields))
    options = {
        "prompts": ("abc", "", "a much longer prompt than the eight tokens"),
        "seed": 2,
        "num_steps": 2,
    }
    onnx, plain = answer(
        store,
        tmp_path,
        GenerateRequest("exported", guidance=3.0, **options),
        GenerateRequest("prompted@1", guidance=3.0, **options),
    )
    np.testing.assert_allclose(onnx, plain, atol=1e-3)

    away = {**options, "negative_prompts": ("red", "", "green")}
    onnx, plain = answer(
        store,
        tmp_path,
        GenerateRequest("exported", guidance=3.0, **away),
        GenerateRequest("prompted@1", guidance=3.0, **away),
    )
    np.testing.assert_allclose(onnx, plain, atol=1e-3)

    picture = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    hole = np.zeros((16, 16, 1), np.uint8)
    hole[:7, :9] = 255
    image = ImageInput(encode(picture, "PNG"), encode(hole, "PNG"))
    begun = [
        GenerateRequest(model, guidance=3.0, image=image, **options) for model in ("exported", "prompted@1")
    ]
    onnx, plain = answer(store, tmp_path, *begun)
    np.testing.assert_allclose(onnx, plain, atol=1e-3)
    assert all(np.array_equal(to_uint8(made)[7:], picture[7:]) for made in plain)
    edits = [
        replace(request, image=ImageInput(encode(picture, "PNG"), strength=strength))
        for request in begun
        for strength in (0.5, 1.0)
    ]
    half, whole, torch_half, torch_whole = answer(store, tmp_path, *edits)
    np.testing.assert_allclose(half, torch_half, atol=1e-3)
    np.testing.assert_allclose(whole, torch_whole, atol=1e-3)
    assert np.abs(half - whole).max() > 0.01


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (GenerateRequest("prompted@1"), "prompts is empty"),
        (GenerateRequest("prompted@1", prompts=("x" * 2001,)), "2001 characters is too long"),
        (GenerateRequest("prompted@1", prompts=("a",), negative_prompts=("x" * 2001,)), "2001 characters"),
        (
            GenerateRequest("prompted@1", prompts=("a",), negative_prompts=("b", "c")),
            "2 negative prompts for 1",
        ),
        (
            GenerateRequest("prompted@1", prompts=("a",), negative_prompts=("b",), guidance=1.0),
            "guidance = 1 is off",
        ),
        (
            GenerateRequest("prompted@1", prompts=("a",), negative_prompts=("b",), negative_scale=0.5),
            "is guided",
        ),
        (GenerateRequest("prompted@1", class_labels=(1,)), "takes no class_labels; give prompts"),
    ],
)
def test_a_bad_prompt_is_refused(store, prompted, tmp_path, request_, said):
    with pytest.raises(ConfigError, match=said):
        answer(store, tmp_path, request_)
