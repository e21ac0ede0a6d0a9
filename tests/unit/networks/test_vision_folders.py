"""Folders that transformers wrote: they answer as transformers does, or are refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from distill_core.errors import ArtifactError
from distill_core.kinds.loading import kind_of, load_model
from distill_core.networks.predictor import load_predictor
from distill_core.networks.vision_io import load_vision
from tests.helpers import edited

NAMES = ("ant", "bee", "cow")
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "patch_size": 4,
}
PYRAMID = {"hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 3, 4], "depths": [1, 1, 2, 1]}
SMALL: dict[str, dict[str, object]] = {
    "ViTForImageClassification": {**VIT, "image_size": [24, 32], "qkv_bias": False, "layer_norm_eps": 0.003},
    "DeiTForImageClassification": {**VIT, "image_size": [24, 32], "hidden_act": "relu"},
    "DeiTForImageClassificationWithTeacher": {**VIT, "image_size": [24, 32]},
    "ResNetForImageClassification": {
        "embedding_size": 8,
        "hidden_sizes": [8, 24],
        "depths": [1, 2],
        "layer_type": "bottleneck",
        "downsample_in_first_stage": True,
    },
    "PvtForImageClassification": {**PYRAMID, "image_size": 32, "mlp_ratios": [2, 3, 4, 5]},
    "PvtV2ForImageClassification": {**PYRAMID, "image_size": [24, 32], "linear_attention": True},
    "SwinForImageClassification": {
        "image_size": [24, 32],
        "embed_dim": 8,
        "num_heads": [1, 2],
        "depths": [1, 3],
        "window_size": 3,
        "mlp_ratio": 1.5,
        "use_absolute_embeddings": True,
    },
    "ConvNextV2ForImageClassification": {
        "hidden_sizes": [8, 16],
        "depths": [2, 1],
        "num_stages": 2,
        "patch_size": 3,
    },
    "MobileNetV2ForImageClassification": {
        "depth_multiplier": 0.3,
        "finegrained_output": False,
        "output_stride": 16,
    },
    "SegformerForSemanticSegmentation": {**PYRAMID, "decoder_hidden_size": 8},
    "ViTMAEModel": {**VIT, "image_size": [24, 32], "norm_pix_loss": True},
    "ViTMAEForPreTraining": {
        **VIT,
        "image_size": 32,
        "mask_ratio": 0.6,
        "decoder_hidden_size": 12,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 3,
        "decoder_intermediate_size": 20,
    },
    "CLIPVisionModelWithProjection": {**VIT, "image_size": 32, "projection_dim": 6},
}
HIGH = (
    "PvtForImageClassification",
    "CLIPVisionModelWithProjection",
    "SegformerForSemanticSegmentation",
    "ViTMAEForPreTraining",
)


def theirs(name: str, folder: Path, **changes: object) -> torch.nn.Module:
    """A small model of transformers with random weights, saved in `folder`."""
    torch.manual_seed(7)
    cls = getattr(transformers, name)
    config = cls.config_class(**{**SMALL[name], "id2label": dict(enumerate(NAMES)), **changes})
    model = cls(config).eval()
    for value in model.parameters():
        if value.ndim > 1:
            torch.nn.init.kaiming_normal_(value.data)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.4, 1.7)
    model.save_pretrained(folder)
    return model


def processor(folder: Path, kind: str = "ViTImageProcessor", **options: object):
    cls = getattr(transformers, f"{kind}Pil")
    made = cls(**{"image_mean": [0.31, 0.42, 0.57], "image_std": [0.21, 0.33, 0.27], **options})
    made.save_pretrained(folder)
    return made


def pictures(height: int = 37, width: int = 53, count: int = 2) -> np.ndarray:
    return np.random.default_rng(8).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def as_ours(given: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(given).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def answered(name: str, model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """What transformers itself answers."""
    if name.startswith("ViTMAE"):
        model.config.mask_ratio = 0.0
        order = torch.arange(pixels.shape[2] * pixels.shape[3] / 16).expand(len(pixels), -1)
        return model.base_model(pixel_values=pixels, noise=order).last_hidden_state[:, 0]
    out = model(pixel_values=pixels)
    return out.image_embeds if name.startswith("CLIP") else out.logits


@pytest.mark.parametrize("name", SMALL)
def test_a_folder_answers_as_transformers_does(name, tmp_path):
    model = theirs(name, tmp_path)
    height = 32 if name in HIGH else 24
    process = processor(tmp_path, size={"height": height, "width": 32}, resample=3)
    loaded = load_model(tmp_path)
    given = pictures()
    pixels = process([Image.fromarray(one) for one in given], return_tensors="pt")["pixel_values"]
    expected = answered(name, model, pixels)
    ((output, found),) = loaded.call("predict", {"image": as_ours(given)}).items()
    scale = max(1.0, float(expected.abs().max()))
    assert expected.std() > 1e-2
    assert torch.allclose(found, expected, atol=1e-5 * scale, rtol=0)
    spec = loaded.card().functions["predict"].outputs[output]
    assert tuple(found.shape[1:]) == spec.shape
    named = "For" in name and name != "ViTMAEForPreTraining"
    assert loaded.card().class_names == (NAMES if named else ())
    loaded.save(tmp_path / "ours")
    again = load_predictor(tmp_path / "ours").call("predict", {"image": as_ours(given)})[output]
    assert torch.allclose(again, found, atol=1e-5 * scale, rtol=0)


PROCESSORS = [
    ("ViTImageProcessor", {"size": {"height": 24, "width": 32}, "do_normalize": False}),
    (
        "ViTImageProcessor",
        {"size": {"height": 24, "width": 32}, "do_rescale": False, "image_mean": [90, 100, 120]},
    ),
    ("ViTImageProcessor", {"size": {"height": 24, "width": 32}, "rescale_factor": 0.0123}),
    ("DeiTImageProcessor", {"size": {"height": 31, "width": 45}, "crop_size": {"height": 24, "width": 32}}),
    ("MobileNetV2ImageProcessor", {"size": {"shortest_edge": 35}, "crop_size": {"height": 24, "width": 32}}),
    (
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 35}, "crop_size": {"height": 24, "width": 32}, "resample": 1},
    ),
]


@pytest.mark.parametrize(("kind", "options"), PROCESSORS)
def test_what_a_processor_does_is_done(kind, options, tmp_path):
    name = "ViTForImageClassification"
    model, process = theirs(name, tmp_path), processor(tmp_path, kind, **options)
    for height, width in ((37, 53), (60, 40), (24, 32)):
        given = pictures(height, width, 1)
        pixels = process(Image.fromarray(given[0]), return_tensors="pt")["pixel_values"]
        expected = answered(name, model, pixels)
        found = load_vision(tmp_path).call("predict", {"image": as_ours(given)})["logits"]
        assert torch.allclose(found, expected, atol=2e-5 * max(1.0, float(pixels.abs().max())))


@pytest.mark.parametrize(("edge", "size"), [(24, 24), (400, 400)])
def test_a_convnext_is_cropped_below_384_pixels_and_warped_from_there_on(edge, size, tmp_path):
    name = "ConvNextV2ForImageClassification"
    model = theirs(name, tmp_path)
    process = processor(tmp_path, "ConvNextImageProcessor", size={"shortest_edge": edge}, crop_pct=0.8)
    given = pictures(41, 67, 1)
    pixels = process(Image.fromarray(given[0]), return_tensors="pt")["pixel_values"]
    assert pixels.shape[-2:] == (size, size)
    found = load_vision(tmp_path).call("predict", {"image": as_ours(given)})["logits"]
    assert torch.allclose(found, answered(name, model, pixels), atol=1e-4)


def test_without_a_processor_pictures_go_in_as_they_are_and_it_is_said(tmp_path, caplog):
    model = theirs("ViTForImageClassification", tmp_path)
    loaded = load_model(tmp_path)
    x = as_ours(pictures(24, 32))
    found = loaded.call("predict", {"image": x})["logits"]
    assert torch.allclose(found, answered("ViTForImageClassification", model, x), atol=1e-5)
    assert "has no preprocessor_config.json" in caplog.text
    assert loaded.card().functions["predict"].inputs["image"].shape == (3, 24, 32)


def test_half_precision_weights_and_classes_without_names_are_read(tmp_path):
    model = theirs("ViTForImageClassification", tmp_path, id2label={k: f"LABEL_{k}" for k in range(4)})
    model.half().save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.card().class_names == ("0", "1", "2", "3")
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}


def good(folder: Path, name: str = "ViTForImageClassification") -> Path:
    theirs(name, folder)
    processor(folder, size={"height": 32 if name in HIGH else 24, "width": 32})
    load_model(folder)
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"architectures": ["BeitForImageClassification"]},
            "is of a BeitForImageClassification (model_type vit)",
        ),
        ({"architectures": ["ViTModel"]}, "did you mean 'ViTMAEModel'?"),
        ({"architectures": ["DeiTForImageClassification"]}, "(model_type vit), which is not read"),
        ({"problem_type": "multi_label_classification"}, "not logits of classes that exclude each other"),
        ({"hidden_act": "selu"}, "hidden_act = 'selu' is not allowed"),
        ({"patch_size": 5}, "do not divide into patches of 5"),
        ({"rotary": True}, "rotary = true, which is not understood; only null is read"),
        (
            {"chunk_size_feed_forward": 3},
            "chunk_size_feed_forward = 3, which is not understood; only 0 is read",
        ),
        ({"image_size": 32}, "image_size = 32, and preprocessor_config.json makes pictures of 24 x 32"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label with the numbers [0, 2]; expected 0 to 1"),
        ({"id2label": {"0": "a", "1": "b", "2": "a"}}, "calls two classes 'a'"),
        ({"id2label": {"0": "a", "1": "b"}}, "of another network than its config.json describes: mismatched"),
        ({"num_hidden_layers": 3}, "weights of another network than its config.json describes: missing"),
        ({"num_hidden_layers": 1}, "weights of another network than its config.json describes: unexpected"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers is above 1000"),
        ({"hidden_size": "wide"}, "is damaged"),
    ],
)
def test_a_config_that_is_not_understood_is_refused_by_its_key(changes, said, tmp_path):
    assert said in refused(edited(good(tmp_path), "", **changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"image_processor_type": "BeitImageProcessor"},
            "is of a BeitImageProcessor, which is not understood; known",
        ),
        ({"resample": 0}, "resample = 0, which is not understood"),
        ({"do_pad": True}, "do_pad = true, which is not understood"),
        ({"crop_pct": 0.9}, "crop_pct = 0.9, which is not understood"),
        ({"size": {"longest_edge": 32}}, "size = {'longest_edge': 32}, which is not understood"),
        ({"size": {"shortest_edge": 32}}, "resize = 32 alone leaves pictures as wide as they were"),
        ({"image_std": [0.2, 0.0, 0.3]}, "std.1 = 0.0 is not allowed"),
        ({"image_mean": [0.2, 0.3]}, "mean or std of other than 3 channels"),
        ({"offset": 3}, "offset = 3, which is not understood; only null is read"),
        ({"do_center_crop": True, "crop_size": {"height": 40, "width": 32}}, "is larger than resize"),
    ],
)
def test_a_processor_that_is_not_understood_is_refused_by_its_key(changes, said, tmp_path):
    assert said in refused(edited(good(tmp_path), "", "preprocessor_config.json", **changes))


def test_pickled_weights_are_refused_and_not_opened(tmp_path):
    good(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    assert kind_of(tmp_path).name == "predictor"
    assert "holds pytorch_model.bin: only safetensors are loaded, since pickles can execute code" in refused(
        tmp_path
    )


def test_files_beside_the_model_that_would_change_it_are_refused(tmp_path):
    (good(tmp_path) / "adapter_config.json").write_text("{}")
    assert "adapter_config.json changes the model, and is not read" in refused(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"do_resize": False}}))
    assert "processor_config.json holds a processor of pictures, which is not read" in refused(tmp_path)


def test_damaged_files_are_refused(tmp_path):
    (good(tmp_path) / "model.safetensors").write_bytes(b"nothing")
    assert "holds weights that are damaged" in refused(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("[]")
    assert "preprocessor_config.json is damaged: it holds list, not a table" in refused(tmp_path)
