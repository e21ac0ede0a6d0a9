"""SwiftBrush and PG-SB against exact oracles: teachers of one and of two Gaussians, whose scores have closed forms."""

from __future__ import annotations

import copy

import pytest
import torch

from distill_core.artifacts import CondSpec
from distill_core.diffusion.levels import expand
from distill_core.errors import ConfigError
from distill_core.losses.matching import eps_direction
from distill_core.method import Batch
from distill_core.methods.diffusion.pg_sb import PGSB
from distill_core.methods.diffusion.swiftbrush import SwiftBrush
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.recipe.tables import NetworkConfig
from tests.oracles import AffineDenoiser, Pusher, train

MEAN, STD = 0.6, 0.3
DIT = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 8}


def gaussian(**config: object) -> SwiftBrush:
    torch.manual_seed(0)
    teacher = AffineDenoiser(MEAN, STD).requires_grad_(False)
    values = {"guidance": 1.0, "fake_score": "full", "level": 5.0, **config}
    return SwiftBrush(SwiftBrush.Config.parse(values), teacher=teacher, student=Pusher(-0.5, 1.0))


class TwoClasses(AffineDenoiser):
    """Exact for pictures N(-m, s^2) under label 0 and N(+m, s^2) under 1, both as likely; label 2 is null."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__(mean, std)
        self.cond = CondSpec(kind="class_label", num_classes=2, null_label=2)

    def forward(self, x_sigma, sigma, cond=None):
        noise, variance = expand(sigma, x_sigma) ** 2, (2 * self.log_std).exp()
        label = cond["class_label"]
        posterior = torch.tanh((self.mean * x_sigma / (variance + noise)).flatten(1).sum(1))
        centre = self.mean * expand(torch.where(label == 2, posterior, 2.0 * label - 1), x_sigma)
        return centre + (x_sigma - centre) * variance / (variance + noise)

    def null_cond(self, batch):
        return {"class_label": torch.full((batch,), 2)}


class ClassPusher(TwoClasses):
    """A one-step student on the same interface: x0 = -m + s z or m + s z."""

    def forward(self, x_sigma, sigma, cond=None):
        centre = self.mean * expand(2.0 * cond["class_label"] - 1, x_sigma)
        return centre + self.log_std.exp() * x_sigma / expand(sigma, x_sigma)


def two_classes(cls: type[SwiftBrush] = SwiftBrush, **config: object) -> SwiftBrush:
    """The trained method; its teacher's classes overlap, so that guidance would move them apart."""
    torch.manual_seed(0)
    teacher = TwoClasses(MEAN, 0.6).requires_grad_(False)
    values = {"fake_score": "full", "level": 5.0, "condition_dropout": 0.3, **config}
    method = cls(cls.Config.parse(values), teacher=teacher, student=ClassPusher(0.2, 1.0))
    train(method, 400, cond={"class_label": torch.arange(256) % 2})
    return method


def conditional(cls: type[SwiftBrush] = SwiftBrush, num_classes: int | None = 10, **config: object):
    """A method around a small class-conditional teacher with weights that matter everywhere."""
    torch.manual_seed(0)
    network = NetworkConfig(name="DiTTransformer2DModel", args=DIT)
    teacher = build_denoiser(network, parameterisation="edm", shape=(1, 8, 8), num_classes=num_classes)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    teacher.requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    values = {"lora": {"rank": 2, "alpha": 2.0, "targets": "all-linear"}, **config}
    return cls(cls.Config.parse(values), teacher=teacher, student=student)


def batch(size: int = 8, x0: torch.Tensor | None = None) -> Batch:
    return Batch.of(size, x0, {"class_label": torch.arange(size) % 10})


def trace(method: SwiftBrush, steps: int = 3, x0: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Losses of a short training, with every weight of every role at its end."""
    torch.manual_seed(1)
    optimizers = {r: torch.optim.SGD(getattr(method, r).parameters(), 0.1) for r in method.roles}
    seen = []
    for step in range(steps):
        for update in method.updates(batch(x0=x0), step):
            update.loss.backward(inputs=list(getattr(method, update.role).parameters()))
            optimizers[update.role].step()
            optimizers[update.role].zero_grad()
            seen.append(update.loss.detach())
    return [*seen, *(p.detach() for role in method.roles for p in getattr(method, role).parameters())]


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two))


@pytest.mark.slow
@pytest.mark.parametrize("weight", ["eps_sigma2", "dmd"])
def test_the_student_recovers_the_teachers_mean_and_spread(weight):
    method = gaussian(weight=weight)
    train(method, 500)
    assert method.student.mean.item() == pytest.approx(MEAN, abs=0.05)
    assert method.student.log_std.exp().item() == pytest.approx(STD, abs=0.06)


@pytest.mark.parametrize("weight", ["eps_sigma2", "dmd"])
def test_score_distillation_finds_the_mode_and_loses_the_spread(weight):
    method = gaussian(weight=weight, score="sds")
    train(method, 800)
    assert method.student.mean.item() == pytest.approx(MEAN, abs=0.05)
    assert method.student.log_std.exp().item() < 0.5 * STD


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (SwiftBrush, {"guidance": 1.0}),
        (SwiftBrush, {"guidance": 4.0}),
        (PGSB, {"guidance_min": 0.5, "guidance_max": 4.0}),
    ],
)
def test_under_a_scale_that_both_scores_share_the_optimum_is_the_teacher_without_guidance(cls, config):
    student = two_classes(cls, **config).student
    assert student.mean.item() == pytest.approx(MEAN, abs=0.05)
    assert student.log_std.exp().item() == pytest.approx(0.6, abs=0.06)


@pytest.mark.slow
def test_guidance_of_the_teacher_alone_moves_the_classes_apart():
    assert two_classes(guidance=4.0, fake_guidance=1.0).student.mean.item() > MEAN + 0.15


def test_score_distillation_never_asks_the_fake_score():
    assert [update.role for update in conditional(score="sds").updates(batch(), 0)] == ["student"]


def test_a_step_trains_the_fake_score_as_often_as_asked_and_then_the_student():
    roles = [update.role for update in conditional(fake_steps=3).updates(batch(), 0)]
    assert roles == ["fake_score", "fake_score", "fake_score", "student"]


def test_the_direction_of_the_paper_is_a_difference_of_noise_predictions():
    x_t, fake_x0, teacher_x0 = (torch.randn(3, 1, 2, 2, dtype=torch.double) for _ in range(3))
    sigma = torch.tensor([0.1, 1.0, 8.0], dtype=torch.double)
    alpha, sigma_t = (
        ((1 + sigma**2) ** -0.5).reshape(-1, 1, 1, 1),
        (sigma / (1 + sigma**2) ** 0.5).reshape(-1, 1, 1, 1),
    )
    eps_teacher, eps_fake = ((x_t - alpha * x0) / sigma_t for x0 in (teacher_x0, fake_x0))
    expected = sigma_t**2 * (eps_teacher - eps_fake)
    assert torch.allclose(eps_direction(fake_x0, teacher_x0, sigma), expected)


def test_the_teacher_is_bit_identical_after_training_and_shares_its_weights_with_the_fake_score():
    method = conditional(guidance=3.0)
    before = copy.deepcopy(method.teacher.state_dict())
    trace(method)
    after = method.teacher.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    held = {p.data_ptr() for p in method.fake_score.denoiser.adapted.parameters()}
    assert {p.data_ptr() for p in method.teacher.parameters()} <= held


def test_with_the_adapter_off_the_trained_fake_score_is_the_teacher():
    method = conditional(guidance=3.0)
    trace(method)
    x, sigma, cond = torch.randn(4, 1, 8, 8), torch.tensor([0.1, 1.0, 2.0, 9.0]), batch(4).cond
    with torch.no_grad():
        teacher = method.teacher(x, sigma, cond)
        assert not torch.equal(method.fake_score(x, sigma, cond), teacher)
        with method.fake_score.denoiser.off():
            assert torch.equal(method.fake_score(x, sigma, cond), teacher)


def test_an_untrained_fake_score_says_what_the_teacher_says_so_nothing_moves():
    method = conditional(guidance=3.0)
    x0 = torch.randn(8, 1, 8, 8)
    with torch.no_grad():
        assert not method.direction(x0, batch()).any()


@pytest.mark.parametrize("cls", [SwiftBrush, PGSB])
def test_pictures_are_never_read(cls):
    without = trace(conditional(cls))
    with_pictures = trace(conditional(cls), x0=torch.full((8, 1, 8, 8), float("nan")))
    assert same(without, with_pictures)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_law_of_one_scale_is_bit_identical_to_the_fixed_scale(guidance):
    drawn = conditional(PGSB, guidance_min=guidance, guidance_max=guidance)
    assert same(trace(drawn), trace(conditional(guidance=guidance)))
    wide = conditional(PGSB, guidance_min=guidance, guidance_max=guidance + 1)
    assert not same(trace(wide), trace(drawn))


def test_a_scale_of_its_own_for_the_fake_score_that_is_the_teachers_changes_nothing():
    shared = trace(conditional(guidance=3.0))
    assert same(trace(conditional(guidance=3.0, fake_guidance=3.0)), shared)
    assert not same(trace(conditional(guidance=3.0, fake_guidance=2.0)), shared)


def test_guidance_of_one_is_bit_identical_to_networks_called_without_guidance(monkeypatch):
    guided = trace(conditional(guidance=1.0))
    plain = conditional(guidance=1.0)
    for scorer in (plain.teacher, plain.fake_score):
        monkeypatch.setattr(scorer, "guided", lambda x, sigma, cond, _w, net=scorer: net(x, sigma, cond))
    assert same(trace(plain), guided)


def test_no_condition_dropout_leaves_the_random_stream_alone():
    method = conditional(guidance=1.0, condition_dropout=0.0)
    torch.manual_seed(1)
    method.fake_score_loss(torch.zeros(8, 1, 8, 8), batch())
    after = torch.rand(())
    torch.manual_seed(1)
    torch.rand(8), torch.randn(8, 1, 8, 8)
    assert torch.equal(after, torch.rand(()))


def test_the_scores_are_compared_on_a_part_of_the_grid_and_the_fake_score_learns_all_of_it():
    method, drawn = gaussian(min_level=0.3, max_level=0.7), []
    draw = method.sample_sigma
    method.sample_sigma = lambda *given: drawn.append(draw(*given)) or drawn[-1]
    list(method.updates(Batch.of(2000), 0))
    grid = method.teacher.schedule.sigma_at(torch.tensor([0.0, 1.0, 0.3, 0.7])).tolist()
    ends = [value for sigma in drawn for value in (sigma.min().item(), sigma.max().item())]
    assert ends == pytest.approx(grid, rel=0.05)


def test_the_fake_score_does_not_pull_the_student_and_the_student_starts_from_its_samplers_scale():
    method, seen = gaussian(), []
    method.student.sampler = method.student.sampler.model_copy(update={"noise_scale": 7.0})
    method.student.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].std().item()))
    fake, _ = method.updates(Batch.of(500), 0)
    pulls = torch.autograd.grad(fake.loss, list(method.student.parameters()), allow_unused=True)
    assert pulls == (None, None)
    assert seen == pytest.approx([7.0], rel=0.1)


def test_a_dropped_condition_is_dropped_for_the_whole_batch():
    method = conditional(condition_dropout=1.0)
    seen = []
    method.fake_score.register_forward_pre_hook(lambda _module, args: seen.append(args[2]["class_label"]))
    method.fake_score_loss(torch.zeros(8, 1, 8, 8), batch())
    assert seen[0].tolist() == [10] * 8


def test_both_scores_see_one_draw_of_the_scale_per_sample():
    method = conditional(PGSB, guidance_min=0.5, guidance_max=4.0)
    seen = []
    for scorer in (method.teacher, method.fake_score):
        call = scorer.guided
        scorer.guided = lambda x, s, c, w, call=call: seen.append(w) or call(x, s, c, w)
    with torch.no_grad():
        method.direction(torch.zeros(8, 1, 8, 8), batch())
    teachers, fakes = seen
    assert torch.equal(teachers, fakes)
    assert teachers.shape == (8,)
    assert len(teachers.unique()) == 8
    assert ((teachers >= 0.5) & (teachers <= 4.0)).all()


@pytest.mark.parametrize(
    "config",
    [
        {"guidance": 2.0, "condition_dropout": 0.0},
        {"guidance": 1.0, "fake_guidance": 2.0, "condition_dropout": 0.0},
        {"guidance": 1.0, "condition_dropout": 0.1},
    ],
)
def test_a_teacher_without_a_null_class_is_refused_where_one_is_needed(config):
    method = conditional(guidance=1.0, condition_dropout=0.0)
    method.teacher.cond = method.teacher.cond.model_copy(update={"null_label": None})
    SwiftBrush(method.config, teacher=method.teacher, student=method.student)
    with pytest.raises(ConfigError, match="this model has none"):
        SwiftBrush(SwiftBrush.Config.parse(config), teacher=method.teacher, student=method.student)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: gaussian(guidance=2.0), "needs a conditional teacher"),
        (lambda: gaussian(fake_guidance=2.0), "needs a conditional teacher"),
        (lambda: gaussian(level=11.0), "above the teacher's highest, 10"),
        (lambda: gaussian(min_level=0.5, max_level=0.5), "min_level must be below max_level"),
        (lambda: conditional(lora={"targets": ["to_w"]}), "no layer of .* is called 'to_w'"),
        (lambda: conditional(PGSB, guidance_min=3.0, guidance_max=2.0), "must not be above"),
    ],
)
def test_what_cannot_work_is_said_before_training(make, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make()
