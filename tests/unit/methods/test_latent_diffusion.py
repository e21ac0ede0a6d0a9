"""Latent diffusion: the codec's loss, its phases, and latents of unit deviation that a saved model keeps."""

import pytest
import torch

from distill_core.data.coloured_objects import ColouredObjects
from distill_core.data.conditions import Classes
from distill_core.errors import ConfigError
from distill_core.kinds.loading import load_model
from distill_core.methods.pretrain.latent_diffusion import LatentDiffusion, codec_loss
from distill_core.recipe.tables import NetworkConfig
from tests.helpers import entered

CODEC = {"block_out_channels": [8, 8], "norm_num_groups": 4, "mid_block_add_attention": False}
NETWORK = NetworkConfig(
    name="DiTTransformer2DModel",
    args={"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2},
)


@pytest.fixture(scope="module")
def data():
    return ColouredObjects(ColouredObjects.Config(count=40, size=16))


def build(data, **changes):
    torch.manual_seed(0)
    config = LatentDiffusion.Config.parse({"codec": CODEC, "warmup_steps": 2, **changes})
    return LatentDiffusion(config, network=NETWORK, data=data)


def batch(data):
    return data.batch(8, epoch_seed=0, position=0)


def test_the_codec_s_loss_is_its_error_and_the_divergence_from_unit_noise(data):
    codec, x = build(data).codec, batch(data).x0
    torch.manual_seed(1)
    loss, error = codec_loss(codec, x, 0.5)
    torch.manual_seed(1)
    posterior = codec.encode(x).latent_dist
    z = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
    torch.testing.assert_close(error, (codec.decode(z).sample - x).abs().mean())
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(
        loss - error, 0.5 * kl.sum(dim=(1, 2, 3)).mean() / x[0].numel(), rtol=1e-4, atol=1e-6
    )


def test_the_codec_learns_first_and_the_denoiser_then_on_latents_of_unit_deviation(data):
    method = build(data)
    roles = [
        [update.role for update in entered(method, step).updates(batch(data), step)] for step in (0, 1, 2, 3)
    ]
    assert roles == [["codec"], ["codec"], ["teacher"], ["teacher"]]
    assert method.teacher.image.channels == 4
    assert method.teacher.image.picture == (3, 16, 16)
    latents = method.teacher.encode(data.all().x0)
    assert latents.shape == (40, 4, 8, 8)
    assert float(latents.detach().std()) == pytest.approx(1, rel=1e-4)


def test_the_denoiser_s_loss_does_not_reach_the_codec(data):
    method = build(data)
    update = next(entered(method, 2).updates(batch(data), 2))
    gradients = torch.autograd.grad(update.loss, list(method.codec.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in gradients)


def test_the_scale_is_kept_on_disk_and_over_a_restart(data, tmp_path):
    method = build(data)
    next(entered(method, 2).updates(batch(data), 2))
    resumed = build(data)
    resumed.codec.load_state_dict(method.codec.state_dict())
    resumed.load_state(method.state())
    x = batch(data).x0
    torch.testing.assert_close(resumed.teacher.encode(x), method.teacher.encode(x))
    method.main.save(tmp_path)
    loaded = load_model(tmp_path)
    torch.testing.assert_close(loaded.encode(x), method.teacher.encode(x))
    torch.testing.assert_close(loaded.decode(loaded.encode(x)).shape, x.shape)
    assert loaded.cond.class_names == ("red", "blue")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": {**CODEC, "block_out_channels": [8] * 6}}, "do not divide by the codec's factor 32"),
        ({"codec": {**CODEC, "norm_num_groups": 3}}, "refused by AutoencoderKL"),
        ({"codec": {**CODEC, "colour": 3}}, "refused by AutoencoderKL"),
    ],
)
def test_a_codec_that_does_not_fit_is_refused(data, changes, message):
    with pytest.raises(ConfigError, match=message):
        build(data, **changes)


def test_data_without_pictures_are_refused():
    with pytest.raises(ConfigError, match="no pictures to learn from"):
        build(Classes(Classes.Config(num_classes=2)))
