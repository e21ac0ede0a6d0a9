"""MSD: one part is DMD2 bit for bit; several parts are as many distillations, each with its own fake score."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill_core.artifacts import CondSpec
from distill_core.data import build_source
from distill_core.data.pairs import PairBatch
from distill_core.diffusion.levels import expand
from distill_core.errors import ConfigError
from distill_core.method import Batch, Method
from distill_core.methods.diffusion.dmd2 import DMD2
from distill_core.methods.diffusion.msd import MSD
from distill_core.networks.diffusers_denoiser import DiffusersDenoiser
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.networks.routed import RoutedDenoiser
from distill_core.recipe.tables import EvaluateConfig, NetworkConfig
from tests.helpers import tiny_text_to_image
from tests.oracles import AffineDenoiser, Pusher

MEANS, STD = (-0.7, 0.2, 0.6), 0.3


class ThreeGaussians(AffineDenoiser):
    """A Gaussian of its own mean for each of three classes, exactly denoised."""

    def __init__(self) -> None:
        super().__init__(0.0, STD)
        self.means = torch.nn.Parameter(torch.tensor(MEANS))
        self.cond = CondSpec(kind="class_label", num_classes=3)

    def forward(self, x_sigma, sigma, cond=None):
        mean = expand(self.means[cond["class_label"]], x_sigma)
        variance = (2 * self.log_std).exp()
        return mean + (x_sigma - mean) * variance / (variance + expand(sigma, x_sigma) ** 2)


class Labels:
    """Data of three classes."""

    num_classes, size, shape = 3, 3, None


def gaussians(**config: object) -> MSD:
    """Experts that know no class: each can make one Gaussian only."""
    settings = {"levels": (5.0,), "parts": 3, **config}
    teacher = ThreeGaussians().requires_grad_(False)
    return MSD(MSD.Config(**settings), teacher=teacher, student=Pusher(0.0, 1.0), data=Labels())


def optimise(method: Method, batches: list[Batch], *, lr: float = 0.02, decay: bool = True) -> None:
    parameters = {
        role: [p for p in getattr(method, role).parameters() if p.requires_grad] for role in method.roles
    }
    optimizers = {role: torch.optim.Adam(values, lr, (0.0, 0.99)) for role, values in parameters.items()}
    for step, batch in enumerate(batches):
        for update in method.updates(batch, step):
            update.loss.backward(inputs=parameters[update.role])
            for group in optimizers[update.role].param_groups:
                group["lr"] = lr * (1 - step / len(batches)) if decay else lr
            optimizers[update.role].step()
            optimizers[update.role].zero_grad()


def labelled(labels: Tensor) -> Batch:
    return Batch.of(len(labels), None, {"class_label": labels})


@pytest.mark.slow
def test_each_expert_recovers_the_distribution_of_its_own_part():
    torch.manual_seed(0)
    method = gaussians()
    optimise(method, [labelled(torch.randint(3, (192,))) for _ in range(250)])
    found = [expert.mean.item() for expert in method.student.experts]
    assert found == pytest.approx(MEANS, abs=0.05)
    for expert in method.student.experts:
        assert expert.log_std.exp().item() == pytest.approx(STD, abs=0.08)


def test_an_expert_without_items_in_the_batch_does_not_move():
    torch.manual_seed(0)
    method = gaussians()
    before = copy.deepcopy(method)
    optimise(method, [labelled(torch.tensor([0, 2] * 8))] * 2)
    for role in method.roles:
        experts = zip(getattr(method, role).experts, getattr(before, role).experts, strict=True)
        moved = [
            any(not torch.equal(p, q) for p, q in zip(new.parameters(), old.parameters(), strict=True))
            for new, old in experts
        ]
        assert moved == [True, False, True], role


def network(**args: object) -> NetworkConfig:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "patch_size": 4, **args}
    return NetworkConfig(name="DiTTransformer2DModel", args=sizes)


def dit(seed: int = 0, **args: object) -> DiffusersDenoiser:
    torch.manual_seed(seed)
    denoiser = build_denoiser(network(**args), parameterisation="edm", shape=(1, 8, 8), num_classes=10)
    with torch.no_grad():  # a new DiT answers zero whatever it is asked
        for parameter in denoiser.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return denoiser


class DrawnPairs:
    """Pairs of class 3 alone, drawn by the global generator as the real ones are."""

    def draw(self, count: int) -> PairBatch:
        z = torch.randn(count, 1, 8, 8)
        return PairBatch(z, z / 2, {"class_label": torch.full((count,), 3)})


def digits() -> list[Batch]:
    source = build_source({"name": "digits"})
    return [source.batch(16, epoch_seed=0, position=position) for position in range(3)]


def test_one_part_is_dmd2_bit_for_bit():
    settings = {"levels": (5.0, 1.0), "gan_weight": 0.1, "critic_steps": 2, "regression_steps": 1}
    teacher, student = dit(0).requires_grad_(False), dit(1, num_layers=1)
    runs = []
    for cls in (DMD2, MSD):
        torch.manual_seed(2)
        more = {"data": build_source({"name": "digits"})} if cls is MSD else {}
        config = cls.Config(**settings, **({"parts": 1} if cls is MSD else {}))
        method = cls(config, teacher=teacher, student=copy.deepcopy(student), pairs=DrawnPairs(), **more)
        optimise(method, digits(), lr=1e-3, decay=False)
        runs.append(method)
    for role in DMD2.roles:
        plain, routed = (list(getattr(method, role).parameters()) for method in runs)
        assert len(plain) == len(routed) > 0
        assert all(torch.equal(one, other) for one, other in zip(plain, routed, strict=True)), role
    start = list(student.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(runs[1].student.parameters(), start, strict=True))


def classes(pairs: DrawnPairs | None = None, **config: object) -> MSD:
    settings = {"levels": (5.0,), "parts": 5, **config}
    teacher, data = dit(0).requires_grad_(False), build_source({"name": "digits"})
    return MSD(MSD.Config(**settings), teacher=teacher, student=dit(1), data=data, pairs=pairs)


def test_each_expert_has_a_fake_score_and_a_discriminator_of_its_own_from_the_whole_teacher():
    method = classes(gan_weight=0.1, critic_steps=1)
    for fake in method.fake_score.experts:
        pairs = zip(fake.denoiser.parameters(), method.teacher.parameters(), strict=True)
        assert all(torch.equal(own, teachers) for own, teachers in pairs)
    batch = Batch.of(4, torch.zeros(4, 1, 8, 8), {"class_label": torch.tensor([6, 7, 7, 6])})
    fake_update, student_update = method.updates(batch, 0)
    fake_update.loss.backward()
    assert [fake.head.last.weight.grad is not None for fake in method.fake_score.experts] == [
        part == 3 for part in range(5)
    ]
    method.zero_grad()
    student_update.loss.backward(inputs=list(method.student.parameters()))
    reached = [any(p.grad is not None for p in expert.parameters()) for expert in method.student.experts]
    assert reached == [part == 3 for part in range(5)]


def test_every_expert_learns_from_the_pairs_of_all_conditions():
    method = classes(pairs=DrawnPairs(), regression_steps=1)
    (update,) = method.updates(Batch.of(4, None, {"class_label": torch.zeros(4, dtype=torch.long)}), 0)
    update.loss.backward()
    assert all(any(p.grad is not None for p in expert.parameters()) for expert in method.student.experts)


def test_a_routed_student_goes_on_where_it_is_with_the_discriminator_added():
    first = classes()
    with torch.no_grad():
        for part, expert in enumerate(first.student.experts):
            next(expert.parameters()).add_(part)
    data = build_source({"name": "digits"})
    second = MSD(
        MSD.Config(levels=(5.0,), parts=5, gan_weight=0.1),
        teacher=first.teacher,
        student=copy.deepcopy(first.student),
        data=data,
    )
    pairs = zip(second.student.parameters(), first.student.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    with pytest.raises(ConfigError, match="has 5 parts of its own"):
        MSD(MSD.Config(parts=4), teacher=first.teacher, student=first.student, data=data)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"parts": 11}, "10 classes do not make 11 parts"),
        ({"parts": 2, "classes": [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]]}, "lists 1 parts and config.parts is 2"),
        ({"parts": 2, "classes": [[0, 1], [1, 2]]}, "each of 0 to 9 exactly once"),
    ],
)
def test_a_split_that_cannot_be_is_refused_before_training(settings, said):
    with pytest.raises(ConfigError, match=said):
        classes(**settings)


def test_a_teacher_without_conditions_has_one_part():
    teacher = AffineDenoiser(0.0, 1.0)
    with pytest.raises(ConfigError, match="set config.parts = 1"):
        MSD(MSD.Config(parts=2), teacher=teacher, student=Pusher(0.0, 1.0), data=Labels())
    method = MSD(MSD.Config(parts=1), teacher=teacher, student=Pusher(0.0, 1.0), data=Labels())
    assert [update.role for update in method.updates(Batch.of(4), 0)] == ["fake_score"] * 5 + ["student"]


def test_prompts_are_split_by_their_embeddings_and_each_expert_sees_its_own(tmp_path: Path):
    teacher = load_denoiser(tiny_text_to_image(tmp_path / "pipeline")).requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    source = build_source({"name": "prompts", "prompts": ["aa", "ab", "ba", "xx", "xy", "zz", "zx", "b"]})
    source.encode_with(teacher.encode_prompts)
    config = MSD.Config(parts=2, critic_steps=1, levels=(5.0,))
    method = MSD(config, teacher=teacher, student=student, data=source, seed=1)
    batch = source.batch(8, epoch_seed=0, position=0)
    parts = method.student.partition.route(batch.cond, 8)
    assert parts.bincount(minlength=2).tolist() == [4, 4]
    optimise(method, [batch], lr=1e-3)
    assert isinstance(method.student, RoutedDenoiser)
    again = MSD(config, teacher=teacher, student=copy.deepcopy(teacher), data=source, seed=1)
    assert torch.equal(again.student.partition.route(batch.cond, 8), parts)


def test_the_size_of_an_expert_is_told():
    figures = classes().figures(EvaluateConfig())
    assert figures["expert_share"] == 1.0
    assert figures["expert_parameters"] == sum(p.numel() for p in dit().parameters())
