"""Vision and CLIP folders of transformers as readers of pictures, against transformers itself."""

import pytest
import torch
from transformers import (
    AutoImageProcessor,
    BertConfig,
    BertModel,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from distill_core.errors import ArtifactError
from distill_core.metrics.extractors import load_extractor, load_scorer
from distill_core.pictures import to_uint8
from tests.helpers import tiny_clip

VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def save(model, folder):
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def pictures(count=4, channels=3, size=20, seed=0):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def pixels_of(folder, given):
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    return processor(images=list(to_uint8(given)), return_tensors="pt")["pixel_values"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip") / "model")


@pytest.mark.parametrize(
    "model",
    [
        lambda: Dinov2Model(Dinov2Config(**VIT)),
        lambda: ViTModel(ViTConfig(**VIT)),
        lambda: ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])),
    ],
    ids=["dinov2", "vit", "convnext"],
)
def test_features_are_the_pooled_output_of_the_folders_own_model_and_preprocessing(model, tmp_path):
    torch.manual_seed(0)
    model = model().eval()
    folder = save(model, tmp_path)
    given = pictures()
    with torch.no_grad():
        wanted = model(pixel_values=pixels_of(folder, given)).pooler_output.flatten(1)
    assert torch.allclose(load_extractor(folder).features(given), wanted, atol=1e-6)


def test_a_classifier_without_weights_to_pool_with_gives_its_class_token(tmp_path):
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**VIT)).eval()
    folder = save(model, tmp_path)
    with torch.no_grad():
        wanted = model.vit(pixel_values=pixels_of(folder, pictures())).last_hidden_state[:, 0]
    assert torch.allclose(load_extractor(folder).features(pictures()), wanted, atol=1e-6)


def test_clip_gives_its_projected_embedding(clip):
    model = CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        seen = model.vision_model(pixel_values=pixels_of(clip, pictures())).pooler_output
        wanted = model.visual_projection(seen)
    found = load_extractor(clip).features(pictures())
    assert found.shape == (4, 12)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_grey_pictures_are_read_as_colours_of_equal_parts(clip):
    grey = pictures(channels=1)
    extractor = load_extractor(clip)
    assert torch.equal(extractor.features(grey), extractor.features(grey.repeat(1, 3, 1, 1)))


def test_the_score_is_the_cosine_of_clips_own_forward_pass(clip):
    prompts = ["a cat", "dog", "", "a very long prompt that the model must cut"]
    scorer, model = load_scorer(clip), CLIPModel.from_pretrained(clip).eval()
    from transformers import CLIPTokenizer

    tokens = CLIPTokenizer.from_pretrained(clip)(prompts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        answer = model(**tokens, pixel_values=pixels_of(clip, pictures()))
        wanted = answer.logits_per_image.diag() / model.logit_scale.exp()
    assert torch.allclose(scorer.cosines(pictures(), prompts), wanted, atol=1e-5)


def test_extractors_of_equal_weights_are_described_alike_and_others_are_not(clip, tmp_path):
    same, other = tiny_clip(tmp_path / "same"), tiny_clip(tmp_path / "other", seed=1)
    described = [load_extractor(folder).described for folder in (clip, same, other)]
    assert described[0].startswith("CLIPModel, sha256 ")
    assert described[0] == described[1] != described[2]


def test_models_without_eyes_are_refused(tmp_path):
    save(
        BertModel(BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)),
        tmp_path,
    )
    with pytest.raises(ArtifactError, match="BertModel, which reads no pictures"):
        load_extractor(tmp_path)


def test_a_score_needs_a_clip_model(tmp_path):
    save(ViTModel(ViTConfig(**VIT)), tmp_path)
    with pytest.raises(ArtifactError, match="holds a vit; a score needs a CLIP model"):
        load_scorer(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    save(ViTModel(ViTConfig(**VIT)), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    for load in (load_extractor, load_scorer):
        with pytest.raises(ArtifactError, match=r"pytorch_model.bin: only safetensors are loaded"):
            load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("config.json", None, "not a transformers folder"),
        ("config.json", "{", "damaged or incomplete"),
        ("preprocessor_config.json", None, "how pictures are prepared"),
        ("model.safetensors", "cut off", "damaged or incomplete"),
    ],
)
def test_damaged_folders_are_one_sentence(file, content, sentence, tmp_path):
    save(ViTModel(ViTConfig(**VIT)), tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(ArtifactError, match=sentence) as caught:
        load_extractor(tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_that_lack_a_layer_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save(ViTModel(ViTConfig(**VIT)), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if "pooler" not in name and name.endswith("weight"))
    save_file(
        {name: value for name, value in weights.items() if name != gone},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ArtifactError, match="its weights lack"):
        load_extractor(tmp_path)
