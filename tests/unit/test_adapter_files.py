"""Published adapters in plain diffusers, and written for other programs from the command line."""

from __future__ import annotations

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch

from distill_core import api
from distill_core.artifacts import Manifest
from distill_core.kinds.cards import described
from distill_core.networks.adapters import LoraDenoiser
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.lora_formats.reading import parts_of, read_lora
from distill_core.networks.lora_formats.writing import DIFFUSERS_FILE
from distill_core.recipe.tables import LoraConfig
from distill_service.settings import settings
from distillery_cli.app import main
from tests.helpers import tiny_sdxl, tiny_text_to_image

KINDS = {"sd": tiny_text_to_image, "sdxl": tiny_sdxl}


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """A store with two teachers, and over each of them one adapter in both forms."""
    root = tmp_path_factory.mktemp("adapters")
    where = api.context(root / "store", root / "cache")
    for kind, build in KINDS.items():
        base = load_denoiser(build(root / kind))
        where.store.publish(root / kind, Manifest(name=kind, **described(base)))
        base.ref = f"{kind}@1"
        lora = LoraDenoiser(base, LoraConfig(rank=3, alpha=2.0, targets=("to_q", "to_out.0", "conv1")))
        torch.manual_seed(5)
        with torch.no_grad():
            for value in lora.parameters():
                value.normal_(std=0.3)
        for form in ("adapter", "merged"):
            lora.form = form
            lora.save(root / f"{kind}-{form}")
            where.store.publish(root / f"{kind}-{form}", Manifest(name=f"{kind}-{form}", **described(lora)))
    return where


def picture(pipeline) -> np.ndarray:
    """(H, W, 3) of a fixed prompt and noise in two steps."""
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    options = {
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "height": 16,
        "width": 16,
        "output_type": "np",
    }
    return pipeline("abc", latents=latents, **options).images[0]


def opened(where, ref: str):
    return diffusers.DiffusionPipeline.from_pretrained(where.store.fetch(ref))


@pytest.fixture(scope="module")
def pictures(where):
    """By kind: the picture of the base, and that of the base with the merged student's network."""
    made = {}
    for kind in KINDS:
        pipeline = opened(where, kind)
        plain = picture(pipeline)
        pipeline.unet = opened(where, f"{kind}-merged").unet
        made[kind] = plain, picture(pipeline)
    return made


@pytest.mark.parametrize("form", ["adapter", "merged"])
@pytest.mark.parametrize("kind", KINDS)
def test_plain_diffusers_loads_a_published_adapter_to_the_same_picture(where, pictures, kind, form):
    pipeline = opened(where, kind)
    pipeline.load_lora_weights(where.store.fetch(f"{kind}-{form}"))
    plain, merged = pictures[kind]
    np.testing.assert_allclose(picture(pipeline), merged, atol=5e-4)  # unmerged: other sums
    assert np.abs(merged - plain).max() > 5e-2


def test_a_version_without_that_file_still_opens(where, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(where.store.fetch("sd-adapter"), folder)
    (folder / DIFFUSERS_FILE).unlink()
    now, before = (api.load(ref, where) for ref in ("sd-adapter", str(folder)))
    assert all(torch.equal(a, b) for a, b in zip(now.parameters(), before.parameters(), strict=True))


@pytest.fixture
def cli(where, monkeypatch, capsys):
    """Runs `distillery` over the module's store; its exit code, and what it said."""
    monkeypatch.setenv("DISTILLERY_STORE_URL", where.store.url)
    monkeypatch.setenv("DISTILLERY_CACHE_DIR", str(where.cache))
    settings.cache_clear()

    def run(*arguments: str) -> tuple[int, str]:
        code = main(arguments)
        said = capsys.readouterr()
        return code, said.out if code == 0 else said.err

    yield run
    settings.cache_clear()


@pytest.mark.parametrize("keys", ["diffusers", "kohya", "comfyui"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_written_for_other_programs(where, cli, pictures, tmp_path, kind, keys):
    file = tmp_path / "style.safetensors"
    code, said = cli("export-adapter", f"{kind}-adapter@1", "--keys", keys, "--out", str(file), "--json")
    assert (code, json.loads(said)) == (0, {"file": str(file), "keys": keys, "base": f"{kind}@1"})
    base = where.artifact(kind)
    again = LoraDenoiser.of_factors(base, read_lora(file, parts_of(base)).network)
    whole, expected = again.merged().network.state_dict(), load_denoiser(where.store.fetch(f"{kind}-merged"))
    for name, value in expected.network.state_dict().items():
        torch.testing.assert_close(whole[name], value, atol=1e-5, rtol=1e-5, msg=name)
    if keys == "comfyui":
        return  # plain diffusers reads no such keys for these networks
    pipeline = opened(where, kind)
    pipeline.load_lora_weights(file)
    np.testing.assert_allclose(picture(pipeline), pictures[kind][1], atol=5e-4)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["sd", "--out", "a.safetensors"], 2, "sd holds no adapter; only students of [student.lora] do"),
        (["sd-adapter", "--out", "a.bin"], 2, "a.bin is refused: give a file that ends in .safetensors"),
        (["sd-adapter", "--out", "{exists}"], 2, "exists; give a new file"),
        (
            ["sd-adapter", "--out", "a.safetensors", "--keys", "kohja"],
            2,
            "--keys kohja is unknown; did you mean",
        ),
        (
            ["sd-adapt", "--out", "a.safetensors"],
            67,
            "no model is called 'sd-adapt'; did you mean 'sd-adapter'?",
        ),
    ],
)
def test_mistakes_are_answered_with_a_sentence(cli, tmp_path, monkeypatch, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exists.safetensors").touch()
    found, message = cli("export-adapter", *(a.format(exists="exists.safetensors") for a in arguments))
    assert found == code
    assert said in message
    assert not (tmp_path / "a.safetensors").exists()
