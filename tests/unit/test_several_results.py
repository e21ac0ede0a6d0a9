"""A run that leaves two models: both are published, once, the main one last, under names that the store takes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distill_core import api
from distill_core.errors import ConfigError
from distill_core.kinds.loading import load_artifact
from distill_core.recipe import Recipe, load_recipe

METHOD = '''
"""Two classifiers of pictures, a narrow and a wide one, each trained on its own loss."""
import torch.nn.functional as F
from distill_core.method import Method, MethodConfig, Update
from distill_core.networks.predictor import image_classifier
from distill_core.networks.predictors import build_network


class Pair(Method):
    Config = MethodConfig
    paper = "Wang and Wang 2021, Balanced knowledge distillation, arXiv 2104.10510"
    kind = "predictor"
    roles = ("narrow", "wide")
    result = "narrow"

    def __init__(self, config, *, network, data):
        super().__init__()
        facts = {"shape": data.shape, "num_classes": data.num_classes, "class_names": data.class_names}
        for role in self.roles:
            built = build_network(network, facts)
            setattr(self, role, image_classifier(built, network, shape=data.shape, class_names=data.class_names))

    def published(self):
        return {"narrow": self.narrow, "wide": self.wide}

    def figures(self, config):
        return {"gap": 0.375}

    def updates(self, batch, step):
        for role in self.roles:
            logits = getattr(self, role).network(batch.x0)
            yield Update(role, F.cross_entropy(logits, batch.columns["class_label"]))
'''
INFO = "Metadata-Version: 2.1\nName: pair-package\nVersion: 1.0\n"
CHILD = """
import os, sys
from pathlib import Path
from distill_core import api
from tests.unit.test_several_results import recipe

where = api.context(Path(sys.argv[1]) / "store", Path(sys.argv[1]) / "cache")
publish = where.store.publish

def killed_at_the_second(folder, draft, **key):
    if where.store.names():
        os._exit(9)
    return publish(folder, draft, **key)

where.store.publish = killed_at_the_second
api.train(recipe(), Path(sys.argv[1]) / "run", where, job="job-7")
"""


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder of an installed package with the method."""
    package = tmp_path / "package"
    info = package / "pair_package-1.0.dist-info"
    info.mkdir(parents=True)
    (package / "pair_package.py").write_text(METHOD)
    (info / "METADATA").write_text(INFO)
    (info / "entry_points.txt").write_text("[distillery.methods]\npair = pair_package\n")
    monkeypatch.syspath_prepend(str(package))
    yield package
    sys.modules.pop("pair_package", None)


def recipe(name: str = "pair-digits", **changes: object) -> Recipe:
    values = {
        "method": "pair",
        "steps": 2,
        "batch_size": 6,
        "threads": 1,
        "data": {"name": "digits"},
        "network": {"name": "classifier", "args": {"width": 8}},
        "publish": {"name": name, "alias": "prod"},
    }
    return load_recipe({**values, **changes})


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten() for value in model.parameters()])


def test_both_models_are_published_under_their_names_with_what_is_true_of_each(installed, tmp_path):
    where = api.context(tmp_path / "store", tmp_path / "cache")
    result = api.train(recipe(), tmp_path / "run", where, job="job-7")
    store = where.store
    assert store.names() == ["pair-digits", "pair-digits-wide"]
    main, other = (store.manifest(name) for name in store.names())
    assert result.manifest == main
    assert (main.job, other.job, main.kind, other.kind) == ("job-7", "job-7", "predictor", "predictor")
    assert (main.metrics["gap"], other.metrics) == (0.375, {}), "figures are of the main model"
    assert (store.aliases("pair-digits")["prod"], "prod" in store.aliases("pair-digits-wide")) == (1, False)
    one, two = (weights(load_artifact(store, name, tmp_path / "cache")) for name in store.names())
    assert one.shape == two.shape
    assert not torch.equal(one, two)
    again = api.train(recipe(), tmp_path / "run", where, job="job-7")
    assert (again.again, store.versions("pair-digits"), store.versions("pair-digits-wide")) == (
        True,
        [1],
        [1],
    )


@pytest.mark.slow
def test_a_run_that_was_killed_between_its_publications_is_finished_by_the_next(installed, tmp_path):
    path = ":".join([str(installed), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        env={"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 9, done.stderr[-2000:]
    where = api.context(tmp_path / "store", tmp_path / "cache")
    assert where.store.names() == ["pair-digits-wide"], "the main one says that all are there"
    first = where.store.manifest("pair-digits-wide")
    result = api.train(recipe(), tmp_path / "run", where, job="job-7")
    assert (result.again, result.manifest.ref) == (False, "pair-digits@1")
    assert where.store.versions("pair-digits-wide") == [1]
    assert where.store.manifest("pair-digits-wide") == first
    assert where.store.aliases("pair-digits")["prod"] == 1


def test_a_name_that_is_too_long_with_the_role_is_refused_before_anything_is_trained(installed, tmp_path):
    where = api.context(tmp_path / "store", tmp_path / "cache")
    api.prepare(recipe("x" * 59), where)  # 64 with -wide
    told: list[dict] = []
    with pytest.raises(
        ConfigError, match=r"would publish the model of wide as 'x{60}-wide', which is no name; allowed are"
    ) as caught:
        api.train(recipe("x" * 60), tmp_path / "run", where, listener=told.append)
    assert caught.value.field == "publish.name"
    assert told == []
    assert not (tmp_path / "run" / "recipe.toml").exists()
    with pytest.raises(ConfigError, match="would publish the model of wide"):
        api.plan(recipe("x" * 60), where)
