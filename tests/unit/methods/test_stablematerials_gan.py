"""StableMaterials' adversarial term: what it moves, what it must not, and that without it the training is plain."""

from __future__ import annotations

import copy

import pytest
import torch

from distill_core.artifacts import CondSpec, ImageSpec, SamplerSpec
from distill_core.data import build_source
from distill_core.data.source import ArrayPixels, Source
from distill_core.diffusion.levels import expand
from distill_core.errors import ConfigError, DataError
from distill_core.methods.diffusion.stablematerials_gan import StableMaterialsGAN
from distill_core.methods.pretrain.flow_matching import FlowMatching
from distill_core.metrics.texture import seam_ratio
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.networks.generation import generate
from distill_core.networks.tileable import untiled
from distill_core.recipe.tables import EvaluateConfig, NetworkConfig
from tests.oracles import AffineDenoiser

FAMILIES = ("checks", "dots")
UNET = NetworkConfig(
    name="UNet2DModel",
    args={
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D"] * 2,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    },
)
ANNOTATED = {"name": "textures", "kind": "materials", "size": 8, "families": FAMILIES, "only": ["checks"]}
PICTURES = {"kind": "rgb", "only": []}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def build(student: Denoiser | None = None, data: dict = ANNOTATED, **config: object) -> StableMaterialsGAN:
    source = build_source(data)
    if student is None:
        student = build_denoiser(UNET, parameterisation="flow", shape=source.shape, num_classes=2)
    config = {"unannotated": PICTURES, "width": 8, **config}
    return StableMaterialsGAN(StableMaterialsGAN.Config.parse(config), student=student, data=source)


def steps(method, role, count):
    """`count` steps of Adam on `role`, seeded by step as the loop does it; what the role ends as."""
    module = getattr(method, role)
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    data = build_source(ANNOTATED)
    for step in range(count):
        torch.manual_seed(step)
        for update in method.updates(data.batch(8, epoch_seed=0, position=step), step):
            update.loss.backward(inputs=list(module.parameters()))
            optimizer.step()
            optimizer.zero_grad()
    return module.state_dict()


@pytest.mark.parametrize("tileable", [False, True])
def test_without_the_adversarial_term_it_is_flow_matching_bit_for_bit(tileable):
    plain = FlowMatching(FlowMatching.Config(), network=UNET, data=build_source(ANNOTATED))
    method = build(copy.deepcopy(plain.teacher), gan_weight=0.0, tileable=tileable)
    expected, found = steps(plain, "teacher", 3), steps(method, "student", 3)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


class OneStep(AffineDenoiser):
    """A generator with a mean for each of two classes: x0 = m_c + s x / sigma."""

    def __init__(self) -> None:
        super().__init__(0.0, 0.2)
        self.mean = torch.nn.Parameter(torch.tensor([-0.5, -0.5]))
        self.image = ImageSpec(channels=1, height=8, width=8, picture=(1, 8, 8))
        self.cond = CondSpec(kind="class_label", num_classes=2, null_label=2)

    def null_cond(self, batch):
        return {"class_label": torch.full((batch,), 2)}

    def forward(self, x_sigma, sigma, cond=None):
        return expand(self.mean[cond["class_label"]], x_sigma) + 0.2 * x_sigma / expand(sigma, x_sigma)


@pytest.mark.slow
@pytest.mark.parametrize(("gan_weight", "expected"), [(1.0, 0.6), (0.0, -0.5)])
def test_a_class_that_only_pictures_show_is_learned_from_them(gan_weight, expected):
    data = {**ANNOTATED, "kind": "grey"}
    method = build(OneStep(), data, gan_weight=gan_weight, unannotated={"only": ["dots"]}, label_dropout=0.0)
    pixels = ArrayPixels(0.6 + 0.2 * torch.randn(512, 1, 8, 8))
    labels = torch.ones(512, dtype=torch.long)
    method.pictures = Source(data_config(), size=512, pixels=pixels, labels=labels, class_names=FAMILIES)
    roles = ("discriminator", "student")
    parameters = {role: list(getattr(method, role).parameters()) for role in roles}
    optimizers = {role: torch.optim.Adam(parameters[role], 0.01, betas=(0.0, 0.99)) for role in roles}
    batches = build_source(data)
    for step in range(250):
        for update in method.updates(batches.batch(32, epoch_seed=0, position=step), step):
            update.loss.backward(inputs=parameters[update.role])
            optimizers[update.role].step()
            optimizers[update.role].zero_grad()
    assert method.student.mean[1].item() == pytest.approx(expected, abs=0.15)


def data_config():
    return build_source(ANNOTATED).config


def recorded(module):
    """Inputs of every later call, and whether gradients were on."""
    calls = []
    module.register_forward_pre_hook(
        lambda _, given: calls.append(
            (*(part for part in given if part is not None), torch.is_grad_enabled())
        )
    )
    return calls


def test_the_discriminator_sees_noised_pictures_of_the_channels_that_pictures_have():
    method = build()
    calls = recorded(method.discriminator)
    clean = torch.zeros(64, 3, 8, 8)
    method.logits(clean, {"class_label": torch.zeros(64, dtype=torch.long)})
    x_sigma, sigma, *_ = calls[-1]
    assert (x_sigma / expand(sigma, x_sigma)).std() == pytest.approx(1, abs=0.03)
    assert sigma.log().mean() == pytest.approx(-1.2, abs=0.5)
    for _ in method.updates(build_source(ANNOTATED).all(4), 0):
        pass
    assert all(call[0].shape[1] == 3 for call in calls)


def test_of_the_maps_only_the_pictures_channels_are_judged_and_as_much_as_the_weight_says():
    student = build().student
    x0, batch, gradients = torch.randn(4, 8, 8, 8, requires_grad=True), build_source(ANNOTATED).all(4), []
    for weight in (0.1, 0.3):
        torch.manual_seed(0)
        method = build(student, gan_weight=weight)
        method.generate = lambda cond, count: x0
        *_, last = method.updates(batch, 0)
        gradients += torch.autograd.grad(last.loss, x0)
    assert gradients[0][:, :3].abs().min() > 0
    assert gradients[0][:, 3:].abs().max() == 0
    assert torch.allclose(3 * gradients[0], gradients[1])


def test_the_discriminators_own_update_does_not_reach_the_student():
    method = build()
    first = next(method.updates(build_source(ANNOTATED).all(4), 0))
    assert first.role == "discriminator"
    first.loss.backward()
    assert all(p.grad is None for p in method.student.parameters())


def test_only_the_last_call_of_the_simulated_sampling_is_trained():
    method = build(levels=(10.0, 1.0, 0.3))
    calls, answers = recorded(method.student), []
    method.student.register_forward_hook(lambda *given: answers.append(given[-1]))
    lengths = set()
    for _ in range(12):
        calls.clear()
        answers.clear()
        method.generate({"class_label": torch.tensor([0, 1] * 16)}, 32)
        lengths.add(len(calls))
        sigmas = [round(float(call[1][0]), 3) for call in calls]
        assert sigmas == [10.0, 1.0, 0.3][: len(calls)]
        assert [call[-1] for call in calls] == [False] * (len(calls) - 1) + [True]
        assert calls[0][0].std() == pytest.approx(11, rel=0.1), (
            "flow: 1 + sigma times unit noise is pure noise"
        )
        for (x_sigma, sigma, *_), x0 in zip(calls[1:], answers):
            assert ((x_sigma - x0) / expand(sigma, x0)).std() == pytest.approx(1, rel=0.1)
    assert lengths == {1, 2, 3}


def test_the_student_ends_as_a_generator_of_as_many_steps():
    method = build(levels=(10.0, 1.0))
    assert method.student.sampler == SamplerSpec.few_step((10.0, 1.0), noise_scale=11.0)


def test_seams_are_measured_as_published_plain_and_rolled():
    config = EvaluateConfig(num_samples=16)
    method = build(tileable=True, label_dropout=0.0, rolling={"wrap": False})
    steps(method, "student", 1)
    figures = method.figures(config)
    real = method.pictures.all(16)
    made = generate(method.student, real.cond, 16)[:, :3]
    assert figures["seam_ratio"] == pytest.approx(seam_ratio(made))
    assert figures["plain_seam_ratio"] != figures["seam_ratio"]
    assert figures["rolled_seam_ratio"] == figures["plain_seam_ratio"], "rolling is off"
    assert figures["rolled_texture_distance"] == figures["plain_texture_distance"]
    wrapped = build(untiled(method.student), tileable=True, rolling={"amplitude": 8}).figures(config)
    assert wrapped["rolled_seam_ratio"] == pytest.approx(figures["seam_ratio"], rel=1e-3)
    assert set(build().figures(config)) == {"seam_ratio", "texture_distance"}


def test_a_tileable_student_is_saved_as_one_and_shares_its_weights_with_the_bordered_one(tmp_path):
    method = build(tileable=True)
    assert method.student.image.tileable
    assert not method.bordered.image.tileable
    assert {id(p) for p in method.bordered.parameters()} == {id(p) for p in method.student.parameters()}
    assert [name for name, _ in method.named_children()] == ["student", "discriminator"]
    method.main.save(tmp_path)
    assert load_denoiser(tmp_path).image.tileable


@pytest.mark.parametrize(
    ("config", "error", "sentence"),
    [
        ({"unannotated": {}}, ConfigError, "nothing says what un-annotated pictures are"),
        ({"unannotated": {"size": 16}}, DataError, r"pictures are \(8, 16, 16\), the maps \(8, 8, 8\)"),
        ({"unannotated": {"families": ["checks", "noise"]}}, DataError, "of the classes .*'noise'"),
        ({"unannotated": {"kin": "rgb"}}, ConfigError, "unknown key data.kin"),
        ({"levels": (2000.0, 1.0)}, ConfigError, "level 2000 is above the student's highest, 999"),
        ({"levels": (1.0, 2.0)}, ConfigError, "strictly descending"),
        ({"levels": (2.0, 2.0)}, ConfigError, "strictly descending"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_it_begins(config, error, sentence):
    with pytest.raises(error, match=sentence):
        build(**config)


def test_more_channels_than_the_maps_have_are_refused():
    with pytest.raises(DataError, match="may have fewer channels"):
        build(data={**ANNOTATED, "kind": "rgb"}, unannotated={"kind": "materials"})
