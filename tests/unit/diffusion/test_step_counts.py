"""A sampler of one student that serves several numbers of steps."""

from __future__ import annotations

import pytest

from distill_core.diffusion.sampling import SamplerSpec
from distill_core.errors import ConfigError

LEVELS = (5.0, 1.6, 0.6, 0.2)


def unified(*counts: int) -> SamplerSpec:
    return SamplerSpec.few_step(LEVELS, noise_scale=5.0, step_counts=counts)


def test_n_steps_take_every_so_manieth_level_from_the_first_on():
    spec = unified(1, 2, 3, 4)
    assert [spec.levels(count) for count in (1, 2, 3, 4)] == [
        [5.0],
        [5.0, 0.6],
        [5.0, 1.6, 0.6],
        list(LEVELS),
    ]
    assert (spec.num_steps, spec.max_steps) == (4, 4)


def test_a_number_of_steps_that_was_not_trained_is_refused_by_name():
    with pytest.raises(ConfigError, match="num_steps = 3 is not allowed for this model: 1, 2, 4") as error:
        unified(1, 2, 4).levels(3)
    assert error.value.field == "num_steps"


def test_a_student_without_counts_is_sampled_as_before():
    spec = SamplerSpec.few_step(LEVELS, noise_scale=5.0)
    assert [spec.levels(count) for count in (1, 2, 3, 4)] == [
        [5.0],
        [5.0, 0.2],
        [5.0, 0.6, 0.2],
        list(LEVELS),
    ]


def test_counts_beyond_the_levels_are_refused():
    with pytest.raises(ValueError, match="step_counts must be 1 to 4"):
        unified(1, 5)


def test_counts_survive_the_manifest():
    spec = unified(1, 2, 4)
    assert SamplerSpec.model_validate_json(spec.model_dump_json()) == spec
