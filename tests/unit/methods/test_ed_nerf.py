"""ED-NeRF: its two phases, what an edit may touch, and that equal words change nothing."""

from dataclasses import replace

import pytest
import torch

from distill_core.data.coloured_objects import ColouredObjects, ColouredObjectScene
from distill_core.data.digits import Digits
from distill_core.errors import ArtifactError, ConfigError
from distill_core.kinds.loading import load_model
from distill_core.method import Batch
from distill_core.methods.radiance.ed_nerf import EDNeRF
from distill_core.networks.diffusers_new import build_codec, build_denoiser, scale_latents
from distill_core.radiance.rendering.quadrature import over
from distill_core.radiance.scenes.latent import LatentScene, latent_rays, load_latent_scene
from distill_core.recipe.tables import EvaluateConfig, NetworkConfig
from tests.helpers import entered, previewed

NETWORK = NetworkConfig(name="hash", args={"levels": 2, "log2_table_size": 10, "max_resolution": 16})
CODEC = {"block_out_channels": [8, 8, 8], "norm_num_groups": 4, "mid_block_add_attention": False}
DIT = NetworkConfig(
    name="DiTTransformer2DModel",
    args={"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2},
)


@pytest.fixture(scope="module")
def data():
    return ColouredObjectScene(ColouredObjectScene.Config(num_views=6, num_test_views=2, size=16))


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    codec = build_codec(CODEC, (3, 16, 16))
    scale_latents(codec, 2.5)
    made = build_denoiser(
        DIT,
        parameterisation="flow",
        shape=(3, 16, 16),
        num_classes=2,
        class_names=("red", "blue"),
        codec=codec,
    )
    for parameter in made.parameters():  # DiT's last layer begins at zero: it would say the same of all words
        torch.nn.init.normal_(parameter, std=0.2)
    codec.requires_grad_(False)
    return made.requires_grad_(False).eval()


def build(teacher, data, **changes):
    torch.manual_seed(1)
    settings = {
        "source": "red",
        "target": "blue",
        "reconstruct_steps": 4,
        "num_steps": 16,
        "grid_resolution": 8,
    }
    method = EDNeRF(EDNeRF.Config.parse(settings | changes), teacher=teacher, network=NETWORK, data=data)
    method.field.config = method.field.config.model_copy(update={"log_density_shift": 2.0})
    return method


def step(method, number, rate=0.05):
    """One step as the loop takes it, by plain gradient descent; the roles that were updated."""
    roles = []
    torch.manual_seed(100 + number)
    for update in entered(method, number).updates(Batch.of(2), number):
        parameters = list(getattr(method, update.role).parameters())
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(update.loss, parameters, allow_unused=True)
        ):
            if gradient is not None:
                parameter.data -= rate * gradient
        roles.append(update.role)
    return roles


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(module, before):
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_latents_are_the_encoder_s_scaled_once_and_linear(teacher, data):
    method = build(teacher, data)
    views = over(data.train.images[..., :3], data.train.images[..., 3:], torch.ones(3))
    codec = teacher.codec.encode(views.permute(0, 3, 1, 2) * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(method.latents, 2.5 * codec)
    assert method.field.config.output == "linear"
    assert method.field.config.channels == 4
    white = teacher.codec.encode(torch.ones(1, 3, 16, 16)).latent_dist.mode()[0]
    torch.testing.assert_close(method.background, 2.5 * white)


def test_rays_go_through_the_centres_of_latent_pixels(data):
    camera = data.train.camera(0)
    rays = latent_rays([camera], (4, 4, 4))
    fine = camera.rays().directions.reshape(4, 4, 4, 4, 3).mean(dim=(1, 3)).reshape(-1, 3)
    torch.testing.assert_close(
        rays.directions, torch.nn.functional.normalize(fine, dim=-1), atol=2e-3, rtol=0
    )
    assert len(latent_rays([camera, camera], (4, 4, 4)).origins) == 32


def test_an_empty_field_shows_the_encoded_background(teacher, data):
    method = build(teacher, data)
    method.field.config = method.field.config.model_copy(update={"log_density_shift": -12.0})
    found = method.rendered(torch.tensor([0, 1]))
    torch.testing.assert_close(found, method.background.expand(2, -1, -1, -1), atol=1e-4, rtol=0)


def test_the_phases_train_field_and_head_and_then_the_field_alone(teacher, data):
    method = build(teacher, data)
    assert [step(method, number) for number in range(4)] == [["field", "head"]] * 4
    head = weights(method.head)
    assert step(method, 4) == ["field"]
    assert same(method.head, head)
    assert same(method.unedited[0].head, head)


def test_the_head_s_loss_reaches_the_field_only_late_in_phase_1(teacher, data):
    def first_update(number, weight):
        method = build(teacher, data, refinement_weight=weight)
        torch.nn.init.normal_(method.head.leave.weight)
        torch.manual_seed(5)
        return float(next(entered(method, number).updates(Batch.of(2), number)).loss.detach())

    assert first_update(1, 1.0) == first_update(1, 9.0)
    assert first_update(2, 1.0) < first_update(2, 9.0)


def test_without_refinement_the_head_stays_the_identity(teacher, data):
    method = build(teacher, data, refinement=False)
    assert step(method, 0) == ["field"]
    latents = torch.randn(1, 4, 4, 4)
    assert torch.equal(method.head(latents), latents)


def trained(method):
    for number in range(5):
        step(method, number)
    return method


def test_equal_words_leave_the_scene_unchanged_bit_for_bit_under_dds_but_not_under_sds(teacher, data):
    for gradient, unchanged in (("dds", True), ("sds", False)):
        method = build(teacher, data, target="red", gradient=gradient)
        for number in range(4):
            step(method, number)
        field = weights(method.field)
        for number in range(4, 8):
            step(method, number)
        assert same(method.field, field) is unchanged, gradient


def test_an_edit_changes_the_scene_and_says_by_how_much(teacher, data):
    method = trained(build(teacher, data))
    assert not same(method.field, weights(method.unedited[0].field))
    figures = method.figures(EvaluateConfig())
    assert set(figures) == {"decoded_psnr", "change", "colour_moved", "background_psnr"}
    assert figures["change"] > 0
    assert previewed(method, method.data).shape == (2, 3, 16, 16)


def test_outside_the_box_the_direction_is_gone_and_changes_are_pulled_back(teacher, data):
    nowhere = [-1.0, -1.0, -1.0, -0.99, -0.99, -0.99]
    method = build(teacher, data, box=nowhere)
    for number in range(4):
        step(method, number)
    field = weights(method.field)
    step(method, 4)
    assert same(method.field, field)  # the mask is empty and nothing has moved yet
    method.field.table.data += 0.3
    torch.manual_seed(9)
    moved = next(method.updates(Batch.of(2), 5)).loss
    kept = build(teacher, data, box=nowhere, keep_weight=0.0)
    kept.load_state(method.state())
    kept.field.load_state_dict(method.field.state_dict())
    kept.head.load_state_dict(method.head.state_dict())
    torch.manual_seed(9)
    assert float(moved.detach()) > float(next(kept.updates(Batch.of(2), 5)).loss.detach()) == 0.0


def test_the_mask_is_where_the_box_s_content_is_seen(teacher, data):
    method = build(teacher, data)
    rays = method.rays(torch.tensor([0]))
    scene = method.scene()
    everything = scene.inside((-1.0,) * 3 + (1.0,) * 3, rays, scene.march(rays))
    half = scene.inside((-1.0, -1, -1, 1, 0, 1), rays, scene.march(rays))
    assert everything.shape == (1, 1, 4, 4)
    assert everything.sum() > half.sum() > 0


def test_a_resumed_edit_has_its_source_again(teacher, data):
    one = trained(build(teacher, data))
    two = build(teacher, data)
    two.field.load_state_dict(one.field.state_dict())
    two.head.load_state_dict(one.head.state_dict())
    two.load_state({name: value.clone() for name, value in one.state().items()})
    assert same(two.unedited[0], weights(one.unedited[0]))
    for method in (one, two):
        step(method, 5)
    assert same(two.field, weights(one.field))
    early = build(teacher, data)
    early.load_state(early.state())
    assert early.unedited == []


def test_a_saved_scene_decodes_to_the_same_pictures(teacher, data, tmp_path):
    method = trained(build(teacher, data))
    method.main.save(tmp_path)
    loaded = load_model(tmp_path)
    assert isinstance(loaded, LatentScene)
    camera = data.test.camera(0)
    torch.testing.assert_close(loaded.picture(camera), method.scene().picture(camera, teacher.decode))
    (tmp_path / "vae" / "config.json").unlink()
    with pytest.raises(ArtifactError, match="lacks vae/"):
        load_latent_scene(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ArtifactError, match="missing or damaged"):
        load_latent_scene(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "bleu"}, "config.target = 'bleu' is no class of the teacher; did you mean 'blue'"),
        ({"min_level": 0.9, "max_level": 0.5}, "min_level must be below"),
        ({"box": [0.0, 0, 0, -1, 1, 1]}, "each least must be below"),
    ],
)
def test_a_wrong_setting_says_what_is_allowed(teacher, data, changes, message):
    with pytest.raises(ConfigError, match=message):
        build(teacher, data, **changes)


def test_data_that_do_not_fit_are_refused(teacher):
    with pytest.raises(ConfigError, match="posed images"):
        build(teacher, Digits(Digits.Config()))
    large = ColouredObjectScene(ColouredObjectScene.Config(num_views=2, num_test_views=1, size=24))
    with pytest.raises(ConfigError, match="24 x 24 pixels, the teacher makes 16 x 16"):
        build(teacher, large)
    masked = ColouredObjectScene(ColouredObjectScene.Config(num_views=2, num_test_views=1, size=16))
    known = torch.ones(masked.train.images.shape[:3], dtype=torch.bool)
    known[1, 3, 4] = False
    masked.train = replace(masked.train, known=known)
    with pytest.raises(ConfigError, match="masks of this capture ignore pixels"):
        build(teacher, masked)


def test_pictures_of_objects_depend_on_their_seed_and_show_their_colour():
    source = ColouredObjects(ColouredObjects.Config(count=6, size=16))
    again = ColouredObjects(ColouredObjects.Config(count=6, size=16))
    other = ColouredObjects(ColouredObjects.Config(count=6, size=16, seed=1))
    assert torch.equal(source.all().x0, again.all().x0)
    assert not torch.equal(source.all().x0, other.all().x0)
    batch = source.all()
    least = (batch.x0[:, 0] - batch.x0[:, 2]).flatten(1)
    assert (least[batch.cond["class_label"] == 0].amax(1) > 0.5).all()  # somewhere clearly red
    assert (least[batch.cond["class_label"] == 1].amin(1) < -0.5).all()  # somewhere clearly blue


def test_the_scene_in_another_colour_differs_in_the_object_alone(data):
    red, blue = data.test_in("red"), data.test_in("blue")
    differs = (red - blue).abs().amax(-1) > 1e-6
    assert torch.equal(differs, data.shown > 0)
