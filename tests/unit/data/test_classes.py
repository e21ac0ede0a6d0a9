"""Classes by name: data, teacher, judge and reward mean the same classes, whatever their numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill_core import api
from distill_core.artifacts import CondSpec
from distill_core.building import build, fit
from distill_core.data import build_source
from distill_core.data.classes import ABSENT, class_numbers, in_order, naming_classes, use_classes_of
from distill_core.errors import ConfigError
from distill_core.kinds.denoiser.card import Evaluate
from distill_core.kinds.denoiser.evaluation import load_evaluator
from distill_core.methods.diffusion.hyper_sd_feedback import HyperSDFeedback
from distill_core.networks.adapters import LoraDenoiser
from distill_core.networks.classifier import Classifier, ClassifierConfig
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.recipe import load_recipe
from distill_core.recipe.tables import LoraConfig, NetworkConfig

DIT = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, "patch_size": 8}
GREY = {"cat": 40, "dog": 110, "fox": 200, "ant": 15, "elk": 70}


def folder(root: Path, *names: str, count: int = 4) -> dict[str, str]:
    """A folder of 8x8 pictures, each class of its own grey; as a `[data]` table."""
    for name in names:
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("L", (8, 8), GREY.get(name, 1) + index).save(root / name / f"{index}.png")
    return {"name": "images", "path": str(root)}


def model(*names: str, count: int | None = None):
    torch.manual_seed(0)
    network = NetworkConfig(name="DiTTransformer2DModel", args=DIT)
    size = count or len(names)
    return build_denoiser(
        network, parameterisation="edm", shape=(1, 8, 8), num_classes=size, class_names=names
    )


def classifier(*names: str, count: int | None = None) -> Classifier:
    torch.manual_seed(1)
    size = count or len(names)
    config = ClassifierConfig(shape=(1, 8, 8), num_classes=size, class_names=names, width=8)
    return Classifier(config).eval().requires_grad_(False)


def taught(source) -> dict[int, set[str]]:
    """What the pictures of each label show."""
    shown = {}
    for label, picture in zip(source.all().cond["class_label"].tolist(), source.all().x0, strict=True):
        value = float((picture.mean() + 1) * 127.5)
        name = min(GREY, key=lambda name: abs(GREY[name] - value))
        shown.setdefault(label, set()).add(name)
    return shown


def test_data_of_some_of_the_teacher_s_classes_gets_the_teacher_s_labels(tmp_path):
    source = build_source(folder(tmp_path, "cat", "fox"))
    fit(source, model("cat", "dog", "fox"))
    assert taught(source) == {0: {"cat"}, 2: {"fox"}}
    assert (source.class_names, source.num_classes) == (("cat", "dog", "fox"), 3)
    assert source.class_frequencies().tolist() == [0.5, 0, 0.5]


def test_classes_in_another_order_are_still_the_same_classes(tmp_path):
    source = build_source(folder(tmp_path, "cat", "dog", "fox"))
    fit(source, model("fox", "cat", "dog"))
    assert taught(source) == {1: {"cat"}, 2: {"dog"}, 0: {"fox"}}


@pytest.mark.parametrize("names", [("cat", "elk", "fox"), ("ant", "elk")])
def test_a_class_that_the_teacher_does_not_know_is_refused_by_name(tmp_path, names):
    source = build_source(folder(tmp_path, *names))
    unknown = next(name for name in names if name in ("ant", "elk"))
    with pytest.raises(
        ConfigError, match=f"'{unknown}', and the teacher has no such class, but cat, dog, fox"
    ):
        fit(source, model("cat", "dog", "fox"))


def test_labels_without_names_are_the_model_s_numbers():
    source = build_source({"name": "classes", "num_classes": 2})
    fit(source, model("cat", "dog", "fox"))
    assert source.labels.tolist() == [0, 1]
    with pytest.raises(ConfigError, match="'3'"):
        fit(build_source({"name": "classes", "num_classes": 4}), model("cat", "dog", "fox"))


def test_names_are_not_taken_for_the_numbers_of_a_model_without_names(tmp_path):
    data = folder(tmp_path, "cat", "fox")
    with pytest.raises(ConfigError, match="only the numbers 0 to 4") as caught:
        fit(build_source(data), model(count=5))
    assert "data.rename_classes.cat" in str(caught.value)
    source = build_source({**data, "rename_classes": {"cat": "3", "fox": "1"}})
    fit(source, model(count=5))
    assert taught(source) == {3: {"cat"}, 1: {"fox"}}


def test_folders_named_by_numbers_are_these_numbers_and_not_their_rank(tmp_path):
    source = build_source(folder(tmp_path, "10", "2"))
    fit(source, model(count=12))
    assert sorted(set(source.labels.tolist())) == [2, 10]


def test_classes_can_be_renamed_to_what_the_model_calls_them(tmp_path):
    data = folder(tmp_path, "cat", "fox")
    source = build_source({**data, "rename_classes": {"fox": "vixen"}})
    fit(source, model("cat", "dog", "vixen"))
    assert taught(source) == {0: {"cat"}, 2: {"fox"}}
    for wrong in ({"wolf": "cat"}, {"fox": "cat"}, {"cat": "a", "fox": "a"}):
        with pytest.raises(ConfigError, match="rename_classes"):
            build_source({**data, "rename_classes": wrong})


def test_a_name_that_two_classes_of_the_model_share_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="more than one class of the teacher is called so"):
        fit(build_source(folder(tmp_path, "cat", "fox")), model("cat", "cat", "fox"))


def test_an_accent_is_the_same_however_a_file_system_spells_it():
    assert class_numbers(["re\u0301sume\u0301"], ["cat", "r\u00e9sum\u00e9"]) == [1]


def test_declared_classes_without_items_need_not_be_known(tmp_path):
    datasets = pytest.importorskip("datasets")
    pictures = [Image.fromarray(np.full((8, 8), GREY[name], np.uint8)) for name in ("cat", "fox")]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["fox", "elk", "cat"])}
    )
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [2, 0]}, features=features)
    rows.to_parquet(tmp_path / "train.parquet")
    source = build_source({"name": "huggingface", "path": str(tmp_path)})
    fit(source, model("cat", "dog", "fox"))
    assert taught(source) == {0: {"cat"}, 2: {"fox"}}


@pytest.mark.slow
def test_pairs_are_conditioned_on_the_teacher_s_own_classes_and_not_found_for_others(tmp_path):
    where = api.context(tmp_path / "store", tmp_path / "cache")
    model("cat", "dog", "fox").save(tmp_path / "teacher")
    recipe = load_recipe("dmd2").override(
        {
            "teacher.path": str(tmp_path / "teacher"),
            "pairs.count": 4,
            "pairs.num_steps": 1,
            "data": folder(tmp_path / "set", "cat", "fox", count=1),
            "evaluate.judge.path": "/nonexistent",
        }
    )
    method, source = build(recipe, where)
    assert method.pairs.at(torch.arange(4)).cond["class_label"].tolist() == [0, 2, 0, 2]
    model("dog", "fox", "cat").save(tmp_path / "teacher")
    again, _ = build(recipe, where)
    assert again.pairs.at(torch.arange(4)).cond["class_label"].tolist() == [2, 1, 2, 1]
    assert len(list((tmp_path / "cache" / "pairs").iterdir())) == 2


def test_a_student_that_begins_as_a_model_of_other_classes_is_refused(tmp_path):
    where = api.context(tmp_path / "store", tmp_path / "cache")
    model("cat", "dog", "fox").save(tmp_path / "teacher")
    model("dog", "cat", "fox").save(tmp_path / "student")
    recipe = load_recipe("dmd2").override(
        {
            "teacher.path": str(tmp_path / "teacher"),
            "student.path": str(tmp_path / "student"),
            "data": folder(tmp_path / "set", "cat", "fox"),
        }
    )
    with pytest.raises(ConfigError, match="class 0 is 'cat' to the teacher and 'dog'"):
        build(recipe, where)


def test_a_judge_answers_in_the_order_of_the_generator_s_classes(tmp_path):
    where = api.context(tmp_path / "store", tmp_path / "cache")
    judge = classifier("fox", "ant", "cat", "dog")
    judge.save(tmp_path / "judge")
    generator = model("cat", "dog", "fox")
    config = Evaluate.parse({"judge": {"path": str(tmp_path / "judge")}, "num_samples": 4})
    source = build_source(folder(tmp_path / "set", "cat", "fox"))
    measured = load_evaluator(config, generator, source, where).judge.classifier
    x = torch.randn(5, 1, 8, 8)
    assert torch.allclose(measured(x), judge(x)[:, [2, 3, 0, 1]], atol=1e-6)
    assert measured.config.class_names == ("cat", "dog", "fox", "ant")

    classifier("fox", "ant", "cat").save(tmp_path / "judge")
    with pytest.raises(ConfigError, match="'dog', and evaluate.judge has no such class") as caught:
        load_evaluator(config, generator, source, where)
    assert caught.value.field == "evaluate.judge"


def test_pictures_to_compare_with_are_of_the_generator_s_classes(tmp_path):
    where = api.context(tmp_path / "store", tmp_path / "cache")
    classifier("cat", "dog", "fox").save(tmp_path / "judge")
    config = Evaluate.parse(
        {"judge": {"path": str(tmp_path / "judge")}, "data": folder(tmp_path / "other", "ant", "elk")}
    )
    source = build_source(folder(tmp_path / "set", "cat", "fox"))
    with pytest.raises(ConfigError, match="the data has a class 'ant'") as caught:
        load_evaluator(config, model("cat", "dog", "fox"), source, where)
    assert caught.value.field == "evaluate.data"


def test_a_reward_asks_the_classifier_for_the_student_s_class():
    reader = classifier("fox", "cat", "dog")
    student = LoraDenoiser(model("cat", "dog", "fox"), LoraConfig(rank=2, targets="all-linear"))
    student.sampler = student.sampler.few_step((0.6, 0.2), noise_scale=0.6)
    config = HyperSDFeedback.Config.parse({"threshold": 1.0, "reward": {"name": "class_probability"}})
    method = HyperSDFeedback(config, student=student, extractor=reader)
    pictures, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2])
    wanted = reader(pictures).softmax(1)[torch.arange(3), [1, 2, 0]]
    assert torch.allclose(method.reward.score(pictures, {"class_label": labels}), wanted, atol=1e-6)
    with pytest.raises(ConfigError, match="the extractor has no such class"):
        HyperSDFeedback(config, student=student, extractor=classifier("cat", "dog", "elk"))
    assert naming_classes(reader, student.cond, asked=False) is reader


def test_an_order_that_is_right_already_changes_nothing():
    reader = classifier("cat", "dog", "fox")
    assert in_order(reader, ("cat", "dog"), what="the judge", field="x") is reader
    assert class_numbers(("a", "b"), ("b",)) == [ABSENT, 0]
    unlabelled = build_source({"name": "prompts", "prompts": ["a"]})
    with pytest.raises(ConfigError, match="the data has no labels"):
        use_classes_of(unlabelled, CondSpec(kind="class_label", num_classes=3))


def test_more_or_fewer_classes_than_the_data_names_leave_the_other_names_alone(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["fox", "cat", "elk"])}
    )
    pictures = [Image.fromarray(np.full((8, 8), GREY[name], np.uint8)) for name in ("fox", "cat")]
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1]}, features=features)
    rows.to_parquet(tmp_path / "train.parquet")
    for count, names in ((2, ("fox", "cat")), (4, ("fox", "cat", "elk", "3"))):
        source = build_source({"name": "huggingface", "path": str(tmp_path), "num_classes": count})
        assert source.class_names == names
        fit(source, model("cat", "dog", "fox"))
        assert taught(source) == {0: {"cat"}, 2: {"fox"}}


def test_a_set_of_numbers_can_be_given_the_names_of_its_classes(tmp_path):
    pixels = np.stack([np.full((8, 8), GREY[name], np.uint8) for name in ("fox", "cat")])
    for name, values, magic in (
        ("images", pixels, b"\0\0\x08\x03"),
        ("labels", np.uint8([0, 1]), b"\0\0\x08\x01"),
    ):
        header = magic + b"".join(side.to_bytes(4, "big") for side in values.shape)
        (tmp_path / f"train-{name}").write_bytes(header + values.tobytes())
    renamed = {"0": "fox", "1": "cat"}
    source = build_source({"name": "idx", "path": str(tmp_path), "rename_classes": renamed})
    fit(source, model("cat", "dog", "fox"))
    assert taught(source) == {0: {"cat"}, 2: {"fox"}}
