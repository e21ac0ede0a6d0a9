"""LoRA files in the keys of other programs: the products that they say, whatever other readers make of them."""

from __future__ import annotations

import json
import pickle

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_core.errors import ArtifactError, ConfigError, NotFound
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.lora_formats.names import original_names
from distill_core.networks.lora_formats.reading import Part, assembled, parts_of, read_lora
from distill_core.networks.lora_formats.writing import write_lora
from tests.helpers import tiny_sdxl, tiny_text_to_image

FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 1,
    "attention_head_dim": 6,
    "num_attention_heads": 2,
    "joint_attention_dim": 10,
    "pooled_projection_dim": 14,
    "guidance_embeds": True,
    "axes_dims_rope": (2, 2, 2),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {"sd": tiny_text_to_image(root / "sd"), "sdxl": tiny_sdxl(root / "sdxl")}


@pytest.fixture(scope="module")
def models(folders):
    return {kind: load_denoiser(folder) for kind, folder in folders.items()}


@pytest.fixture(params=["sd", "sdxl"])
def base(request, models):
    return models[request.param]


def random_factors(part: Part, seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Factors for every layer, with ranks from 1 to 4."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for number, (path, shape) in enumerate(part.shapes.items()):
        rank = 1 + number % 4
        down = torch.randn(rank, *shape[1:], generator=generator)
        up = torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=generator)
        factors[path] = down, up
    return factors


def alpha_of(number: int) -> float:
    return (0.7, 3.0, 1.3)[number % 3]


def product(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    down, up = pair
    return (up.flatten(1).double() @ down.flatten(1).double()).reshape(len(up), *down.shape[1:])


def assert_products(found, expected) -> None:
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        torch.testing.assert_close(product(found[path]), value, atol=1e-5, rtol=1e-5, msg=path)


STYLES = {
    "new": ("{part}.{path}.lora_A.weight", "{part}.{path}.lora_B.weight", None),
    "middle": ("{part}.{path}.lora.down.weight", "{part}.{path}.lora.up.weight", None),
    "kohya": (
        "lora_{part}_{under}.lora_down.weight",
        "lora_{part}_{under}.lora_up.weight",
        "lora_{part}_{under}.alpha",
    ),
    "kohya without alpha": (
        "lora_{part}_{under}.lora_down.weight",
        "lora_{part}_{under}.lora_up.weight",
        None,
    ),
    "bare": ("{path}.lora_A.weight", "{path}.lora_B.weight", None),
    "comfy": (
        "diffusion_model.{original}.lora_down.weight",
        "diffusion_model.{original}.lora_up.weight",
        "diffusion_model.{original}.alpha",
    ),
    "kohya by the first names": (
        "lora_unet_{under_original}.lora_down.weight",
        "lora_unet_{under_original}.lora_up.weight",
        "lora_unet_{under_original}.alpha",
    ),
}


def written(style: str, factors) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A file in that style with an alpha that differs from layer to layer, and the products that it says."""
    originals = {paths[0]: name for name, paths in original_names(factors).items()}
    assert originals.keys() == factors.keys()
    tensors, products = {}, {}
    for number, (path, (down, up)) in enumerate(factors.items()):
        name = {"part": "unet", "path": path, "under": path.replace(".", "_"), "original": originals[path]}
        name["under_original"] = originals[path].replace(".", "_")
        for key, value in zip(STYLES[style], (down, up, torch.tensor(alpha_of(number))), strict=True):
            if key is not None:
                tensors[key.format(**name)] = value
        products[path] = product((down, up)) * (alpha_of(number) / len(down) if STYLES[style][2] else 1)
    return tensors, products


@pytest.mark.parametrize("style", STYLES)
def test_every_layer_gets_the_product_that_the_file_says(base, style, tmp_path):
    parts = parts_of(base)
    tensors, products = written(style, random_factors(parts["network"]))
    save_file(tensors, tmp_path / "style.safetensors")
    lora = read_lora(tmp_path / "style.safetensors", parts)
    assert_products(lora.network, products)
    assert lora.text == {}
    assert bool(lora.assumed) == (STYLES[style][2] is None)


def test_half_precision_counts_as_what_it_is(base, tmp_path):
    factors = random_factors(parts_of(base)["network"])
    tensors, _ = written("new", factors)
    save_file({name: value.half() for name, value in tensors.items()}, tmp_path / "half.safetensors")
    found = read_lora(tmp_path / "half.safetensors", parts_of(base)).network
    assert all(torch.equal(found[path][1], up.half().float()) for path, (_, up) in factors.items())


def test_alpha_on_some_layers_leaves_the_others_at_their_rank(base):
    parts = parts_of(base)
    tensors, products = written("kohya", random_factors(parts["network"]))
    silent = list(parts["network"].shapes)[::2]
    for path in silent:
        alpha = tensors.pop(f"lora_unet_{path.replace('.', '_')}.alpha")
        rank = len(tensors[f"lora_unet_{path.replace('.', '_')}.lora_down.weight"])
        products[path] = products[path] * rank / alpha.double()
    lora = assembled(tensors, {}, parts, where="file")
    assert_products(lora.network, products)
    assert lora.assumed == (f"alpha is the rank in {len(silent)} of {len(products)} layers, which say none",)


def test_attention_processors_of_older_diffusers(base):
    parts = parts_of(base)
    paths = [path for path in parts["network"].shapes if ".attn1." in path or ".attn2." in path]
    factors = {path: pair for path, pair in random_factors(parts["network"]).items() if path in paths}
    tensors = {}
    for path, (down, up) in factors.items():
        head, name = path.removesuffix(".0").rsplit(".", 1)
        tensors[f"unet.{head}.processor.{name}_lora.down.weight"] = down
        tensors[f"unet.{head}.processor.{name}_lora.up.weight"] = up
    lora = assembled(tensors, {}, parts, where="file")
    assert_products(lora.network, {path: product(pair) for path, pair in factors.items()})
    assert lora.style == "older diffusers"


TEXT_STYLES = {
    "new": "text_encoder.{path}.lora_{A}.weight",
    "middle": "text_encoder.{path}.lora_linear_layer.{down}.weight",
    "old": "text_encoder.{old}_lora.{down}.weight",
    "kohya": "lora_{te}_{under}.lora_{down}.weight",
    "comfy": "text_encoders.clip_l.transformer.{path}.lora_{down}.weight",
}


@pytest.mark.parametrize("level", ["", "text_model."], ids=["flat", "text_model"])
@pytest.mark.parametrize("style", TEXT_STYLES)
def test_text_encoders_are_read_under_either_name_of_transformers(models, style, level):
    parts = parts_of(models["sd"])
    old = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    factors = {
        path: pair
        for path, pair in random_factors(parts["text_encoder"]).items()
        if style != "old" or path.rpartition(".")[2] in old
    }
    assert len(factors) >= 4
    tensors = {}
    for path, (down, up) in factors.items():
        name = level + path.removeprefix("text_model.")
        head, _, last = name.rpartition(".")
        words = {"path": name, "under": name.replace(".", "_"), "old": f"{head}.{old.get(last)}", "te": "te"}
        tensors[TEXT_STYLES[style].format(A="A", down="down", **words)] = down
        tensors[TEXT_STYLES[style].format(A="B", down="up", **words)] = up
    lora = assembled(tensors, {}, parts, where="file")
    assert_products(lora.text["text_encoder"], {path: product(pair) for path, pair in factors.items()})


def test_the_second_text_encoder_has_its_own_factors(models):
    parts = parts_of(models["sdxl"])
    tensors, expected = {}, {}
    for number, part in ((1, "text_encoder"), (2, "text_encoder_2")):
        factors = random_factors(parts[part], seed=number)
        expected[part] = {path: product(pair) * 0.7 / len(pair[0]) for path, pair in factors.items()}
        for path, (down, up) in factors.items():
            key = f"lora_te{number}_text_model_{path.removeprefix('text_model.').replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = torch.tensor(0.7)
    lora = assembled(tensors, {}, parts, where="file")
    assert lora.network == {}
    for part in expected:
        assert_products(lora.text[part], expected[part])


def test_the_header_of_diffusers_says_the_scale_of_each_layer(base):
    parts = parts_of(base)
    factors = {path: pair for path, pair in random_factors(parts["network"]).items() if ".attn" in path}
    ranks = {path: len(down) for path, (down, _) in factors.items()}
    odd = next(iter(factors))
    header = {
        "unet.r": 2,
        "unet.lora_alpha": 3.0,
        "unet.rank_pattern": {path: rank for path, rank in ranks.items() if rank != 2},
        "unet.alpha_pattern": {odd: 5.0},
        "unet.target_modules": sorted(factors),
        "unet.use_dora": False,
    }
    tensors, _ = written_some("new", factors)
    found = assembled(tensors, {"lora_adapter_metadata": json.dumps(header)}, parts, where="file")
    scaled = {
        path: product(pair) * (5.0 if path == odd else 3.0) / ranks[path] for path, pair in factors.items()
    }
    assert_products(found.network, scaled)
    assert found.assumed == ()
    with pytest.raises(ArtifactError, match="use_dora = true, which is no plain LoRA"):
        assembled(
            tensors,
            {"lora_adapter_metadata": json.dumps({**header, "unet.use_dora": True})},
            parts,
            where="file",
        )


def written_some(style: str, factors):
    down, up, _ = STYLES[style]
    tensors = {}
    for path, pair in factors.items():
        words = {"part": "unet", "path": path, "under": path.replace(".", "_")}
        tensors |= {down.format(**words): pair[0], up.format(**words): pair[1]}
    return tensors, {path: product(pair) for path, pair in factors.items()}


SDXL = {
    "block_out_channels": (32, 64, 96),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 60,
    "use_linear_projection": True,
    "attention_head_dim": 8,
}


@pytest.mark.parametrize("layout", [{"block_out_channels": (32,) * 4}, SDXL], ids=["sd", "sdxl"])
def test_first_names_are_those_that_diffusers_converts_from(layout):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with torch.device("meta"):
        network = diffusers.UNet2DConditionModel(**layout, cross_attention_dim=16)
    names = original_names(Part.of(network).shapes)
    assert len(names) == len(Part.of(network).shapes)
    marks = {}
    for number, name in enumerate(names):
        marks |= dict.fromkeys(
            (f"model.diffusion_model.{name}.weight", f"model.diffusion_model.{name}.bias"),
            torch.tensor(number),
        )
    converted = convert_ldm_unet_checkpoint(marks, dict(network.config))
    for number, (path,) in enumerate(names.values()):
        assert int(converted[f"{path}.weight"]) == number, path


# -- FLUX ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux() -> diffusers.FluxTransformer2DModel:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(**FLUX)


@pytest.mark.parametrize("style", ["kohya", "comfy"])
def test_fused_layers_of_flux_are_taken_apart_by_rows(flux, style):
    part = Part.of(flux)
    generator = torch.Generator().manual_seed(0)
    tensors, expected = {}, {}
    for name, layers in original_names(part.shapes).items():
        rows = [part.shapes[layer][0] for layer in layers]
        down = torch.randn(3, part.shapes[layers[0]][1], generator=generator)
        up = torch.randn(sum(rows), 3, generator=generator)
        key = f"lora_unet_{name.replace('.', '_')}" if style == "kohya" else f"diffusion_model.{name}"
        tensors |= {
            f"{key}.lora_down.weight": down,
            f"{key}.lora_up.weight": up,
            f"{key}.alpha": torch.tensor(0.7),
        }
        whole = (up.double() @ down.double()) * 0.7 / 3
        if layers == ("norm_out.linear",):
            whole = whole.roll(len(whole) // 2, 0)
        expected |= dict(zip(layers, whole.split(rows), strict=True))
    assert len(expected) == len(part.shapes), "each layer of the transformer has a first name"
    found = assembled(tensors, {}, {"network": part}, where="file")
    assert_products(found.network, expected)


@pytest.mark.parametrize("style", ["diffusers", "kohya", "comfyui"])
def test_a_written_file_of_flux_is_read_back_with_the_same_ranks(flux, style, tmp_path):
    part = Part.of(flux)
    factors = random_factors(part)
    del factors["transformer_blocks.0.attn.to_k"], factors["single_transformer_blocks.0.proj_mlp"]
    write_lora(factors, flux, tmp_path / "f.safetensors", style=style)
    found = read_lora(tmp_path / "f.safetensors", {"network": part}).network
    assert_products(found, {path: product(pair) for path, pair in factors.items()})
    fused = "transformer_blocks.1.attn.to_q"
    assert len(found[fused][0]) == len(factors[fused][0])


# -- written files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["diffusers", "kohya", "comfyui"])
def test_a_written_file_is_read_back(base, style, tmp_path):
    parts = parts_of(base)
    factors = random_factors(parts["network"])
    write_lora(factors, base, tmp_path / "f.safetensors", style=style)
    lora = read_lora(tmp_path / "f.safetensors", parts)
    assert_products(lora.network, {path: product(pair) for path, pair in factors.items()})
    assert lora.style == {"diffusers": "diffusers", "kohya": "kohya", "comfyui": "ComfyUI"}[style]


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_diffusers_own_loader_reads_a_written_file_to_the_same_weights(
    folders, models, kind, style, tmp_path
):
    base = models[kind]
    factors = random_factors(parts_of(base)["network"])
    if (kind, style) == ("sdxl", "kohya"):
        # the published SDXL attends in each block that it enlarges in, and the loader counts on that
        del factors["up_blocks.0.upsamplers.0.conv"]
    write_lora(factors, base, tmp_path / "f.safetensors", style=style)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folders[kind])
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    pipeline.load_lora_weights(tmp_path / "f.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    after = pipeline.unet.state_dict()
    for path, pair in factors.items():
        gained = after[f"{path}.weight"].double() - before[f"{path}.weight"].double()
        torch.testing.assert_close(gained, product(pair), atol=1e-5, rtol=1e-4, msg=path)


def test_a_network_without_first_names_has_no_file_for_comfyui(tmp_path):
    from distill_core.networks.diffusers_new import build_denoiser
    from distill_core.recipe.tables import NetworkConfig
    from tests.helpers import TINY_NETWORKS

    network = NetworkConfig(name="DiTTransformer2DModel", args=TINY_NETWORKS["DiTTransformer2DModel"])
    base = build_denoiser(network, parameterisation="edm", shape=(1, 8, 8), num_classes=10)
    factors = random_factors(parts_of(base)["network"])
    with pytest.raises(ConfigError, match="ComfyUI has no names for this network's layers"):
        write_lora(factors, base, tmp_path / "f.safetensors", style="comfyui")
    with pytest.raises(ConfigError, match="keys 'kohja' are unknown; did you mean 'kohya'"):
        write_lora(factors, base, tmp_path / "f.safetensors", style="kohja")
    write_lora(factors, base, tmp_path / "f.safetensors", style="kohya")
    assert all(name.startswith("lora_transformer_") for name in load_file(tmp_path / "f.safetensors"))


# -- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector", "DoRA"),
        ("hada_w1_a", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("lora_mid.weight", "LoCon-CP"),
    ],
)
def test_other_adapters_are_refused_with_their_number(base, ending, kind):
    parts = parts_of(base)
    tensors, _ = written("kohya", random_factors(parts["network"]))
    for path in list(parts["network"].shapes)[:3]:
        tensors[f"lora_unet_{path.replace('.', '_')}.{ending}"] = torch.ones(2)
    with pytest.raises(ArtifactError, match=f"file holds 3 layers of {kind}, and only plain LoRA is read"):
        assembled(tensors, {}, parts, where="file")


def changed(tensors, change: str) -> dict[str, torch.Tensor]:
    name = next(key for key in tensors if key.endswith("mid_block_attentions_0_proj_in.lora_up.weight"))
    layer = name.removesuffix(".lora_up.weight")
    value = tensors[name]
    return {
        "strange": {**tensors, "lora_unet_x.diff": value, "lora_unet_x.diff_b": value},
        "half": {key: each for key, each in tensors.items() if key != name},
        "nan": {**tensors, name: value.clone().fill_(torch.nan)},
        "whole numbers": {**tensors, name: value.long()},
        "another rank": {**tensors, name: torch.cat([value, value], dim=1)},
        "another width": {**tensors, name: torch.cat([value, value])},
        "alphas": {**tensors, f"{layer}.alpha": torch.ones(2)},
        "twice": {**tensors, name.replace(".lora_up.", ".lora_B."): value},
        "two names": {
            **tensors,
            "unet.mid_block.attentions.0.proj_in.lora_B.weight": value,
            "unet.mid_block.attentions.0.proj_in.lora_A.weight": tensors[f"{layer}.lora_down.weight"],
        },
        "no tensors": {},
    }[change]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("strange", "holds lora_unet_x.diff and 1 more, which no LoRA is known to have"),
        ("half", "mid_block_attentions_0_proj_in has no up factor"),
        ("nan", "has values that are not finite"),
        ("whole numbers", "holds no floating-point numbers"),
        ("another rank", "have the shapes .* which do not go together"),
        ("another width", "1 of its .* layers do not fit: mid_block_attentions_0_proj_in \\(32 from 16\\)"),
        ("alphas", "alpha of mid_block_attentions_0_proj_in is no single number"),
        ("twice", "twice, in two ways of writing"),
        ("two names", "holds the factors of mid_block.attentions.0.proj_in twice, under two names"),
        ("no tensors", "holds no tensors"),
    ],
)
def test_a_damaged_file_is_one_sentence(base, change, said):
    parts = parts_of(base)
    tensors, _ = written("kohya", random_factors(parts["network"]))
    with pytest.raises(ArtifactError, match=said):
        assembled(changed(tensors, change), {}, parts, where="file")


def test_a_lora_of_another_base_names_what_does_not_fit(models):
    xl, other = (parts_of(models[kind]) for kind in ("sdxl", "sd"))
    tensors, _ = written("new", random_factors(xl["network"]))
    with pytest.raises(ArtifactError) as said:
        assembled(tensors, {}, other, where="file", base="sd@1")
    message = str(said.value)
    assert message.startswith("file is no LoRA of sd@1: ")
    assert "attn2.to_k (16 from 32)" in message
    assert message.count(", ") == 4, "five layers are named"
    assert "add_embedding" not in message or "…" in message


def test_alphas_beside_a_header_that_says_them_are_refused(base):
    parts = parts_of(base)
    tensors, _ = written("kohya", random_factors(parts["network"]))
    header = {
        "lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 2.0, "unet.target_modules": []})
    }
    with pytest.raises(ArtifactError, match=r"says its scales twice, as .alpha and as lora_adapter_metadata"):
        assembled(tensors, header, parts, where="file")


def test_a_pickle_in_disguise_is_not_opened(base, tmp_path):
    for name, write in (("a", lambda f: pickle.dump({}, f)), ("b", lambda f: torch.save({}, f))):
        with (tmp_path / f"{name}.safetensors").open("wb") as file:
            write(file)
        with pytest.raises(
            ArtifactError, match="is a (pickle|zip of pickles).*: only safetensors are loaded"
        ):
            read_lora(tmp_path / f"{name}.safetensors", parts_of(base))
    (tmp_path / "c.ckpt").write_bytes(b"words")
    with pytest.raises(ArtifactError, match=r"is no .safetensors file"):
        read_lora(tmp_path / "c.ckpt", parts_of(base))
    (tmp_path / "d.safetensors").write_bytes(b"words and more words")
    with pytest.raises(ArtifactError, match="is damaged or no safetensors file"):
        read_lora(tmp_path / "d.safetensors", parts_of(base))
    with pytest.raises(NotFound, match="does not exist"):
        read_lora(tmp_path / "e.safetensors", parts_of(base))


def test_a_header_whose_length_begins_like_a_pickle_is_read(tmp_path):
    for words in range(300):
        save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors", metadata={"words": "x" * words})
        if (tmp_path / "a.safetensors").read_bytes()[:1] == b"\x80":
            break
    from distill_core.networks.foreign.weights import read_safetensors

    assert (tmp_path / "a.safetensors").read_bytes()[:1] == b"\x80"
    assert torch.equal(read_safetensors(tmp_path / "a.safetensors")[0]["w"], torch.ones(1))
