"""InstaFlow against a Gaussian teacher, whose pairs lie on known lines and whose straight flow is known."""

from __future__ import annotations

import pytest
import torch

from distill_core.data import build_source
from distill_core.data.pairs import Pairs, build_pairs
from distill_core.errors import ConfigError
from distill_core.method import Batch, Method
from distill_core.methods.diffusion.instaflow import InstaFlow
from distill_core.recipe.tables import EvaluateConfig, PairsConfig
from tests.oracles import AffineDenoiser, StraightFlow

MEAN, STD, START = 0.3, 0.25, 10.0
SCALE = STD / (STD**2 + START**2) ** 0.5
END = MEAN * (1 - SCALE), START * SCALE  # m and s of m + s z, where the teacher's ODE ends


def pairs_of(folder, count: int = 320) -> Pairs:
    source = build_source({"name": "classes", "num_classes": 10})
    return build_pairs(
        AffineDenoiser(MEAN, STD), source, PairsConfig(count=count, num_steps=64), folder / "pairs"
    )


def method_of(folder, student=None, **config: object) -> InstaFlow:
    values = {"reflow_steps": 150, "held_out": 64, "flow_steps": 5, **config}
    student = student or StraightFlow(-0.4, 0.7)
    teacher = AffineDenoiser(MEAN, STD).requires_grad_(False)
    return InstaFlow(InstaFlow.Config.parse(values), teacher=teacher, student=student, pairs=pairs_of(folder))


def run(method: Method, first: int, last: int, lr: float = 0.05) -> None:
    """Adam on the student from step to step, its rate falling to 0."""
    optimizer = torch.optim.Adam(method.student.parameters(), lr)
    for step in range(first, last):
        torch.manual_seed(step)
        optimizer.param_groups[0]["lr"] = lr * (1 - (step - first) / (last - first))
        (update,) = method.updates(Batch.of(64), step)
        update.loss.backward(inputs=list(method.student.parameters()))
        optimizer.step()
        optimizer.zero_grad()


def ends(student) -> tuple[float, float]:
    return float(student.mean), float(student.log_std.exp())


def test_reflow_finds_the_straight_flow_between_noise_and_the_teacher_s_pictures(tmp_path):
    method = method_of(tmp_path)
    assert [stage.name for stage in method.stages(method.config, 400)] == ["reflow", "distil"]
    run(method, 0, 150)
    assert ends(method.student) == pytest.approx(END, abs=0.01)
    method.enter(method.stage_of(150))
    figures = method.figures(EvaluateConfig(batch_size=40))
    assert figures["flow_straightness"] < 1e-3 * figures["teacher_straightness"]
    assert figures["teacher_straightness"] > 1e-3
    assert figures["flow_pair_distance"] < 1e-3 < figures["teacher_pair_distance"]


def test_one_step_is_distilled_from_the_reflowed_model_s_own_pairs(tmp_path):
    method = method_of(
        tmp_path, StraightFlow(-0.2, 0.6)
    )  # as reflow might have left it: not the teacher's ends
    method.enter(method.stage_of(150))
    with torch.no_grad():
        method.student.mean += 0.3
        method.student.log_std -= 0.4
    run(method, 150, 300)
    assert ends(method.student) == pytest.approx((-0.2, 0.6), abs=0.01)
    assert method.flow.sampler.num_steps == 5
    assert method.own_pairs().config.num_steps == 5
    assert len(list(tmp_path.glob("*/000000000.safetensors"))) == 2


def test_without_reflow_the_teacher_s_pairs_are_distilled_and_no_flow_is_published(tmp_path):
    method = method_of(tmp_path, reflow_steps=0)
    assert [stage.name for stage in method.stages(method.config, 9)] == ["distil"]
    assert list(method.published()) == ["student"]
    run(method, 0, 150)
    assert ends(method.student) == pytest.approx(END, abs=0.01)
    assert list(method_of(tmp_path).published()) == ["student", "flow"]


def test_a_line_begins_where_sampling_begins_and_ends_in_the_picture(tmp_path):
    method = method_of(tmp_path)
    pairs = method.pairs.at(torch.tensor([3, 9]))
    line = method.line(pairs)
    spec = method.student.sampler
    torch.testing.assert_close(line.at(torch.full((2,), spec.sigmas[0])), spec.noise_scale * pairs.z)
    assert torch.equal(line.at(torch.zeros(2)), pairs.x0)


def test_what_it_lacks_is_said_in_a_sentence(tmp_path):
    teacher = AffineDenoiser(MEAN, STD)
    with pytest.raises(ConfigError, match=r"add a \[pairs\] table") as told:
        InstaFlow(InstaFlow.Config(), teacher=teacher, student=StraightFlow(0.1, 0.2))
    assert told.value.field == "pairs"
    with pytest.raises(ConfigError, match="more than the 320 that are held out"):
        method_of(tmp_path, held_out=320)
    with pytest.raises(ConfigError, match="reads pictures with a classifier") as told:
        method_of(tmp_path, l2_steps=7)
    assert told.value.field == "extractor"
