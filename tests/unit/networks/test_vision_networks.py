"""Vision networks of transformers by a recipe's words: built small, trained as students, refused in a sentence."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from distill_core import api
from distill_core.errors import ConfigError, Unavailable
from distill_core.kinds.loading import load_model
from distill_core.networks.predictor import image_classifier, load_predictor
from distill_core.networks.predictors import build_network, network_types
from distill_core.networks.preprocessing import Preprocessed, Preprocessing
from distill_core.networks.vision import VisionNetwork
from distill_core.recipe.tables import NetworkConfig
from distill_core.running.plan import plan
from tests.helpers import tiny_recipe, tiny_trainer

FACTS = {"shape": (3, 32, 64), "num_classes": 7}
SQUARE = {"PvtForImageClassification", "CLIPVisionModelWithProjection", "ViTMAEForPreTraining"}
THEIRS = sorted(name for name, cls in network_types().items() if issubclass(cls, VisionNetwork))
CLASSIFIERS = [name for name in THEIRS if "ImageClassification" in name]
RESNET = {
    "network.name": "ResNetForImageClassification",
    "network.args": {"hidden_sizes": [8, 16], "depths": [1, 1]},
}
VIT = {
    "network.name": "ViTForImageClassification",
    "network.args": {"hidden_size": 16, "num_hidden_layers": 1, "hidden_dropout_prob": 0.3},
}


def built(name: str, **args: object) -> VisionNetwork:
    torch.manual_seed(1)
    facts = {**FACTS, "shape": (3, 32, 32)} if name in SQUARE else FACTS
    network = build_network(NetworkConfig(name=name, args=args), facts)
    assert isinstance(network, VisionNetwork)
    for value in network.parameters():  # activations of the size that training gives them
        if value.ndim > 1:
            torch.nn.init.kaiming_normal_(value.data)
    return network


def images(network: VisionNetwork, count: int = 3) -> torch.Tensor:
    return torch.rand(count, *network.args.shape, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.mark.parametrize("name", THEIRS)
def test_a_network_gives_what_it_says_of_each_picture_for_itself(name):
    network = built(name).eval()
    x = images(network)
    with torch.no_grad():
        out = network(x)
        alone = network(x[1:2])
    ((_, spec),) = network.outputs().items()
    assert tuple(out.shape) == (3, *spec.shape)
    assert torch.allclose(out[1:2], alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(out[0], out[1], atol=1e-3)


def test_there_are_the_classes_that_recognition_needs():
    assert len(CLASSIFIERS) == 9
    encoders = {"ViTMAEModel", "ViTMAEForPreTraining", "CLIPVisionModelWithProjection"}
    assert set(THEIRS) - set(CLASSIFIERS) == {"SegformerForSemanticSegmentation", *encoders}


def test_the_two_heads_of_deit_are_two_and_its_logits_their_mean():
    network = built("DeiTForImageClassificationWithTeacher").eval()
    x = images(network)
    with torch.no_grad():
        classes, distilled = network.heads(x)
        logits = network(x)
    assert not torch.allclose(classes, distilled, atol=1e-3)
    assert torch.allclose(logits, (classes + distilled) / 2, atol=1e-6)


def test_the_encoder_of_a_masked_autoencoder_sees_the_whole_picture_and_draws_nothing():
    network = built("ViTMAEModel").eval()
    x = images(network).requires_grad_()
    state = torch.get_rng_state()
    network(x).square().sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    patches = x.grad.unfold(2, 4, 4).unfold(3, 4, 4).abs().sum((1, 4, 5))
    assert (patches > 0).all()


def test_classes_are_listed_without_importing_transformers():
    code = (
        "import sys; from distill_core.networks.predictors import network_types; network_types(); "
        "from distill_core.kinds import find_kind; find_kind('predictor'); "
        "print({'transformers', 'diffusers', 'timm'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout.strip() == "set()"


BAD = [
    ("ViTForImageClasification", {}, r"no network is called .*; did you mean 'ViTForImageClassification'\?"),
    (
        "ViTForImageClassification",
        {"hidden_sise": 8},
        r"unknown key network.args.hidden_sise; did you mean 'hidden_size'\?",
    ),
    ("ViTForImageClassification", {"pretrained": True}, "unknown key network.args.pretrained"),
    (
        "ViTForImageClassification",
        {"hidden_size": "wide"},
        "network.args.hidden_size = 'wide' is not allowed",
    ),
    (
        "ViTForImageClassification",
        {"patch_size": 5},
        "pictures of 64 x 32 pixels do not divide into patches of 5",
    ),
    (
        "ViTForImageClassification",
        {"hidden_size": 18},
        "a width of 18 does not divide into 4 attention heads",
    ),
    (
        "ViTForImageClassification",
        {"hidden_act": "os.system"},
        "network.args.hidden_act = 'os.system' is not allowed",
    ),
    (
        "ViTForImageClassification",
        {"num_classes": 3},
        "network.args.num_classes follows from the data; remove it",
    ),
    (
        "ResNetForImageClassification",
        {"depths": [1, 1]},
        "hidden_sizes has 3 entries and depths 2; give one a stage",
    ),
    ("PvtForImageClassification", {}, "PVT takes square pictures, and these are 64 x 32"),
    (
        "ViTForImageClassification",
        {"preprocessing": {"mean": [0.1, 0.2]}},
        "mean or std of other than 3 channels",
    ),
    (
        "ViTForImageClassification",
        {"preprocessing": {"resize": 8}},
        "resize = 8 alone leaves pictures as wide",
    ),
    (
        "ViTForImageClassification",
        {"preprocessing": {"resize": 8, "crop": [8, 9]}},
        "is larger than resize = 8",
    ),
    (
        "ViTForImageClassification",
        {"preprocessing": {"crop": [33, 9]}},
        r"crop = \(33, 9\) is larger than pictures",
    ),
]


@pytest.mark.parametrize(("name", "args", "said"), BAD)
def test_a_mistake_in_a_network_s_table_is_one_sentence(name, args, said):
    with pytest.raises(ConfigError, match=said) as caught:
        build_network(NetworkConfig(name=name, args=args), FACTS)
    assert "\n" not in str(caught.value)
    assert caught.value.field.startswith("network.")


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        (
            "PvtV2ForImageClassification",
            (1, 8, 8),
            r"cannot take pictures of the shape \(1, 8, 8\): .*; change",
        ),
        (
            "SegformerForSemanticSegmentation",
            (3, 32, 32),
            r"gives the shape \(3, 8, 8\) .* a classifier gives 3 logits",
        ),
        (
            "ViTMAEModel",
            (3, 32, 32),
            r"gives the shape \(64,\) for a picture, and a classifier gives 3 logits",
        ),
    ],
)
def test_a_network_that_is_no_classifier_of_the_data_is_refused_before_training(name, shape, said):
    config = NetworkConfig(name=name)
    network = build_network(config, {"shape": shape, "num_classes": 3})
    with pytest.raises(ConfigError, match=said):
        image_classifier(network, config, shape=shape, class_names=("ant", "bee", "cow"))


def test_to_try_a_network_leaves_its_mode_its_statistics_and_the_random_numbers():
    network = built("ResNetForImageClassification")
    network.model.resnet.embedder.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes, state = [module.training for module in network.modules()], torch.get_rng_state()
    names = tuple("abcdefg")
    image_classifier(
        network, NetworkConfig(name="ResNetForImageClassification"), shape=FACTS["shape"], class_names=names
    )
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_a_network_of_timm_says_what_is_missing():
    try:
        import timm  # noqa: F401
    except Exception:
        with pytest.raises(
            Unavailable, match=r"(timm|torchvision) is not installed; run: pip|cannot be imported"
        ):
            build_network(NetworkConfig(name="timm:resnet18"), FACTS)
    else:
        network = build_network(NetworkConfig(name="timm:resnet18"), FACTS).eval()
        assert network(torch.zeros(2, *FACTS["shape"])).shape == (2, 7)


def test_a_timm_that_fails_on_import_is_one_sentence(tmp_path):
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm/__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    code = (
        "from distill_core.recipe.tables import NetworkConfig\n"
        "from distill_core.errors import Unavailable\n"
        "from distill_core.networks.predictors import build_network\n"
        "try: build_network(NetworkConfig(name='timm:resnet18'), {})\n"
        "except Unavailable as error: print(error)"
    )
    path = ":".join([str(tmp_path), *sys.path])
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={"PYTHONPATH": path},
    )
    assert (
        "cannot be imported: operator torchvision::nms does not exist; it needs the torchvision" in run.stdout
    )


# -- preprocessing


@pytest.mark.parametrize(("resample", "number"), [("bilinear", 2), ("bicubic", 3), ("lanczos", 1)])
def test_pictures_are_resized_as_pillow_does_to_the_last_level(resample, number):
    generator = np.random.default_rng(3)
    for _ in range(25):
        height, width, rows, columns = (int(side) for side in generator.integers(3, 90, 4))
        picture = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = np.array(Image.fromarray(picture).resize((columns, rows), resample=number))
        resize = Preprocessed(Preprocessing(resize=(rows, columns), resample=resample)).resized
        found = resize(torch.from_numpy(picture).permute(2, 0, 1).float())
        assert np.array_equal(found.permute(1, 2, 0).numpy(), expected), (height, width, rows, columns)


def test_gradients_pass_the_rounding_of_levels():
    x = (torch.rand(1, 3, 6, 9, generator=torch.Generator().manual_seed(4)) * 2 - 1).requires_grad_()
    Preprocessed(Preprocessing(resize=(11, 7), mean=(0.2,), std=(0.3,)))(x).sum().backward()
    assert x.grad.sum() == pytest.approx(3 * 11 * 7 * 127.5 / 255 / 0.3, rel=1e-3)
    assert (x.grad > 0).all()


# -- training


@pytest.mark.parametrize("network", [RESNET, VIT], ids=["batch norm", "dropout"])
def test_a_student_resumes_bit_for_bit_and_its_average_has_statistics(network, context, tmp_path):
    changes = {**network, "ema": {"student": 0.7}, "steps": 4, "checkpoint_every": 2, "seed": 5}
    whole = tiny_trainer("kd", context, tmp_path / "whole", **changes)
    whole.train()
    first = tiny_trainer("kd", context, tmp_path / "parts", **changes)
    first.train(lambda: first.step == 2)
    second = tiny_trainer("kd", context, tmp_path / "parts", **changes)
    second.train()
    for part, values in whole.tensors().items():
        for name, value in values.items():
            assert torch.equal(value, second.tensors()[part][name]), (part, name)
    if network is RESNET:
        name = "network.model.resnet.embedder.embedder.normalization.running_mean"
        assert not torch.equal(whole.emas["student"].weights[name], whole.method.student.state_dict()[name])


def test_trial_steps_of_micro_batches_leave_no_statistics(context, tmp_path):
    changes = {**RESNET, "seed": 6}
    plain = tiny_trainer("kd", context, tmp_path / "plain", **changes)
    plain.train()
    tried = tiny_trainer("kd", context, tmp_path / "tried", micro_batch="auto", **changes)
    tried.train()
    ours, theirs = plain.method.student.state_dict(), tried.method.student.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert ours["network.model.resnet.embedder.embedder.normalization.num_batches_tracked"] == 2


def test_a_published_student_answers_as_its_probe_says_and_goes_on_training(context, tmp_path):
    recipe = tiny_recipe("kd", **VIT, **{"evaluate": {"data": {"name": "digits", "split": "test"}}})
    result = api.train(recipe, tmp_path, context)
    model = load_predictor(result.folder / "model")
    from safetensors.torch import load_file

    probe = load_file(result.folder / "model" / "probe.safetensors")
    answer = model.call("predict", {"image": probe["predict/inputs.image"]})["logits"]
    assert torch.allclose(answer, probe["predict/outputs.logits"], atol=1e-5)  # dropout was off
    assert result.figures["parameters"] == model.card().parameters
    assert {"accuracy", "teacher_accuracy"} <= result.figures.keys()


def test_what_is_published_is_in_evaluation_mode_only_meanwhile(context, tmp_path):
    trainer = tiny_trainer("kd", context, tmp_path, **VIT)
    with trainer.averaged():
        assert not any(module.training for module in trainer.method.student.modules())
    assert all(module.training for module in trainer.method.student.modules())
    assert not any(module.training for module in trainer.method.teacher.modules())


def test_the_memory_of_such_a_student_is_planned(context):
    planned = plan(tiny_recipe("kd", **VIT), context)
    student = next(part for part in planned.parts if part.name == "student")
    config = NetworkConfig(name="ViTForImageClassification", args=VIT["network.args"])
    real = build_network(config, {"shape": (1, 8, 8), "num_classes": 10})
    assert student.trained == sum(value.numel() for value in real.parameters())


def test_a_saved_network_is_loaded_with_every_argument(tmp_path):
    network = built(
        "SwinForImageClassification", mlp_ratio=1.5, preprocessing={"mean": [0.1], "std": [0.7]}
    ).eval()
    config = NetworkConfig(name="SwinForImageClassification")
    image_classifier(network, config, shape=FACTS["shape"], class_names=tuple("abcdefg")).save(tmp_path)
    loaded = load_model(tmp_path)
    x = images(network)
    assert loaded.network.args == network.args
    assert torch.allclose(loaded.call("predict", {"image": x})["logits"], network(x), atol=1e-5)
