"""Data sets of methods as data of others: from the store, and made once by the recipe that names them."""

from __future__ import annotations

import sys

import pytest
import torch

from distill_core import api
from distill_core.cache_keys import cache_key
from distill_core.data import build_source
from distill_core.errors import ConfigError, DistilleryError
from distill_core.recipe import load_recipe
from distill_core.running.evaluate import evaluate
from tests.helpers import tiny_context

METHOD = '''
"""Class means: pictures that are pulled to the mean of their class, with soft labels of a teacher."""
import torch
from torch import nn
from distill_core.data.item_set import ItemSet
from distill_core.method import Method, MethodConfig, Update


class Config(MethodConfig):
    per_class: int = 2


class ClassMeans(Method):
    paper = "Wang et al. 2018, Dataset Distillation, arXiv 1811.10959"
    kind = "dataset"
    roles = ("images",)
    result = "images"

    def __init__(self, config: Config, *, teacher, data):
        super().__init__()
        self.config, self.teacher, self.data = config, teacher, data
        self.labels = torch.arange(len(data.class_names)).repeat_interleave(config.per_class)
        self.images = nn.Module()
        self.images.x0 = nn.Parameter(torch.randn(len(self.labels), *data.shape).clamp(-1, 1))

    @classmethod
    def columns(cls, config):
        return {"x0": "the means", "class_label": "the classes"}

    def updates(self, batch, step):
        mine = self.labels[:, None] == batch.columns["class_label"]
        share = mine.float() / mine.sum(1, keepdim=True).clamp(min=1)
        target = (share @ batch.x0.flatten(1)).reshape(self.images.x0.shape)
        pulled = (self.images.x0 - target).square() * mine.any(1)[:, None, None, None]
        yield Update("images", pulled.mean())

    @torch.no_grad()
    def published(self):
        logits = self.teacher.call("predict", {"image": self.images.x0})["logits"]
        held = ItemSet(
            self.images.x0, labels=self.labels, class_names=self.data.class_names, arrays={"logits": logits}
        )
        return {"images": held}

    def figures(self, config):
        return {"items": float(len(self.labels))}
'''

RECIPE = """
method = "class_means"
title = "Class means"
steps = {steps}
batch_size = 100
threads = 1
data = {{ name = "digits", split = "train" }}
teacher = {{ recipe = "judge_digits" }}
optim = {{ images = {{ lr = 0.03 }} }}
publish = {{ name = "class-means", licence = "Apache-2.0" }}
"""


@pytest.fixture
def context(tmp_path, monkeypatch):
    """A context with the method installed, and its recipe in `means.toml`."""
    site = tmp_path / "site"
    info = site / "means_package-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "means_package.py").write_text(METHOD)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: means-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[distillery.methods]\nclass_means = means_package\n")
    monkeypatch.syspath_prepend(str(site))
    (tmp_path / "means.toml").write_text(RECIPE.format(steps=3))
    yield tiny_context(tmp_path)
    sys.modules.pop("means_package", None)


def kd(data: dict[str, object], **changes: object):
    base = load_recipe("kd").override({"steps": 4, "batch_size": 12, **changes})
    values = base.model_dump(mode="json", exclude_none=True)
    return load_recipe({**values, "data": data, "publish": {"name": "taught"}})


def trained(recipe, context, folder):
    """The run's result, and what its model holds."""
    result = api.train(recipe, folder, context)
    return result, list(context.artifact(result.manifest.ref).state_dict().values())


def test_a_data_set_is_published_and_trains_another_method_by_reference_and_by_recipe(context, tmp_path):
    made = api.train(load_recipe(str(tmp_path / "means.toml")), tmp_path / "made", context)
    assert (made.manifest.kind, made.manifest.ref) == ("dataset", "class-means@1")
    assert made.manifest.card["items"] == 20
    assert made.figures == {"items": 20.0}
    assert {"data.parquet", "config.json", "preview.png"} <= made.manifest.files.keys()

    order = {"kind": "per_class"}
    by_ref, ours = trained(
        kd({"name": "artifact", "ref": "class-means@latest", "order": order}), context, tmp_path / "ref"
    )
    assert "class-means@1" in by_ref.manifest.parents
    assert by_ref.figures["accuracy"] >= 0

    digits = {"name": "digits", "split": "train", "order": order}
    _, others = trained(kd(digits), context, tmp_path / "digits")
    assert not all(map(torch.equal, ours, others))

    # in a tiny context what a recipe makes takes two steps, so the same set is one of two
    (tmp_path / "means.toml").write_text(RECIPE.format(steps=2))
    recipe = load_recipe(str(tmp_path / "means.toml")).override({"batch_size": 8})
    api.train(recipe, tmp_path / "two", context)
    _, by_second = trained(
        kd({"name": "artifact", "ref": "class-means@2", "order": order}), context, tmp_path / "second"
    )
    from_recipe = {"recipe": str(tmp_path / "means.toml"), "order": order}
    _, by_recipe = trained(kd(from_recipe), context, tmp_path / "recipe")
    assert all(map(torch.equal, by_second, by_recipe))
    assert not all(map(torch.equal, ours, by_recipe))


def test_what_a_recipe_makes_is_made_once_and_again_when_the_recipe_changes(context, tmp_path):
    named = kd({"recipe": str(tmp_path / "means.toml")})
    for folder in ("a", "b"):
        api.train(named.model_copy(update={"publish": None}), tmp_path / folder, context)
    assert len(list((tmp_path / "cache" / "models").glob("class_means-*"))) == 1
    first = cache_key(named, context.store)
    (tmp_path / "means.toml").write_text(RECIPE.format(steps=3).replace('"train"', '"test"'))
    assert cache_key(named, context.store) != first
    api.train(named.model_copy(update={"publish": None}), tmp_path / "c", context)
    assert len(list((tmp_path / "cache" / "models").glob("class_means-*"))) == 2


def test_an_alias_of_a_data_set_counts_in_the_key_as_its_version(context, tmp_path):
    def key(ref: str) -> str:
        return cache_key(kd({"name": "artifact", "ref": ref}), context.store)

    recipe = load_recipe(str(tmp_path / "means.toml"))
    api.train(recipe, tmp_path / "made", context)
    first = key("class-means@latest")
    api.train(recipe.override({"seed": 7}), tmp_path / "again", context)
    assert key("class-means@latest") == key("class-means@2") != first
    assert key("class-means@1") == first


def test_a_further_data_set_and_the_one_of_the_evaluation_may_be_made_by_a_recipe(context, tmp_path):
    recipe = load_recipe("kd").override(
        {"steps": 2, "batch_size": 12, "evaluate.data": {"recipe": str(tmp_path / "means.toml")}}
    )
    result = api.train(recipe.model_copy(update={"publish": None}), tmp_path / "run", context)
    assert result.measured_with["accuracy"] == "20 labelled items"
    more = load_recipe(
        {**recipe.model_dump(exclude_none=True), "data": {"name": "digits", "more": {"recipe": "x"}}}
    )
    with pytest.raises(ConfigError, match="uses no further data more") as caught:
        api.train(
            more.override({"data.more.recipe": str(tmp_path / "means.toml")}), tmp_path / "more", context
        )
    assert caught.value.field == "data.more"


def test_a_data_set_that_is_not_made_yet_is_made_in_shape_alone_for_a_plan(context, tmp_path):
    data = {"recipe": str(tmp_path / "means.toml"), "order": {"kind": "static", "share": 0.6}}
    values = load_recipe("rs2").model_dump(mode="json", exclude_none=True)
    assert api.plan(load_recipe({**values, "data": data}), context).parts
    assert not list((tmp_path / "cache").glob("models/class_means-*"))


@pytest.mark.parametrize(
    ("data", "field", "said"),
    [
        ({"recipe": "edm_digit"}, "recipe", "did you mean 'edm_digits'"),
        ({"recipe": "judge_digits"}, "data.recipe", "kind 'classifier', and a data set's is 'dataset'"),
        ({"recipe": "kd", "ref": "x"}, "data", "give exactly one of ref, recipe, path"),
        ({"name": "digits", "recipe": "kd"}, "data.recipe", "unknown key data.recipe"),
    ],
)
def test_what_is_no_data_set_is_refused_in_a_sentence(data, field, said, context, tmp_path):
    with pytest.raises(DistilleryError, match=said) as caught:
        api.train(kd(data), tmp_path / "run", context)
    assert caught.value.field == field


def test_a_data_set_that_needs_itself_is_refused(context, tmp_path):
    text = RECIPE.format(steps=2).replace(
        'name = "digits", split = "train"', f'recipe = "{tmp_path}/means.toml"'
    )
    (tmp_path / "means.toml").write_text(text)
    with pytest.raises(ConfigError, match="needs itself as a teacher, judge or data set"):
        api.train(load_recipe(str(tmp_path / "means.toml")), tmp_path / "run", context)


def test_a_data_set_is_no_teacher_and_nothing_is_measured_of_it(context, tmp_path):
    api.train(load_recipe(str(tmp_path / "means.toml")), tmp_path / "made", context)
    recipe = load_recipe("kd").override({"teacher": {"artifact": "class-means"}, "publish": {"name": "x"}})
    with pytest.raises(DistilleryError, match="teacher must be a Module, and this is a ItemSet"):
        api.train(recipe, tmp_path / "run", context)
    with pytest.raises(ConfigError, match="nothing can be measured of class-means"):
        evaluate("class-means", {}, {"name": "digits"}, context)


def test_columns_beside_pictures_and_labels_reach_the_batch(context, tmp_path):
    api.train(load_recipe(str(tmp_path / "means.toml")), tmp_path / "made", context)
    source = build_source({"name": "artifact", "ref": "class-means"}, folders=context)
    batch = source.batch(6, epoch_seed=3, position=1)
    teacher = context.load(load_recipe(str(tmp_path / "means.toml")).teacher)
    with torch.no_grad():
        logits = teacher.call("predict", {"image": batch.x0})["logits"]
    assert torch.allclose(batch.columns["logits"], logits, atol=1e-5)
