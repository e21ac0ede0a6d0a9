"""Fields: hash indexing by hand, density and gradients by their definitions."""

import pytest
import torch

from distill_core.errors import ConfigError
from distill_core.networks.fields import FIELDS, build_field
from distill_core.networks.fields.base import clip_straight_through
from distill_core.networks.fields.hash import (
    HashConfig,
    HashField,
    Level,
    corner_indices,
    corner_weights,
    table_levels,
)
from distill_core.recipe.tables import NetworkConfig

TRAINED = sorted(set(FIELDS) - {"analytic"})


def test_a_hashed_level_indexes_as_computed_by_hand():
    level = Level(scale=1.0, resolution=2, dense=False, offset=1000, length=2**15)
    index = corner_indices(torch.tensor([[5], [7], [11]], dtype=torch.int32), level)
    expected = [
        (((5 + dx) * 1) ^ ((7 + dy) * 2654435761) ^ ((11 + dz) * 805459861)) % 2**32 % 2**15 + 1000
        for dz in (0, 1)
        for dy in (0, 1)
        for dx in (0, 1)
    ]
    assert index[:, 0].tolist() == expected


def test_a_dense_level_strides_by_its_vertices_plus_one():
    level = Level(scale=15.0, resolution=16, dense=True, offset=0, length=4920)
    index = corner_indices(torch.tensor([[1], [2], [3]], dtype=torch.int32), level)
    assert index[0, 0] == 1 + 2 * 17 + 3 * 17 * 17
    assert index[7, 0] == 2 + 3 * 17 + 4 * 17 * 17


def test_levels_follow_tiny_cuda_nn():
    levels = table_levels(HashConfig(levels=3, min_resolution=16, max_resolution=64, log2_table_size=15))
    assert [level.resolution for level in levels] == [16, 32, 64]
    assert [level.dense for level in levels] == [
        True,
        False,
        False,
    ]  # 17^3 fits into 2^15, 33^3 = 35937 does not
    assert [level.length for level in levels] == [4920, 2**15, 2**15]  # 17^3 = 4913, rounded up to 8
    assert [level.offset for level in levels] == [0, 4920, 4920 + 2**15]


def test_a_table_of_the_published_size_has_the_published_layout():
    """14 levels of 2 features from 16 to 2,048, at most 2^19 entries: offsets worked out from the rules by hand."""
    config = HashConfig(levels=14, min_resolution=16, max_resolution=2048, log2_table_size=19)
    levels = table_levels(config)
    assert [level.resolution for level in levels[:6]] == [16, 24, 34, 50, 72, 104]  # growth 2^(7/13)
    dense = [17**3, 25**3, 35**3, 51**3, 73**3]  # 73^3 = 389,017 fits into 2^19 = 524,288; 105^3 does not
    assert [level.dense for level in levels] == [True] * 5 + [False] * 9
    lengths = [(count + 7) // 8 * 8 for count in dense] + [2**19] * 9
    assert [level.length for level in levels] == lengths
    assert levels[-1].offset + levels[-1].length == sum(lengths)
    field = HashField(config, 1.0)
    shapes = {name: tuple(value.shape) for name, value in field.state_dict().items()}
    assert shapes == {
        "table": (sum(lengths), 2),
        "sigma_net.0.weight": (64, 28),
        "sigma_net.2.weight": (16, 64),
        "color_net.0.weight": (64, 31),
        "color_net.2.weight": (64, 64),
        "color_net.4.weight": (3, 64),
    }


def test_corner_weights_are_trilinear():
    weights = corner_weights(torch.tensor([[0.25], [0.0], [1.0]]))
    assert weights[:, 0].tolist() == [0, 0, 0, 0, 0.75, 0.25, 0, 0]
    torch.testing.assert_close(corner_weights(torch.rand(3, 9)).sum(0), torch.ones(9))


def test_the_encoding_interpolates_the_table_linearly():
    field = HashField(HashConfig(levels=1, features=2, min_resolution=4, max_resolution=4), bound=1.0)
    x = torch.arange(6.0)  # a dense level of resolution 4 has 5 vertices per axis, offset by half a cell
    with torch.no_grad():
        field.table[:125, 0] = x[:5].repeat(25)  # the value is the vertex's x index
    u = torch.tensor([[0.0, 0.5, 0.5], [0.3, 0.1, 0.9], [1.0, 0.2, 0.4]])
    torch.testing.assert_close(field.encode(u)[:, 0], u[:, 0] * 3 + 0.5)


def test_outside_the_box_the_encoding_is_zero():
    field = HashField(HashConfig(), bound=1.0)
    assert field.encode(torch.tensor([[1.1, 0.5, 0.5], [0.5, -0.1, 0.5]])).abs().max() == 0
    assert field.encode(torch.tensor([[0.5, 0.5, 0.5]])).abs().max() > 0


@pytest.mark.parametrize("kind", TRAINED)
def test_every_field_gives_a_density_and_a_colour_and_learns_from_both(kind):
    torch.manual_seed(0)
    field = build_field(NetworkConfig(name=kind), bound=1.5)
    x, d = torch.rand(50, 3) * 3 - 1.5, torch.nn.functional.normalize(torch.randn(50, 3), dim=-1)
    density, radiance = field(x, d)
    assert density.shape == (50,)
    assert radiance.shape == (50, 3)
    assert bool((density > 0).all())
    assert bool(((radiance > 0) & (radiance < 1)).all())
    torch.testing.assert_close(field.log_density(x).exp(), density)
    (density.sum() + radiance.sum()).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in field.parameters())


@pytest.mark.parametrize("kind", sorted(FIELDS))
def test_a_field_depends_on_direction_in_colour_only(kind):
    torch.manual_seed(0)
    field = build_field(NetworkConfig(name=kind), bound=1.0)
    x = torch.rand(8, 3)
    one, other = (field(x, torch.tensor(d).expand(8, 3)) for d in ([1.0, 0, 0], [0.0, 0, 1]))
    assert torch.equal(one.density, other.density)
    assert not torch.equal(one.radiance, other.radiance)


@pytest.mark.parametrize("kind", TRAINED)
def test_no_samples_give_no_error_and_zero_gradients(kind):
    field = build_field(NetworkConfig(name=kind), bound=1.0)
    density, radiance = field(torch.zeros(0, 3), torch.zeros(0, 3))
    (density.sum() + radiance.sum()).backward()
    assert all(p.grad is None or float(p.grad.abs().sum()) == 0 for p in field.parameters())


def test_a_clipped_density_still_has_a_gradient():
    values = torch.tensor([-50.0, 0.0, 50.0], requires_grad=True)
    clipped = clip_straight_through(values, -12, 7)
    clipped.sum().backward()
    assert clipped.tolist() == [-12, 0, 7]
    assert values.grad.tolist() == [1, 1, 1]
    assert bool(torch.isfinite(clipped.exp()).all())


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (NetworkConfig(name="hahs"), "did you mean 'hash'"),
        (NetworkConfig(name="hash", args={"level": 4}), "did you mean 'levels'"),
        (NetworkConfig(name="hash", args={"log2_table_size": 40}), "network.args.log2_table_size = 40"),
        (NetworkConfig(name="hash", args={"min_resolution": 64, "max_resolution": 8}), "max_resolution 8"),
        (NetworkConfig(name="mlp", args={"layers": 0}), "network.args.layers = 0"),
    ],
)
def test_a_wrong_network_table_says_what_is_wrong(network, said):
    with pytest.raises(ConfigError, match="network|hash|max") as caught:
        build_field(network, 1.0)
    assert said in str(caught.value)
