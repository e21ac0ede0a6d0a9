"""A method from another package, found by its entry point, without touching a file of ours."""

from __future__ import annotations

import sys
from textwrap import dedent

import pytest

METHOD = '''
"""Score regression: a student that repeats its teacher's x0 at random levels."""
import torch
from distill_core.method import Method, MethodConfig, Update
from distill_core.losses.denoising import add_noise


class Config(MethodConfig):
    max_level: float = 1.0


class ScoreRegression(Method):
    paper = "Hinton et al. 2015, Distilling the Knowledge in a Neural Network, arXiv 1503.02531"
    roles = ("student",)

    def __init__(self, config: Config, *, teacher, student, data):
        super().__init__()
        self.config, self.teacher, self.student = config, teacher, student
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(0.5)

    def updates(self, batch, step):
        sigma = self.teacher.schedule.sigma_at(torch.rand(batch.size) * self.config.max_level)
        x_sigma = add_noise(batch.x0, sigma)
        with torch.no_grad():
            target = self.teacher(x_sigma, sigma, batch.cond)
        yield Update("student", (self.student(x_sigma, sigma, batch.cond) - target).square().mean())
'''


@pytest.fixture
def installed(tmp_path, monkeypatch):
    (tmp_path / "outside_package.py").write_text(METHOD)
    info = tmp_path / "outside_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[distillery.methods]\nscore_regression = outside_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("outside_package", None)


def test_an_installed_package_adds_a_method_and_its_recipe_trains(installed, context, tmp_path):
    from distill_core import api
    from distill_core.recipe import load_recipe

    recipe_file = tmp_path / "mine.toml"
    recipe_file.write_text(
        dedent("""
        method = "score_regression"
        steps = 60
        batch_size = 64
        threads = 1
        log_every = 1
        data = { name = "digits" }
        teacher = { recipe = "edm_digits" }
        optim = { student = { lr = 1e-3 } }
        """)
    )
    losses = []
    api.train(
        load_recipe(str(recipe_file)),
        tmp_path / "run",
        context,
        listener=lambda e: losses.append(e["values"]["student_loss"]) if e["event"] == "metrics" else None,
    )
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    described = {entry["name"]: entry for entry in api.describe_methods()}
    assert described["score_regression"]["needs"] == ["teacher", "student", "data"]
    assert described["score_regression"]["family"] == "outside_package"
