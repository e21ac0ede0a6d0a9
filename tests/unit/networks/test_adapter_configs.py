"""Adapters that peft wrote: each key of their configuration is honoured as peft does, or refused by its name."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_core.errors import ArtifactError, ConfigError
from distill_core.networks.adapters import LoraDenoiser, combined
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.recipe.tables import LoraConfig, NetworkConfig

ARGS = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 4}
UNET = {
    "block_out_channels": [8, 12],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
PLACES = ["to_q", "net.0.proj", "net.2"]  # square, wide and tall
HONOURED = {
    "alpha over rank": {},
    "alpha over the root of the rank": {"use_rslora": True},
    "ranks by layer": {"rank_pattern": {"net.2": 5, "transformer_blocks.0.attn1.to_q": 1}},
    "alphas by layer": {"alpha_pattern": {"to_q": 11, "1.ff.net.0.proj": 0.3}},
    "both, and the root": {"rank_pattern": {"net.2": 5}, "alpha_pattern": {"net.2": 2}, "use_rslora": True},
    "some layers left out": {"exclude_modules": ["0.attn1.to_q"]},
    "some blocks alone": {"layers_to_transform": [1], "layers_pattern": "transformer_blocks"},
    "places as an expression": {"target_modules": r"transformer_blocks\.\d\.(ff\.net\.2|attn1\.to_[kv])"},
    "all linear layers": {"target_modules": "all-linear"},
    "another order of weights": {"fan_in_fan_out": True},
    "dropout": {"lora_dropout": 0.3},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 4},
    "EVA": {"init_lora_weights": "eva"},
    "MiCA": {"init_lora_weights": "mica"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA over the root": {"init_lora_weights": "pissa", "use_rslora": True},
    "PiSSA with ranks": {"init_lora_weights": "pissa", "rank_pattern": {"net.2": 5}, "alpha_pattern": {"to_q": 7}},
    "OLoRA": {"init_lora_weights": "olora"},
    "OLoRA over the root, with ranks": {
        "init_lora_weights": "olora", "use_rslora": True, "rank_pattern": {"net.0.proj": 6}
    },
}  # fmt: skip


def denoiser(name: str = "DiTTransformer2DModel", args: dict[str, object] | None = None) -> Denoiser:
    torch.manual_seed(0)
    network = NetworkConfig(name=name, args=args or ARGS)
    made = build_denoiser(network, parameterisation="edm", shape=(1, 8, 8), num_classes=10)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.requires_grad_(False)


@pytest.fixture
def base() -> Denoiser:
    return denoiser()


def trained_by_peft(base: Denoiser, folder: Path, **config: object) -> dict[str, torch.Tensor]:
    """Save an adapter that peft made and trained, and return the network's weights as peft itself loads it."""
    arguments = {"r": 3, "lora_alpha": 4.5, "target_modules": PLACES, **config}
    theirs = peft.get_peft_model(copy.deepcopy(base).network, peft.LoraConfig(**arguments))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if ".lora_" in name:
                value += 0.3 * torch.randn_like(value)
    theirs.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base).network, folder)
    return {name: value.double() for name, value in loaded.merge_and_unload().state_dict().items()}


def weights(denoiser: Denoiser) -> dict[str, torch.Tensor]:
    return {name: value.double().clone() for name, value in denoiser.network.state_dict().items()}


def assert_added(
    lora: LoraDenoiser, before: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], s: float
):
    """The merged weights are the base's, and `s` times what peft's differ from them."""
    found = weights(lora.merged())
    for name, value in before.items():
        torch.testing.assert_close(found[name], value + s * (theirs[name] - value), atol=2e-6, rtol=2e-6)


def output(denoiser: Denoiser) -> torch.Tensor:
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return denoiser(x, torch.tensor([0.5, 3.0]), {"class_label": torch.tensor([1, 2])})


@pytest.mark.parametrize("config", HONOURED.values(), ids=HONOURED)
def test_an_adapter_is_what_peft_makes_of_it_at_every_strength_and_off_is_the_base(base, tmp_path, config):
    before, pictures = weights(base), output(base)
    theirs = trained_by_peft(base, tmp_path / "theirs", **config)
    assert any(not torch.equal(theirs[name], before[name]) for name in before)
    lora = LoraDenoiser.load(base, tmp_path / "theirs")
    assert_added(lora, before, theirs, 1.0)
    for strength in (0.37, -0.8, 1.0):
        lora.strength = strength
        assert_added(lora, before, theirs, strength)
    assert_added(combined([(lora, 0.5), (lora, 0.2)]), before, theirs, 0.7)
    with lora.off():
        assert torch.equal(output(lora), pictures)
    lora.form = "adapter"
    lora.save(tmp_path / "ours")
    assert_added(LoraDenoiser.load(base, tmp_path / "ours"), before, theirs, 1.0)
    assert torch.equal(output(base), pictures)
    assert all(torch.equal(value, before[name]) for name, value in weights(base).items())


@pytest.mark.parametrize("places", [["conv1", "conv_shortcut"], ["to_q", "conv2", "conv_in"]])
def test_convolutions_of_ranks_of_their_own_are_adapted_too(tmp_path, places):
    base = denoiser("UNet2DModel", UNET)
    before = weights(base)
    config = {"target_modules": places, "use_rslora": True, "rank_pattern": {places[0]: 2}}
    theirs = trained_by_peft(base, tmp_path, **config)
    lora = LoraDenoiser.load(base, tmp_path)
    lora.strength = 0.37
    assert_added(lora, before, theirs, 0.37)


def test_an_adapter_that_peft_converted_for_its_whole_base_is_loaded_as_it_is(base, tmp_path):
    before = weights(base)
    theirs = peft.get_peft_model(
        copy.deepcopy(base).network,
        peft.LoraConfig(r=3, lora_alpha=4.5, target_modules=PLACES, init_lora_weights="pissa_niter_8"),
    )
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "begun")
    theirs.peft_config["default"].init_lora_weights = "pissa_niter_8"
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if ".lora_B" in name:
                value *= 1.3
    theirs.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "begun")
    )
    merged = {name: value.double() for name, value in theirs.merge_and_unload().state_dict().items()}
    assert_added(LoraDenoiser.load(base, tmp_path / "converted"), before, merged, 1.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("modules_to_save", ["proj_out_1"]),
        ("lora_bias", True),
        ("target_parameters", ["ff.net.0.proj.weight"]),
        ("trainable_token_indices", [0, 1]),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("layer_replication", [[0, 1], [0, 2]]),
        ("alora_invocation_tokens", [3]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 0.1}),
        ("monteclora_config", {"monteclora_n": 4}),
        ("velora_config", {"num_groups": 2}),
        ("ensure_weight_tying", True),
        ("peft_type", "LOHA"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "of_next_year"),
        ("a_key_of_next_year", 0.5),
    ],
)
def test_a_key_that_changes_the_result_is_refused_by_name(base, tmp_path, key, value):
    trained_by_peft(base, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ArtifactError) as caught:
        LoraDenoiser.load(base, tmp_path)
    assert f"{key} = {json.dumps(value)}" in str(caught.value)
    assert "peft" in str(caught.value), "what to do next"


def test_every_key_that_this_peft_knows_is_honoured_ignored_or_refused_when_it_is_set(base, tmp_path):
    from distill_core.networks.adapter_configs import IGNORED, AdapterConfig

    trained_by_peft(base, tmp_path)
    path = tmp_path / "adapter_config.json"
    written = json.loads(path.read_text())
    for key in written.keys() - AdapterConfig.model_fields.keys() - IGNORED - {"peft_type"}:
        path.write_text(json.dumps({**written, key: {"some": 1}}))
        with pytest.raises(ArtifactError, match=f"says {key} = "):
            LoraDenoiser.load(base, tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 0}, "r = 0"),
        ({"r": 10**9}, "r = 1000000000"),
        ({"r": "3"}, "r = '3'"),
        ({"r": True}, "r: true is no number"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"use_rslora": "false"}, "use_rslora"),
        ({"rank_pattern": {"to_q": 0}}, "rank_pattern"),
        ({"rank_pattern": ["to_q"]}, "rank_pattern"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": [3]}, "target_modules"),
        ({"target_modules": "(to_q"}, "does not fit a DiT"),
        ({"target_modules": []}, "does not fit a DiT"),
        ({"layers_to_transform": "1"}, "layers_to_transform"),
    ],
)
def test_a_value_that_peft_could_not_have_written_is_damaged(base, tmp_path, changes, said):
    trained_by_peft(base, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ArtifactError) as caught:
        LoraDenoiser.load(base, tmp_path)
    assert said in str(caught.value)


def test_an_initialisation_of_linear_layers_is_damaged_over_convolutions(tmp_path):
    base = denoiser("UNet2DModel", UNET)
    trained_by_peft(base, tmp_path, target_modules=["conv1"])
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": "olora"}))
    with pytest.raises(ArtifactError, match="olora is an initialisation of linear layers, not of .*conv1"):
        LoraDenoiser.load(base, tmp_path)


@pytest.mark.parametrize("missing", ["r", "lora_alpha", "target_modules", "peft_type"])
def test_a_configuration_without_what_the_scale_and_the_places_follow_from_is_damaged(
    base, tmp_path, missing
):
    trained_by_peft(base, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != missing})
    )
    with pytest.raises(ArtifactError, match=missing):
        LoraDenoiser.load(base, tmp_path)


def test_factors_that_are_no_numbers_or_there_twice_are_damaged(base, tmp_path):
    trained_by_peft(base, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    factors = load_file(file)
    name = sorted(factors)[0]
    for changed in (
        {name: factors[name].to(torch.int8)},
        {name.removeprefix("base_model.model."): factors[name] + 1},
    ):
        save_file({**factors, **changed}, file)
        with pytest.raises(ArtifactError, match="is damaged"):
            LoraDenoiser.load(base, tmp_path)


def test_embeddings_and_grouped_convolutions_have_no_pair_of_factors_and_are_refused(base, tmp_path):
    embedding = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table"
    assert isinstance(base.network.get_submodule(embedding), torch.nn.Embedding)
    trained_by_peft(base, tmp_path, target_modules=[embedding])
    with pytest.raises(ArtifactError, match="embedding_table is a Embedding"):
        LoraDenoiser.load(base, tmp_path)
    with pytest.raises(ConfigError, match="embedding_table is a Embedding"):
        LoraDenoiser(base, LoraConfig(rank=2, targets=("embedding_table",)))
    unet = denoiser("UNet2DModel", UNET)
    unet.network.conv_in = torch.nn.Conv2d(2, 8, 3, padding=1, groups=2)
    with pytest.raises(ConfigError, match="conv_in is a Conv2d"):
        LoraDenoiser(unet, LoraConfig(rank=2, targets=("conv_in",)))
