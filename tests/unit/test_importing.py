"""Models of other programs, imported from the command line: recognised, checked, published whole or not at all."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
from pathlib import Path

import diffusers
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_core import api
from distill_core.kinds.cards import generator_card
from distill_core.networks.adapters import LoraDenoiser, plain
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.generation import generate
from distill_core.networks.lora_formats.names import original_names
from distill_core.networks.lora_formats.reading import parts_of
from distill_core.networks.single_file_names import (
    clip_entries,
    codec_entries,
    open_clip_entries,
    unet_entries,
)
from distill_service.settings import settings
from distillery_cli.app import main
from tests.helpers import tiny_sdxl, tiny_text_to_image
from tests.tiny_pipelines import tiny_flux

KINDS = {"sd": tiny_text_to_image, "sdxl": tiny_sdxl}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("importing")


@pytest.fixture(scope="module")
def folders(root) -> dict[str, Path]:
    return {kind: build(root / kind) for kind, build in KINDS.items()}


@pytest.fixture(scope="module")
def where(root):
    return api.context(root / "store", root / "cache")


@pytest.fixture
def cli(where, monkeypatch, capsys):
    """Runs `distillery import … --json` over the module's store; its exit code, and what it said."""
    monkeypatch.setenv("DISTILLERY_STORE_URL", where.store.url)
    monkeypatch.setenv("DISTILLERY_CACHE_DIR", str(where.cache))
    settings.cache_clear()

    def run(*arguments: object) -> tuple[int, dict | str]:
        code = main(["import", *map(str, arguments), "--json"])
        said = capsys.readouterr()
        return code, json.loads(said.out) if code == 0 else said.err

    yield run
    settings.cache_clear()


@pytest.fixture(scope="module")
def bases(where, folders) -> dict[str, str]:
    """Both pipelines in the store."""
    wishes = {kind: api.Wish(f"base-{kind}", licence="openrail++") for kind in KINDS}
    made = {kind: api.import_model(folders[kind], wish, where) for kind, wish in wishes.items()}
    return {kind: imported.manifest.ref for kind, imported in made.items()}


def picture(denoiser) -> torch.Tensor:
    cond = denoiser.encode_prompts(["abc", "d"])
    return generate(denoiser, cond, 2, seed=3, num_steps=2)


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# -- folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipelines_folder_is_published_with_licence_and_hashes(where, folders, cli, kind):
    code, said = cli(folders[kind], "--name", f"mine-{kind}", "--licence", "mit", "--steps", 7)
    assert code == 0, said
    assert said["recognised"] == f"the folder of a StableDiffusion{'XL' * (kind == 'sdxl')}Pipeline"
    assert said["assumed"] == ["it predicts epsilon, as its scheduler says"]
    manifest = where.store.manifest(said["artifact"])
    assert (manifest.licence, generator_card(manifest).sampler.num_steps) == ("mit", 7)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert manifest.imported[weights] == said["sha256"][weights] == sha256(folders[kind] / weights)
    assert manifest.parity is not None
    loaded, original = api.load(manifest.ref, where), load_denoiser(folders[kind])
    assert torch.equal(picture(loaded), picture(original))


@pytest.mark.parametrize("form", ["sharded", "fp16", "sharded fp16"])
def test_sharded_and_variant_files_are_read(where, folders, cli, tmp_path, form):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folders["sd"])
    if "fp16" in form:
        pipeline = pipeline.to(dtype=torch.float16)
    size = "60KB" if "sharded" in form else "10GB"
    pipeline.save_pretrained(tmp_path / "p", variant="fp16" if "fp16" in form else None, max_shard_size=size)
    assert (len(list((tmp_path / "p" / "unet").glob("*.safetensors"))) > 1) == ("sharded" in form)
    code, said = cli(tmp_path / "p", "--name", form.replace(" ", "-"))
    assert code == 0, said
    expected = {
        name: value.half() if "fp16" in form else value for name, value in network(folders["sd"]).items()
    }
    for name, value in api.load(said["artifact"], where).network.state_dict().items():
        assert torch.equal(value, expected[name].float()), name


def network(folder: Path) -> dict[str, torch.Tensor]:
    return load_denoiser(folder).network.state_dict()


def test_the_same_import_is_published_once(where, folders, cli):
    first, again = (cli(folders["sd"], "--name", "once")[1]["artifact"] for _ in range(2))
    other = cli(folders["sd"], "--name", "once", "--steps", 3)[1]["artifact"]
    assert (first, again, other) == ("once@1", "once@1", "once@2")


def test_a_dry_run_checks_and_publishes_nothing(where, folders, cli):
    code, said = cli(folders["sd"], "--name", "dry", "--dry-run")
    assert code == 0
    assert said["artifact"] is None
    assert said["recognised"] == "the folder of a StableDiffusionPipeline"
    assert where.store.versions("dry") == []


def test_what_was_recognised_is_said_in_words(where, folders, monkeypatch, capsys):
    monkeypatch.setenv("DISTILLERY_STORE_URL", where.store.url)
    monkeypatch.setenv("DISTILLERY_CACHE_DIR", str(where.cache))
    settings.cache_clear()
    assert main(["import", str(folders["sd"]), "--name", "words"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "recognised: the folder of a StableDiffusionPipeline",
        "assumed: it predicts epsilon, as its scheduler says",
        "assumed: it is sampled in 30 steps, as --steps can change",
        "published: words@1",
    ]
    assert "no licence is said" in said.err
    settings.cache_clear()


# -- single files -------------------------------------------------------------------------------------------


def single_file(
    folder: Path, file: Path, *, codec: bool = True, text: bool = True, **more: torch.Tensor
) -> Path:
    """The checkpoint that the first code would have written of a pipeline."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    tensors: dict[str, torch.Tensor] = {}
    put(tensors, "model.diffusion_model.", pipeline.unet, unet_entries)
    if codec:
        put(tensors, "first_stage_model.", pipeline.vae, codec_entries)
    xl = hasattr(pipeline, "text_encoder_2")
    if text:
        prefix = "conditioner.embedders.0.transformer." if xl else "cond_stage_model.transformer."
        put(tensors, prefix, pipeline.text_encoder, clip_entries)
    if text and xl:
        put(tensors, "conditioner.embedders.1.model.", pipeline.text_encoder_2, open_clip_entries)
    save_file({name: value.contiguous() for name, value in {**tensors, **more}.items()}, file)
    return file


def put(tensors, prefix: str, module, entries) -> None:
    state = module.state_dict()
    for key, entry in entries(state).items():
        name, value = prefix + entry.name, state[key]
        if entry.name.endswith(("in_proj_weight", "in_proj_bias")):
            order = "qkv".index(key.rpartition(".")[0][-6])
            tensors.setdefault(name, value.new_zeros(3 * len(value), *value.shape[1:]))
            tensors[name][order * len(value) : (order + 1) * len(value)] = value
        elif entry.name == "text_projection":
            tensors[name] = value.T
        elif ".attn_1." in name and name.endswith(".weight") and value.ndim == 2:
            tensors[name] = value[:, :, None, None]
        else:
            tensors[name] = value


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_is_the_model_that_it_was_made_of(where, folders, cli, tmp_path, kind):
    settings_alone = tmp_path / "settings"
    shutil.copytree(folders[kind], settings_alone, ignore=shutil.ignore_patterns("*.safetensors"))
    file = single_file(folders[kind], tmp_path / "model.safetensors", global_step=torch.tensor(5))
    code, said = cli(file, "--name", f"single-{kind}", "--config", settings_alone)
    assert code == 0, said
    family = "Stable Diffusion XL" if kind == "sdxl" else "Stable Diffusion 1.x"
    parts = "unet, vae, text_encoder" + ", text_encoder_2" * (kind == "sdxl")
    assert said["recognised"] == f"a single-file checkpoint of {family} ({parts})"
    assert said["sha256"] == {"model.safetensors": sha256(file)}
    assert torch.equal(picture(api.load(said["artifact"], where)), picture(load_denoiser(folders[kind])))


def test_our_names_of_a_single_file_are_those_that_diffusers_reads(folders, tmp_path):
    file = single_file(folders["sdxl"], tmp_path / "model.safetensors")
    folder = str(folders["sdxl"])
    for cls, part in ((diffusers.UNet2DConditionModel, "unet"), (diffusers.AutoencoderKL, "vae")):
        read = cls.from_single_file(str(file), config=folder, subfolder=part).state_dict()
        own = cls.from_pretrained(folder, subfolder=part).state_dict()
        assert read.keys() == own.keys()
        assert all(torch.equal(read[name], value) for name, value in own.items())


def test_open_clips_names_are_those_that_diffusers_converts(folders):
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    model = diffusers.DiffusionPipeline.from_pretrained(folders["sdxl"]).text_encoder_2
    tensors: dict[str, torch.Tensor] = {}
    put(tensors, "conditioner.embedders.1.model.", model, open_clip_entries)
    read = convert_open_clip_checkpoint(model, tensors, prefix="conditioner.embedders.1.model.")
    own = model.state_dict()
    assert read.keys() == own.keys()
    # its projection here is narrower than its states, and diffusers cuts the thirds by that
    alike = [name for name in own if "self_attn" not in name or "out_proj" in name]
    assert all(torch.equal(read[name], own[name]) for name in alike)


@pytest.mark.parametrize("named", ["first", "diffusers"])
def test_a_unet_alone_takes_the_rest_from_a_model_of_the_store(where, folders, bases, cli, tmp_path, named):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folders["sd"])
    changed = {name: value * 1.25 for name, value in pipeline.unet.state_dict().items()}
    entries = unet_entries(changed)
    names = {key: entries[key].name if named == "first" else key for key in changed}
    save_file({names[key]: value for key, value in changed.items()}, tmp_path / "unet.safetensors")
    code, said = cli(tmp_path / "unet.safetensors", "--name", f"unet-{named}", "--base", bases["sd"])
    assert code == 0, said
    assert (said["parents"], said["licence"]) == ([bases["sd"]], "openrail++")
    loaded = api.load(said["artifact"], where)
    assert all(torch.equal(value, changed[name]) for name, value in loaded.network.state_dict().items())
    assert loaded.codec is not None


def test_what_a_file_says_of_its_prediction_counts(where, folders, cli, tmp_path):
    more = {"v_pred": torch.ones(1), "ztsnr": torch.ones(1)}
    file = single_file(folders["sd"], tmp_path / "v.safetensors", **more)
    code, said = cli(file, "--name", "v", "--config", folders["sd"])
    assert code == 0, said
    assert said["assumed"][0] == "the network predicts v, as the file's v_pred, ztsnr says"
    loaded = api.load(said["artifact"], where)
    assert loaded.parameterisation == "v"
    assert loaded.schedule.sigma_max > 5 * load_denoiser(folders["sd"]).schedule.sigma_max, (
        "no signal is left"
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"model.diffusion_model.strange.weight": torch.ones(2)}, "holds 1 tensors that .* has no place for"),
        (
            {"double_blocks.0.img_attn.qkv.weight": torch.ones(2)},
            "is a checkpoint of FLUX, whose single files",
        ),
        ({"joint_blocks.0.x.weight": torch.ones(2)}, "is a checkpoint of SD 3, whose single files"),
        ({"scaled_fp8": torch.ones(2)}, "keeps its weights divided by scales"),
        (
            {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(16, 9, 3, 3)},
            "is shown 9 channels and makes 4",
        ),
        (
            {"model.diffusion_model.out.0.weight": torch.ones(3)},
            "in 1 tensors: out.0.weight \\(3,\\) for \\(16,\\)",
        ),
        ({"first_stage_model.quant_conv.bias": torch.full((8,), torch.nan)}, "vae.* not finite"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_sentence(where, folders, cli, tmp_path, more, said):
    file = single_file(folders["sd"], tmp_path / "a.safetensors", **more)
    refused(where, cli(file, "--name", "bad", "--config", folders["sd"]), said)


def refused(where, answer: tuple[int, str], said: str, name: str = "bad") -> None:
    code, message = answer
    assert code in (2, 66, 67)
    assert re.search(said, " ".join(message.split())), message
    assert "Traceback" not in message
    assert where.store.versions(name) == []
    assert not (Path(where.store.url) / name).exists(), "nothing is left of it"
    assert [path.name for path in where.cache.glob("import-*")] == []


# -- LoRA ---------------------------------------------------------------------------------------------------


def lora_over(base, *, text: bool, file: Path) -> dict[str, torch.Tensor]:
    """A kohya file with an alpha of its own for each layer, and the products by part and layer."""
    generator = torch.Generator().manual_seed(7)
    tensors, products = {}, {}
    for part, prefix in (("network", "lora_unet_"), ("text_encoder", "lora_te_")):
        if part != "network" and not text:
            continue
        for number, (path, shape) in enumerate(parts_of(base)[part].shapes.items()):
            rank, alpha = 1 + number % 3, (0.7, 3.0)[number % 2]
            down = torch.randn(rank, *shape[1:], generator=generator) * 0.2
            up = torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=generator) * 0.2
            name = prefix + path.replace(".", "_")
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
            products[part, path] = (up.flatten(1) @ down.flatten(1)).reshape(shape) * alpha / rank
    save_file(tensors, file)
    return products


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_a_lora_is_published_over_its_base(where, bases, cli, tmp_path, form):
    base = api.load(bases["sd"], where)
    products = lora_over(base, text=False, file=tmp_path / "style.safetensors")
    code, said = cli(
        tmp_path / "style.safetensors",
        "--name",
        f"style-{form}",
        "--base",
        "base-sd",
        "--form",
        form,
        "--steps",
        4,
    )
    assert code == 0, said
    assert said["recognised"] == f"a LoRA in kohya keys (layers: {len(products)} of network)"
    assert (said["form"], said["parents"], said["licence"]) == (form, [bases["sd"]], "openrail++")
    loaded = api.load(said["artifact"], where)
    assert isinstance(loaded, LoraDenoiser) == (form == "adapter")
    before, after = base.network.state_dict(), plain(loaded).network.state_dict()
    for (_, path), product in products.items():
        torch.testing.assert_close(
            after[f"{path}.weight"] - before[f"{path}.weight"], product, atol=1e-5, rtol=1e-4
        )
    assert loaded.sampler.num_steps == 4


def test_a_lora_of_text_encoders_too_is_published_merged(where, bases, cli, tmp_path):
    base = api.load(bases["sd"], where)
    products = lora_over(base, text=True, file=tmp_path / "style.safetensors")
    code, said = cli(tmp_path / "style.safetensors", "--name", "with-text", "--base", "base-sd")
    assert code == 0, said
    assert said["form"] == "full"
    assert said["assumed"] == ["it adapts text encoders too, so it is published merged, with all weights"]
    loaded = api.load(said["artifact"], where)
    models = {"network": (base.network, loaded.network), "text_encoder": (base.text.model, loaded.text.model)}
    for (part, path), product in products.items():
        before, after = (model.get_submodule(path).weight for model in models[part])
        torch.testing.assert_close(after - before, product, atol=1e-5, rtol=1e-4)
    assert torch.equal(
        api.load(bases["sd"], where).text.null()["prompt_embeds"], base.text.null()["prompt_embeds"]
    )


def test_a_peft_folder_is_published_over_its_base(where, bases, folders, cli, tmp_path):
    unet = diffusers.UNet2DConditionModel.from_pretrained(folders["sd"], subfolder="unet")
    config = peft.LoraConfig(r=3, lora_alpha=2, target_modules=["to_q", "conv1"], init_lora_weights=False)
    theirs = peft.get_peft_model(unet, config)
    theirs.save_pretrained(tmp_path / "style")
    code, said = cli(tmp_path / "style", "--name", "by-peft", "--base", bases["sd"])
    assert code == 0, said
    assert said["recognised"] == "a LoRA in peft's format"
    expected = theirs.merge_and_unload().state_dict()
    for name, value in plain(api.load(said["artifact"], where)).network.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)


def test_a_folder_with_one_lora_file_is_that_file(bases, where, cli, tmp_path):
    lora_over(api.load(bases["sd"], where), text=False, file=tmp_path / "pytorch_lora_weights.safetensors")
    code, said = cli(tmp_path, "--name", "in-a-folder", "--base", bases["sd"], "--dry-run")
    assert code == 0, said
    assert said["recognised"].startswith("a LoRA in kohya keys")


def test_a_kohya_file_of_flux_is_read_over_it_and_loads_again_in_plain_diffusers(where, cli, tmp_path):
    folder = tiny_flux(tmp_path / "flux")
    code, said = cli(folder, "--name", "flux")
    assert code == 0, said
    assert said["assumed"][0] == "it predicts the velocity of a flow, as its scheduler says"
    base = where.artifact("flux")
    shapes, generator = parts_of(base)["network"].shapes, torch.Generator().manual_seed(0)
    before, expected, tensors = base.network.state_dict(), {}, {}
    for name, layers in original_names(shapes).items():
        rows = [shapes[layer][0] for layer in layers]
        down = 0.1 * torch.randn(2, shapes[layers[0]][1], generator=generator)
        up = 0.1 * torch.randn(sum(rows), 2, generator=generator)
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(1.3)
        product = up @ down * 1.3 / 2
        if layers == ("norm_out.linear",):  # its shift is before its scale there
            product = torch.cat(product.chunk(2)[::-1])
        expected |= dict(zip(layers, product.split(rows), strict=True))
    save_file(tensors, tmp_path / "style.safetensors")
    code, said = cli(tmp_path / "style.safetensors", "--name", "flux-style", "--base", "flux")
    assert code == 0, said
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(where.store.fetch("flux-style"))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    ours = plain(where.artifact("flux-style")).network.state_dict()
    assert len(expected) == len(shapes)
    for state in (ours, pipeline.transformer.state_dict()):
        for path, product in expected.items():
            gained = state[f"{path}.weight"] - before[f"{path}.weight"]
            torch.testing.assert_close(gained, product, atol=1e-6, rtol=1e-4, msg=path)


# -- mistakes -----------------------------------------------------------------------------------------------


def test_a_lora_of_another_base_is_refused_by_the_layers_that_do_not_fit(where, bases, cli, tmp_path):
    lora_over(api.load(bases["sdxl"], where), text=False, file=tmp_path / "xl.safetensors")
    said = rf"xl.safetensors is no LoRA of {bases['sd']}: \d+ of its \d+ layers do not fit: "
    refused(where, cli(tmp_path / "xl.safetensors", "--name", "bad", "--base", bases["sd"]), said)


def test_pickles_are_not_opened(where, folders, bases, cli, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was-here",))

    (tmp_path / "a.safetensors").write_bytes(pickle.dumps(Evil()))
    torch.save({"x": torch.ones(1)}, tmp_path / "b.ckpt")
    shutil.copytree(folders["sd"], tmp_path / "p")
    (tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(pickle.dumps(Evil()))
    for source, said in (
        ("a.safetensors", "a.safetensors is a pickle: only safetensors are loaded"),
        ("b.ckpt", "b.ckpt is a zip of pickles, as torch.save writes: only safetensors are loaded"),
        ("p", "unet is damaged or incomplete"),
    ):
        refused(where, cli(tmp_path / source, "--name", "bad"), said)
    assert not (tmp_path / "was-here").exists()


def test_a_missing_shard_is_one_sentence(where, folders, cli, tmp_path):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folders["sd"])
    pipeline.save_pretrained(tmp_path / "p", max_shard_size="60KB")
    shard = sorted((tmp_path / "p" / "unet").glob("*-of-*.safetensors"))[1]
    shard.unlink()
    refused(where, cli(tmp_path / "p", "--name", "bad"), f"unet is damaged or incomplete.*{shard.name}")


def test_weights_that_are_not_finite_are_refused(where, folders, cli, tmp_path):
    shutil.copytree(folders["sd"], tmp_path / "p")
    file = tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.bias"][1] = np.inf
    save_file(weights, file, metadata={"format": "pt"})
    refused(where, cli(tmp_path / "p", "--name", "bad"), "conv_out.bias has values that are not finite")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{missing}", "--name", "bad"], "does not exist; give a folder or a .safetensors file"),
        (["{empty}", "--name", "bad"], "holds no model"),
        (["{strange}", "--name", "bad"], "is neither a LoRA nor a checkpoint of Stable Diffusion"),
        (["{sd}", "--name", "Bad Name"], "is not a plain name"),
        (["{sd}", "--name", "bad", "--steps", "0"], "0 steps are not allowed; give 1 to 1000"),
        (["{sd}", "--name", "bad", "--base", "base-sd"], "is whole; leave --base and --config out"),
        (["{sd}", "--name", "bad", "--form", "both"], "--form both is unknown; choose merged or adapter"),
        (["{lora}", "--name", "bad"], "is a LoRA; say what it adapts: --base NAME@VERSION"),
        (["{lora}", "--name", "bad", "--base", "nobody"], "no model is called 'nobody'"),
        (
            ["{lora}", "--name", "bad", "--base", "base-sd", "--config", "{sd}"],
            "is a LoRA, which needs no --config",
        ),
        (["{single}", "--name", "bad"], "has no settings and no tokenizer; give one of --config FOLDER"),
        (["{single}", "--name", "bad", "--config", "{empty}"], "it has no unet/config.json"),
        (["{single}", "--name", "bad", "--config", "{sdxl}"], "does not fit the settings of its unet"),
    ],
)
def test_mistakes_are_answered_with_a_sentence(where, folders, bases, cli, tmp_path, arguments, said):
    (tmp_path / "empty").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "strange.safetensors")
    if "{lora}" in arguments:
        lora_over(api.load(bases["sd"], where), text=False, file=tmp_path / "lora.safetensors")
    if "{single}" in arguments:
        single_file(folders["sd"], tmp_path / "single.safetensors", codec=False, text=False)
    names = {name: tmp_path / f"{name}.safetensors" for name in ("strange", "lora", "single")}
    names |= {"missing": tmp_path / "missing", "empty": tmp_path / "empty", **folders}
    refused(where, cli(*(argument.format(**names) for argument in arguments)), said)


def test_a_failure_while_publishing_leaves_nothing(where, folders, cli, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(where.store.__class__, "_write_atomically", full)
    code, message = cli(folders["sd"], "--name", "full")
    assert code == 75
    assert "No space left on device" in message
    monkeypatch.undo()
    assert list((Path(where.store.url) / "full" / "versions").glob("*")) == []
