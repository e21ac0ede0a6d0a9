"""YONOS-SR: targets of a teacher that is shown more, stages that hand over, direct training beside."""

from __future__ import annotations

import copy

import pytest
import torch

from distill_core.diffusion.super_resolution import LOW_RESOLUTION, shrink
from distill_core.errors import ConfigError
from distill_core.method import Batch
from distill_core.methods.diffusion.yonos import Config, Yonos
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.diffusers_new import build_codec, build_denoiser
from distill_core.recipe.tables import NetworkConfig
from tests.helpers import TINY_NETWORKS, tiny_trainer


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    network = NetworkConfig(name="UNet2DModel", args=TINY_NETWORKS["UNet2DModel"])
    teacher = build_denoiser(
        network, parameterisation="v", shape=(1, 16, 16), num_classes=None, low_resolution=2
    )
    return teacher.requires_grad_(False)


@pytest.fixture(scope="module")
def latent_teacher():
    """Of 2 x 8 x 8 latents of 16 x 16 pictures."""
    torch.manual_seed(0)
    codec = build_codec(
        {"block_out_channels": [8, 8], "latent_channels": 2, "norm_num_groups": 4}, (1, 16, 16)
    ).requires_grad_(False)
    network = NetworkConfig(name="UNet2DModel", args=TINY_NETWORKS["UNet2DModel"])
    teacher = build_denoiser(
        network, parameterisation="v", shape=(1, 16, 16), num_classes=None, low_resolution=2, codec=codec
    )
    return teacher.requires_grad_(False)


def made(teacher, **config):
    student = copy.deepcopy(teacher).requires_grad_(True)
    return Yonos(Config(**{"factors": (4, 8), **config}), teacher=teacher, student=student)


@pytest.fixture
def x0():
    torch.manual_seed(1)
    return torch.randn(5, 1, 16, 16).clamp(-1, 1)


def watched(model, calls, name):
    """Note the name, x and condition of every call of a model."""
    model.register_forward_pre_hook(lambda _module, inputs: calls.append((name, inputs[0], inputs[2])))


def test_student_and_teacher_see_one_noised_picture_and_the_teacher_a_larger_condition(teacher, x0):
    method, calls = made(copy.deepcopy(teacher)), []
    watched(method.teacher, calls, "teacher")
    watched(method.student, calls, "student")
    (update,) = method.updates(Batch.of(5, x0), 0)
    (first, x, shown), (second, same, smaller) = calls
    assert (first, second) == ("teacher", "student")
    assert torch.equal(x, same)
    torch.testing.assert_close(shown[LOW_RESOLUTION], shrink(x0, 2))
    torch.testing.assert_close(smaller[LOW_RESOLUTION], shrink(x0, 4))
    assert not torch.equal(x, x0)
    update.loss.backward()
    assert any(value.grad is not None for value in method.student.parameters())
    assert all(value.grad is None for value in method.teacher.parameters())


def test_a_target_is_the_answer_to_the_picture_that_is_less_small(teacher, x0):
    method = made(teacher)
    x, sigma = x0 + 0.3, torch.tensor([0.1, 0.5, 1.3, 4.0, 9.0])
    torch.testing.assert_close(
        method.target(x, sigma, x0), teacher(x, sigma, {LOW_RESOLUTION: shrink(x0, 2)})
    )
    direct = made(teacher, distil=False, factors=(8,))
    assert torch.equal(direct.target(x, sigma, x0), x0)


def test_the_next_stage_learns_from_the_student_before_it(teacher, x0):
    method = made(teacher)
    stages = method.stages(method.config, 31)
    assert [(stage.name, stage.steps, stage.restart) for stage in stages] == [
        ("factor_4", 15, False),
        ("factor_8", 15, True),
    ]
    assert method.student.cond.factor == 4
    with torch.no_grad():
        for value in method.student.parameters():
            value += 0.05  # what the first stage learned
    method.enter(stages[1])
    assert method.student.cond.factor == 8
    assert method.student.card().cond.factor == 8
    x, sigma = x0 + 0.3, torch.full((5,), 1.7)
    handed = method.student(x, sigma, {LOW_RESOLUTION: shrink(x0, 4)})
    torch.testing.assert_close(method.target(x, sigma, x0), handed)
    assert (handed - teacher(x, sigma, {LOW_RESOLUTION: shrink(x0, 4)})).abs().max() > 1e-3
    assert teacher.cond.factor == 2


def test_the_student_serves_in_one_step_from_the_highest_level_that_was_trained(teacher):
    method = made(teacher)
    spec = method.student.sampler
    assert (spec.kind, spec.num_steps, spec.max_steps, spec.guidable) == ("few_step", 1, 1, False)
    assert spec.sigmas == method.grid.levels[:1]


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        ((8, 4), "must rise"),
        ((4, 6), "each a multiple"),
        ((2, 4), "begins with 2, and the teacher enlarges 2 times"),
        ((3,), "begins with 3"),
        ((4, 32), "16 x 16 pixels do not divide by 32"),
    ],
)
def test_factors_that_cannot_be_are_refused_by_their_name(teacher, factors, said):
    with pytest.raises(ConfigError, match=said) as refused:
        Yonos(Config.parse({"factors": list(factors)}, where="config"), teacher=teacher, student=teacher)
    assert refused.value.field == "config.factors"


def test_a_teacher_that_does_not_enlarge_is_refused():
    network = NetworkConfig(name="UNet2DModel", args=TINY_NETWORKS["UNet2DModel"])
    plain = build_denoiser(network, parameterisation="v", shape=(1, 16, 16), num_classes=None)
    with pytest.raises(ConfigError, match="does not enlarge pictures") as refused:
        made(plain)
    assert refused.value.field == "teacher"


def tuned(latent_teacher, **config):
    method = made(latent_teacher, **{"factors": (4,), "decoder_steps": 3, **config})
    for role in method.roles:
        getattr(method, role).requires_grad_(role != "student")
    return method


def test_the_decoder_is_tuned_last_to_what_one_step_gives_and_nothing_else_moves(latent_teacher, x0):
    method = tuned(latent_teacher)
    assert method.roles == ("student", "decoder")
    stages = method.stages(method.config, 10)
    assert [(stage.name, stage.steps, stage.roles) for stage in stages] == [
        ("factor_4", 7, ("student",)),
        ("decoder", 3, ("decoder",)),
    ]
    shared = {name: value.clone() for name, value in latent_teacher.codec.named_parameters()}
    optimizer, errors = torch.optim.Adam(method.decoder.parameters(), lr=3e-3), []
    for _ in range(8):
        torch.manual_seed(3)  # the same noise: the error falls for no other reason
        (update,) = method.updates(Batch.of(5, x0), 8)
        assert update.role == "decoder"
        optimizer.zero_grad()
        update.loss.backward()
        optimizer.step()
        errors.append(float(update.loss.detach()))
    assert method.student.decode(method.one_step(x0)).shape == x0.shape
    assert errors[-1] < 0.97 * errors[0]
    assert all(value.grad is None for value in method.student.parameters())
    for name, value in latent_teacher.codec.named_parameters():
        assert torch.equal(value, shared[name]), "the teacher decodes as before"


def test_with_a_weight_a_critic_learns_beside_the_decoder(latent_teacher, x0):
    method = tuned(latent_teacher, gan_weight=0.3)
    torch.manual_seed(3)
    first, second = method.updates(Batch.of(5, x0), 8)
    assert (first.role, second.role) == ("decoder", "critic")
    torch.manual_seed(3)
    (plain,) = tuned(latent_teacher).updates(Batch.of(5, x0), 8)
    assert float(first.metrics["decoder_error"]) == pytest.approx(float(plain.loss.detach()), abs=1e-6)
    assert float((first.loss - plain.loss).detach()) > 0.03
    second.loss.backward()
    assert all(value.grad is None for value in method.decoder.parameters())


def test_a_tuned_decoder_is_saved_with_the_student(latent_teacher, tmp_path):
    method = tuned(latent_teacher)
    with torch.no_grad():
        method.decoder.conv_out.bias += 0.2
    method.student.save(tmp_path)
    x0 = torch.randn(2, 2, 8, 8)
    loaded = load_denoiser(tmp_path)
    torch.testing.assert_close(loaded.decode(x0), method.student.decode(x0).detach(), rtol=0, atol=1e-5)
    assert (loaded.decode(x0) - latent_teacher.decode(x0)).abs().mean() > 0.1


def test_a_student_without_a_decoder_of_its_own_cannot_tune_one(teacher):
    with pytest.raises(ConfigError, match="this student has none") as refused:
        made(teacher, decoder_steps=2)
    assert refused.value.field == "config.decoder_steps"


def test_a_run_on_latents_ends_with_its_decoder_and_begins_again_inside_that_stage(context, tmp_path):
    codec = {"block_out_channels": [8, 8], "latent_channels": 2, "norm_num_groups": 4}
    small = {"name": "UNet2DModel", "args": TINY_NETWORKS["UNet2DModel"]}
    data = {"name": "cluttered_digits", "size": 16, "split": "test"}
    latents = {"config": {"warmup_steps": 1, "codec": codec, "factor": 2}, "network": small, "data": data}
    pretrained = tiny_trainer("latent_diffusion_objects", context, tmp_path / "teacher", **latents)
    pretrained.train()
    pretrained.method.teacher.save(tmp_path / "model")
    changes = {
        "steps": 4,
        "teacher": {"path": str(tmp_path / "model")},
        "config": {"factors": [4], "decoder_steps": 2, "gan_weight": 0.1},
    }
    straight = tiny_trainer("yonos", context, tmp_path / "straight", **changes)
    straight.train()
    polls = iter([False, False, False, True])
    assert tiny_trainer("yonos", context, tmp_path / "again", **changes).train(lambda: next(polls)).stopped
    again = tiny_trainer("yonos", context, tmp_path / "again", **changes)
    again.resume()
    assert (again.step, again.method.student.cond.factor) == (3, 4)
    again.train()
    for role in ("student", "decoder", "critic"):
        ends = (getattr(one.method, role).state_dict() for one in (straight, again))
        for (name, value), other in zip(next(ends).items(), next(ends).values(), strict=True):
            assert torch.equal(value, other), f"{role}: {name}"
    first = pretrained.method.teacher.codec.decoder.state_dict()
    assert any(
        not torch.equal(value, first[name]) for name, value in again.method.decoder.state_dict().items()
    )
