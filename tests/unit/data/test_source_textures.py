import pytest
import torch

from distill_core.data import build_source
from distill_core.data.textures import FAMILIES, MAPS, material, normals
from distill_core.errors import ConfigError


def source(**options):
    return build_source({"name": "textures", **options})


def test_a_texture_is_a_function_of_seed_and_index_alone():
    indices = torch.tensor([7, 0, 13])
    again = source(count=20).items(indices).x0
    assert torch.equal(source().items(indices).x0, again)
    assert torch.equal(source().items(torch.tensor([13])).x0[0], again[2])
    assert not torch.equal(source(seed=1).items(indices).x0, again)


def test_the_families_are_the_classes_in_turn():
    textures = source(count=12)
    assert textures.class_names == tuple(FAMILIES)
    assert textures.items(torch.arange(12)).cond["class_label"].tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert textures.shape == (3, 32, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_texture_repeats_along_both_axes(family):
    maps = torch.stack([material(family, number, size=32) for number in range(150)])[:, 5]
    inside = (maps[:, 1:] - maps[:, :-1]).abs().mean() + (maps[:, :, 1:] - maps[:, :, :-1]).abs().mean()
    across = (maps[:, 0] - maps[:, -1]).abs().mean() + (maps[:, :, 0] - maps[:, :, -1]).abs().mean()
    assert across / inside == pytest.approx(1, abs=0.3)
    moved = maps.roll((5, 7), (1, 2))
    cut = (moved[:, 0] - maps[:, -1]).abs().mean() + (moved[:, :, 0] - maps[:, :, -1]).abs().mean()
    assert cut > 1.3 * across, "beside a neighbour that does not fit, the seam shows"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_texture_is_the_same_at_every_size(family):
    small, large = material(family, 3, size=32)[5], material(family, 3, size=128)[5]
    assert (small - large.unflatten(0, (32, 4)).unflatten(2, (32, 4)).mean((1, 3))).abs().mean() < 0.08


def test_values_are_in_range_and_every_family_has_contrast():
    everything = source(kind="materials", count=120).all().x0
    assert (everything.min().item(), everything.max().item()) == (-1, 1)
    assert (everything[:, 5].std((1, 2)) > 0.2).all()


def test_pictures_are_the_basecolor_of_the_materials_of_the_same_index():
    maps, pictures, grey = (source(kind=kind, count=30).all().x0 for kind in ("materials", "rgb", "grey"))
    assert maps.shape == (30, 8, 32, 32)
    assert torch.equal(pictures, maps[:, MAPS["basecolor"]])
    assert torch.allclose(grey, pictures.mean(1, keepdim=True))


def test_normals_are_those_of_the_height():
    maps = source(kind="materials", count=30).all().x0
    assert torch.allclose(maps[:, MAPS["normal"]], normals(maps[:, MAPS["height"]]))


def test_the_normals_of_a_wave_are_its_slope_and_wrap_around():
    x = torch.arange(64) / 64
    height = 0.1 * torch.sin(2 * torch.pi * 2 * x).expand(1, 1, 64, 64)
    found = normals(height)
    slope = (
        2 * 0.1 * 2 * 2 * torch.pi * torch.cos(4 * torch.pi * x) / 32 / 2
    )  # RELIEF dh/dx, h = (height + 1) / 2
    expected = -slope / (1 + slope**2) ** 0.5
    assert torch.allclose(found[0, 0, 5], expected, atol=2e-3)
    assert found[0, 1].abs().max() == 0
    assert torch.allclose(normals(height.transpose(2, 3))[0, 1, :, 5], expected, atol=2e-3)


def test_some_families_alone_keep_their_labels_and_their_textures():
    everything, two = (
        source(kind="materials", count=24),
        source(kind="materials", count=8, only=["dots", "checks"]),
    )
    assert two.num_classes == 6
    assert two.items(torch.arange(4)).cond["class_label"].tolist() == [3, 1, 3, 1]
    assert torch.equal(two.items(torch.tensor([2])).x0, everything.items(torch.tensor([6 + 3])).x0)


def test_a_window_shows_a_part_of_the_tile():
    windows, tiles = source(size=20, window=0.5).all(6).x0, source(size=40).all(6).x0
    assert windows.shape == (6, 3, 20, 20)
    assert torch.equal(windows, tiles[..., :20, :20])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"families": ["stripes", "dotz"]}, "no family of textures is called 'dotz'; did you mean 'dots'"),
        ({"families": ["stripes"]}, "at least two names"),
        ({"families": ["dots", "checks"], "only": ["noise"]}, "only names 'noise', which is not among"),
        ({"only": ["dots", "dots"]}, "may be named once"),
        ({"size": 4}, "data.size = 4 is not allowed"),
        ({"window": 0.0}, "data.window = 0.0 is not allowed"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        source(**options)
