"""Progressive distillation: targets of two teacher steps, stages that halve, and what one hands to the next."""

from __future__ import annotations

import copy

import pytest
import torch

from distill_core.diffusion.trajectory import jump
from distill_core.errors import ConfigError
from distill_core.methods.diffusion.progressive import Config, Progressive
from tests.oracles import MixtureDenoiser


def made(**config):
    teacher = MixtureDenoiser()
    student = copy.deepcopy(teacher)
    return Progressive(Config(**config), teacher=teacher, student=student)


def drawn(method, count=5):
    torch.manual_seed(0)
    half, index = method.finest.coarse(2 * len(method.grid)), torch.arange(count) % len(method.grid)
    levels = [half.at(2 * index + number).double() for number in range(3)]
    x = method.teacher.samples(count) + levels[0][:, None, None, None] * torch.randn(count, 1, 1, 2)
    return x, levels


def test_a_target_jumps_to_where_two_steps_of_the_teacher_end():
    method = made(start_steps=4, guidance=2.3)
    x, levels = drawn(method)
    cond = {"class_label": torch.tensor([0, 1, 2, 1, 3])}

    def taught(x, sigma):
        return method.teacher.guided(x, sigma, cond, 2.3)

    middle = jump(x, taught(x, levels[0]), levels[0], levels[1])
    end = jump(middle, taught(middle, levels[1]), levels[1], levels[2])
    target = method.target(x, levels, cond)
    torch.testing.assert_close(jump(x, target, levels[0], levels[2]), end)
    last = levels[2] == 0
    torch.testing.assert_close(target[last], taught(middle, levels[1])[last])


def test_a_stage_learns_from_the_student_before_it_on_half_as_many_levels():
    method = made(start_steps=4, end_steps=1)
    stages = method.stages(method.config, 30)
    assert [(stage.name, stage.steps, stage.restart) for stage in stages] == [
        ("steps_4", 10, False),
        ("steps_2", 10, True),
        ("steps_1", 10, True),
    ]
    before = method.grid
    method.student.means += 0.25  # what the first stage learned
    assert not torch.equal(method.former.means, method.student.means)
    method.enter(stages[1])
    assert method.grid.levels == before.levels[::2]
    assert method.student.sampler.sigmas == method.grid.levels[:-1]
    assert method.student.sampler.eta == 0
    x, levels = drawn(method)
    method.student.means += 1.0  # what the second learns is not what it learns from
    middle = jump(x, method.former(x, levels[0]), levels[0], levels[1])
    end = jump(middle, method.former(middle, levels[1]), levels[1], levels[2])
    torch.testing.assert_close(jump(x, method.target(x, levels, {}), levels[0], levels[2]), end)


@pytest.mark.parametrize("steps", [(6, 1), (12, 5), (2, 4)])
def test_steps_that_do_not_halve_are_refused(steps):
    with pytest.raises(ConfigError, match="power of 2"):
        Config.parse({"start_steps": steps[0], "end_steps": steps[1]}, where="config")


def test_a_start_above_the_teachers_levels_is_refused():
    with pytest.raises(ConfigError, match="above the teacher's highest") as error:
        made(start_steps=2, start=11.0)
    assert error.value.field == "config.start"
