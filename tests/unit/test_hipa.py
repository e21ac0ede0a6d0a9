"""HiPA against an exact oracle: a Gaussian teacher, whose ODE is an affine map of the noise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distill_core.artifacts import ImageSpec
from distill_core.data import build_source
from distill_core.data.pairs import Pairs, build_pairs
from distill_core.errors import ConfigError
from distill_core.losses.frequency import high_frequency_distance
from distill_core.method import Batch
from distill_core.methods.diffusion.hipa import HiPA
from distill_core.networks.adapters import LoraDenoiser
from distill_core.networks.classifier import Classifier, ClassifierConfig
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.recipe.tables import EvaluateConfig, LoraConfig, NetworkConfig, PairsConfig
from tests.oracles import AffineDenoiser, Pusher

MEAN, STD, LEVEL = 0.3, 0.25, 10.0
SCALE = STD / (STD**2 + LEVEL**2) ** 0.5  # of the ODE from LEVEL down to 0
CLASSES = build_source({"name": "classes", "num_classes": 10})


def sized(denoiser: AffineDenoiser) -> AffineDenoiser:
    denoiser.image = ImageSpec(channels=1, height=8, width=8, picture=(1, 8, 8))
    return denoiser


def exact_pairs(folder, count: int = 160) -> Pairs:
    teacher = sized(AffineDenoiser(MEAN, STD))
    return build_pairs(teacher, CLASSES, PairsConfig(count=count, num_steps=64), folder)


def gaussian(folder, student=None, **config: object) -> HiPA:
    teacher = sized(AffineDenoiser(MEAN, STD)).requires_grad_(False)
    student = student or sized(Pusher(-0.5, 1.0))
    values = {"held_out": 32, **config}
    return HiPA(HiPA.Config.parse(values), teacher=teacher, student=student, pairs=exact_pairs(folder))


def adapter(folder, extractor=None, **config: object) -> HiPA:
    """A method around low-rank factors over a small class-conditional teacher."""
    torch.manual_seed(0)
    args = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 8}
    network = NetworkConfig(name="DiTTransformer2DModel", args=args)
    teacher = build_denoiser(network, parameterisation="edm", shape=(1, 8, 8), num_classes=10)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    teacher.requires_grad_(False)
    student = LoraDenoiser(teacher, LoraConfig(rank=2, alpha=2.0, targets="all-linear"))
    pairs = build_pairs(teacher, CLASSES, PairsConfig(count=48, num_steps=2), folder)
    values = {"held_out": 8, **config}
    return HiPA(HiPA.Config.parse(values), teacher=teacher, student=student, pairs=pairs, extractor=extractor)


def trace(method: HiPA, steps: int, loss_of=None) -> list[torch.Tensor]:
    """Losses of a short training, then the factors."""
    optimizer = torch.optim.SGD(method.student.parameters(), 0.5)
    seen = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = loss_of(method) if loss_of else next(method.updates(Batch.of(8), step)).loss
        loss.backward(inputs=list(method.student.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.detach())
    return [*seen, *(parameter.detach() for parameter in method.student.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize("hf_weight", [0.0, 0.3])
def test_the_student_becomes_the_teachers_ode(tmp_path, hf_weight):
    method = gaussian(tmp_path, hf_weight=hf_weight)
    parameters = list(method.student.parameters())
    optimizer = torch.optim.Adam(parameters, 0.1)
    for step in range(200):
        (update,) = method.updates(Batch.of(64), step)
        update.loss.backward(inputs=parameters)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 200)
        optimizer.step()
        optimizer.zero_grad()
    assert method.student.mean.item() == pytest.approx(MEAN - MEAN * SCALE, abs=0.01)
    assert method.student.log_std.exp().item() == pytest.approx(LEVEL * SCALE, abs=0.01)


def test_a_weight_of_zero_is_bit_identical_to_plain_regression(tmp_path):
    def regression(method: HiPA) -> torch.Tensor:
        pairs = method.pairs.at(torch.randint(40, (8,)))
        sigma = torch.full((8,), method.teacher.sampler.sigma_max)
        return F.mse_loss(method.student(pairs.z * sigma[0], sigma, pairs.cond), pairs.x0)

    plain = trace(adapter(tmp_path), 3, regression)
    assert all(torch.equal(a, b) for a, b in zip(plain, trace(adapter(tmp_path, hf_weight=0.0), 3)))
    assert not torch.equal(plain[-1], trace(adapter(tmp_path, hf_weight=0.5), 3)[-1])


def test_without_a_weight_both_terms_begin_equal_and_the_weight_then_stays(tmp_path):
    method = adapter(tmp_path)
    trace(method, 1)
    weight = method.state()["hf_weight"].clone()
    fresh = adapter(tmp_path)
    spatial, high = fresh.distances(fresh.pairs.at(torch.arange(40)))
    assert (weight * high / spatial).item() == pytest.approx(1, rel=1e-5)
    trace(method, 2)
    assert torch.equal(method.state()["hf_weight"], weight)
    resumed = adapter(tmp_path)
    trace(resumed, 1)
    resumed.load_state({"hf_weight": torch.tensor(7.0)})
    torch.manual_seed(0)
    spatial, high = resumed.distances(resumed.pairs.at(torch.randint(40, (8,))))
    torch.manual_seed(0)
    (update,) = resumed.updates(Batch.of(8), 1)
    torch.testing.assert_close(update.loss, spatial + 7.0 * high)


def test_held_out_pairs_are_never_drawn_and_alone_are_measured(tmp_path, monkeypatch):
    method = gaussian(tmp_path)
    drawn = []
    at = method.pairs.at
    monkeypatch.setattr(method.pairs, "at", lambda indices: drawn.append(indices) or at(indices))
    for step in range(20):
        list(method.updates(Batch.of(64), step))
    assert max(indices.max() for indices in drawn) < 128
    drawn.clear()
    method.figures(EvaluateConfig(batch_size=10))
    assert torch.cat(drawn).tolist() == list(range(128, 160))


class Decoded(Pusher):
    """A latent model: the picture is three times its x0."""

    def decode(self, x0):
        return 3 * x0


def test_both_terms_look_at_decoded_pictures(tmp_path):
    student = sized(Decoded(0.0, 1.0))
    method = gaussian(tmp_path, student, hf_weight=0.5)
    method.teacher.decode = lambda x0: 3 * x0
    pairs = method.pairs.at(torch.arange(16))
    x0 = student(pairs.z * LEVEL, torch.full((16,), LEVEL))
    spatial, high = method.distances(pairs)
    torch.testing.assert_close(spatial, F.mse_loss(3 * x0, 3 * pairs.x0))
    torch.testing.assert_close(high, high_frequency_distance(3 * x0, 3 * pairs.x0))


def test_the_noise_is_scaled_as_the_students_sampler_says_and_likeness_is_a_mean_over_pairs(tmp_path):
    method = gaussian(tmp_path, sized(Pusher(0.1, 2.0)))
    method.student.sampler = method.student.sampler.model_copy(update={"noise_scale": 4.0})
    pairs = method.pairs.at(torch.arange(128, 160))
    pictures, _ = method.pictures(pairs)
    torch.testing.assert_close(pictures, 0.1 + 2.0 * 4.0 * pairs.z / LEVEL)
    errors = ((pictures.clamp(-1, 1) - pairs.x0.clamp(-1, 1)) / 2).square().mean((1, 2, 3))
    found = method.figures(EvaluateConfig(batch_size=7))["pair_psnr"]
    assert found == pytest.approx((-10 * errors.log10()).mean().item(), rel=1e-4)


def test_figures_of_a_perfect_student_and_of_one_that_blurs(tmp_path):
    exact = gaussian(tmp_path, sized(Pusher(MEAN - MEAN * SCALE, LEVEL * SCALE)))
    found = exact.figures(EvaluateConfig())
    assert found["high_frequency_ratio"] == pytest.approx(1, abs=0.01)
    assert found["pair_psnr"] > 45
    assert found["trained_share"] == 1
    blurred = gaussian(tmp_path, sized(Pusher(MEAN - MEAN * SCALE, LEVEL * SCALE * 0.6))).figures(
        EvaluateConfig()
    )
    assert blurred["high_frequency_ratio"] == pytest.approx(0.36, abs=0.01)
    assert blurred["pair_psnr"] < 30


def test_only_the_factors_are_trained_and_their_share_is_told(tmp_path):
    method = adapter(tmp_path)
    before = [parameter.clone() for parameter in method.teacher.parameters()]
    trace(method, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, method.teacher.parameters()))
    trained = sum(p.numel() for p in method.student.parameters())
    share = method.figures(EvaluateConfig())["trained_share"]
    assert share == pytest.approx(trained / sum(p.numel() for p in method.teacher.parameters()))
    assert method.student.sampler.sigmas == (method.teacher.sampler.sigma_max,)


def test_the_spatial_term_can_be_what_a_classifier_sees(tmp_path):
    reader = Classifier(ClassifierConfig(shape=(1, 8, 8), num_classes=3, width=8))
    method = adapter(tmp_path, reader, spatial="features", hf_weight=0.0)
    pairs = method.pairs.at(torch.arange(8))
    pictures, targets = method.pictures(pairs)
    spatial, _ = method.distances(pairs)
    assert torch.equal(spatial, method.features(pictures, targets))
    assert not torch.isclose(spatial, F.mse_loss(pictures, targets))
    trace(method, 1)
    with pytest.raises(ConfigError, match=r"set \[extractor\]"):
        adapter(tmp_path, spatial="features")


def test_pairs_are_needed_and_more_than_are_held_out(tmp_path):
    teacher = sized(AffineDenoiser(MEAN, STD))
    with pytest.raises(ConfigError, match=r"add a \[pairs\] table"):
        HiPA(HiPA.Config(), teacher=teacher, student=sized(Pusher(0.0, 1.0)))
    with pytest.raises(ConfigError, match="more than the 160 that are held out"):
        gaussian(tmp_path, held_out=160)
