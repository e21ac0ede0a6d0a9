"""Requests to a student that is told its guidance: any of its range, in the batch of that scale, and no other."""

from __future__ import annotations

import pytest

from distill_core.artifacts import CondSpec, ImageSpec, SamplerSpec
from distill_core.errors import ConfigError
from distill_core.kinds.denoiser.card import Card, why_not_exported
from distillery_sampler.engine.checks import image_key
from distillery_sampler.engine.requests import GenerateRequest


def card(**sampler):
    steps = {"kind": "few_step", "sigmas": (9.0, 2.0), "noise_scale": 9.0, "num_steps": 2, "max_steps": 2}
    return Card(
        image=ImageSpec(channels=1, height=8, width=8, picture=(1, 8, 8)),
        cond=CondSpec(kind="class_label", num_classes=10, null_label=10),
        sampler=SamplerSpec(**steps, guidable=False, **sampler),
    )


def key(asked, **sampler):
    return image_key(GenerateRequest("student", class_labels=(3,), guidance=asked), card(**sampler))


def test_a_guidance_of_the_range_is_told_and_one_outside_is_refused_by_name():
    told = {"guidance": 2.5, "guidance_range": (1.0, 4.0)}
    assert key(3.7, **told).guidance == 3.7
    assert key(None, **told).guidance == 2.5
    for outside in (0.9, 4.1):
        with pytest.raises(ConfigError, match="this student was distilled for 1 to 4") as error:
            key(outside, **told)
        assert error.value.field == "guidance"


def test_a_student_of_one_guidance_has_it_in_its_weights():
    assert key(None).guidance == 1.0
    with pytest.raises(ConfigError, match="distilled at a fixed guidance"):
        key(3.0)


def test_no_graph_is_made_of_a_student_that_is_told_its_guidance():
    assert "told their guidance" in why_not_exported(card(guidance_range=(1.0, 4.0)))
    assert why_not_exported(card()) == ""
