"""Diffusion couples: coefficients against exact ones, what each relation needs, and profiles that cannot be used."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill_core.data import build_source
from distill_core.data.diffusion_couples import molar_volume, simulate
from distill_core.errors import ConfigError, DataError
from distill_core.methods.science.diffusion_couple import (
    Config,
    DiffusionCouple,
    Profile,
    den_broeder,
    integrated,
    intrinsic,
    wagner,
)

ENDS = (0.04, 0.93)


def coefficient(n):
    return 1 + 4 * n**2


def profile(law: str, contraction: float = 0.16, diffusivity=coefficient, ends=ENDS) -> Profile:
    def volume(n):
        return molar_volume(n, law, contraction)

    x, n = simulate(ends, diffusivity, volume)
    return Profile(x, n, np.gradient(n, x, edge_order=2), volume(n))


def error(found: np.ndarray, at: Profile) -> float:
    inside = (at.n > 0.15) & (at.n < 0.85)
    return float(np.abs(found[inside] / coefficient(at.n[inside]) - 1).max())


@pytest.fixture(scope="module")
def contracting() -> Profile:
    return profile("contracting")


@pytest.mark.parametrize("law", ["constant", "vegard"])
def test_both_relations_find_the_coefficient_where_volumes_are_ideal(law):
    at = profile(law)
    assert error(wagner(at, 1.0), at) < 2e-3
    assert error(den_broeder(at, 1.0), at) < 2e-3


def test_only_wagners_relation_holds_where_the_volume_contracts(contracting):
    assert error(wagner(contracting, 1.0), contracting) < 3e-3
    assert error(den_broeder(contracting, 1.0), contracting) > 0.2


def test_a_couple_seen_in_a_mirror_has_the_same_coefficients(contracting):
    x, n, slope, volume = contracting
    mirrored = Profile(x[-1] - x[::-1], n[::-1], -slope[::-1], volume[::-1])
    middle = slice(480, 720)
    found, expected = wagner(mirrored, 1.0)[::-1][middle], wagner(contracting, 1.0)[middle]
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_twice_the_time_halves_the_coefficient(contracting):
    middle = slice(480, 720)
    np.testing.assert_allclose(wagner(contracting, 2.0)[middle], wagner(contracting, 1.0)[middle] / 2)


def test_intrinsic_coefficients_are_found_at_the_marker_plane():
    """D~ = N_B D_A + N_A D_B for a constant volume; markers move with v = (D_B - D_A) dN_B/dx, and x_K = 2 t v."""
    faster, slower = 3.0, 1.77

    def mixed(n):
        return n * faster + (1 - n) * slower

    at = profile("constant", diffusivity=mixed, ends=(0.0, 1.0))
    x = at.x - np.interp(0.5, at.n, at.x)
    x = x + np.trapezoid(at.n - (x > 0), x)  # 0 at the Matano plane: as much has left as has come
    markers = x - 2 * (slower - faster) * at.slope
    found = intrinsic(at._replace(x=x), 1.0, float(np.interp(0, markers, x)))
    assert found == pytest.approx((faster, slower), rel=0.02)


def test_the_integrated_coefficient_of_a_phase_is_the_integral_over_its_compositions():
    low, high, edge = 0.44, 0.52, 0.004

    def phase(n):
        return 0.3 + 6.0 / (1 + np.exp((n - high) / edge)) / (1 + np.exp((low - n) / edge))

    at = profile("vegard", diffusivity=phase, ends=(0.1, 0.85))
    start, stop = (float(np.interp(bound, at.n, at.x)) for bound in (low, high))
    grid = np.linspace(low, high, 4001)
    assert integrated(at, 1.0, start, stop) == pytest.approx(np.trapezoid(phase(grid), grid), rel=0.03)


def method(source=None, **config) -> DiffusionCouple:
    source = source or build_source({"name": "diffusion_couple", "noise": 0.004, "seed": 3})
    return DiffusionCouple(Config(**config), data=source)


def stepped(made: DiffusionCouple, count: int) -> DiffusionCouple:
    for step in range(count):
        torch.manual_seed(step)
        list(made.updates(None, step))  # type: ignore[arg-type]
    return made


def test_the_standard_error_is_that_of_couples_measured_anew():
    couples = [
        build_source({"name": "diffusion_couple", "noise": 0.004, "seed": seed, "points": 121})
        for seed in range(8)
    ]
    values = [stepped(method(couple, num_knots=9), 1).curve.values for couple in couples]
    spread = torch.stack(values).std(0)[2:-2].median()
    said = stepped(method(couples[0], num_knots=9), 14).curve.errors[2:-2].median()
    assert 0.4 < float(said / spread) < 2.5


def test_noise_needs_a_smoothing_spline():
    with pytest.raises(DataError, match="rises and falls.*smooth it"):
        method(smoothing="none")
    assert stepped(method(), 1).figures(None)["coefficient_error"] < 0.05  # type: ignore[arg-type]


def test_the_curve_is_linear_between_knots_and_goes_on_beyond():
    made = stepped(method(num_knots=7), 1)
    knots, values = made.curve.knots, made.curve.values.detach()
    at = torch.cat([knots, (knots[2:3] + knots[3:4]) / 2])
    found, _ = made.coefficient(at)  # type: ignore[misc]
    torch.testing.assert_close(found[:-1], values)
    torch.testing.assert_close(found[-1], (values[2] + values[3]) / 2)


def table(tmp_path, text: str):
    path = tmp_path / "profile.csv"
    path.write_text(text)
    return {"name": "diffusion_couple", "path": str(path), "hours": 25.0}


def test_a_measured_profile_gives_what_the_simulated_one_gave(tmp_path):
    options = {"name": "diffusion_couple", "hours": 25.0, "points": 301, "molar_volume": "contracting"}
    simulated = build_source(options)
    rows = zip(*(simulated.arrays[name].tolist() for name in ("distance", "fraction", "molar_volume")))
    text = "distance,fraction,molar_volume\r\n" + "\r\n".join(",".join(map(repr, row)) for row in rows)
    read = build_source(table(tmp_path, text))
    ours, theirs = (stepped(method(source), 1) for source in (read, simulated))
    torch.testing.assert_close(ours.curve.values, theirs.curve.values)
    assert "coefficient_error" not in ours.figures(None)  # type: ignore[arg-type]
    assert theirs.figures(None)["coefficient_error"] < 2e-3  # type: ignore[arg-type]


ROWS = [f"{i},{0.1 + 0.8 / (1 + 2.7 ** (-(i - 15) / 1.5)):.6f}" for i in range(31)]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["distance,fraction", *ROWS[:2]], "has 2 points; a profile has 9"),
        (["distance,fractoin", *ROWS], "no column 'fractoin'; did you mean 'fraction'"),
        (["distance,distance", *ROWS], "expected distance, fraction"),
        (["distance,fraction", *ROWS[:5], "5,nan", *ROWS[6:]], "line 7 is '5,nan'; expected 2 numbers"),
        (["distance,fraction", *ROWS[:5], "5", *ROWS[6:]], "line 7 is '5'; expected 2 numbers"),
        (["distance,fraction", *ROWS[:5], "3,0.1", *ROWS[6:]], "point 6 has a distance that is not above"),
        (["distance,fraction", *ROWS[:5], "5,1.7", *ROWS[6:]], "point 6 has a fraction outside 0 to 1"),
        (["distance,fraction,molar_volume", *(f"{row},0" for row in ROWS)], "point 1 has a molar_volume"),
    ],
)
def test_a_table_that_is_no_profile_is_refused_by_its_line(rows, said, tmp_path):
    with pytest.raises(ConfigError if "no column" in said else DataError, match=said):
        build_source(table(tmp_path, "\n".join(rows)))


def test_a_table_is_not_read_beyond_what_a_profile_can_have(tmp_path):
    options = table(tmp_path, "")
    with open(options["path"], "wb") as file:
        file.truncate(10 * 2**30)  # sparse
    with pytest.raises(DataError, match="has 10737418240 bytes; a table of a profile has at most"):
        build_source(options)


@pytest.mark.parametrize(
    ("fractions", "said"),
    [
        ([0.3] * 31, "nothing has diffused"),
        (list(np.linspace(0.1, 0.9, 31)), "ends are not flat: they change by 6.9%"),
        ([0.1] * 10 + [0.5, 0.9, 0.4, 0.2, 0.6, 0.9] + [0.9] * 15, "rises and falls"),
    ],
)
def test_a_profile_that_the_relations_cannot_read_is_refused(fractions, said, tmp_path):
    text = "\n".join(["distance,fraction", *(f"{i},{n}" for i, n in enumerate(fractions))])
    with pytest.raises(DataError, match=said):
        method(build_source(table(tmp_path, text)), smoothing="none")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"path": "x.csv"}, "hours is missing"),
        ({"path": "x.csv", "hours": 3.0, "noise": 0.01}, "noise is of a simulated couple"),
        ({"ends": (0.3, 0.3)}, "are equal"),
        ({"points": 2}, "data.points"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        build_source({"name": "diffusion_couple", **options})


def test_other_data_are_refused():
    with pytest.raises(ConfigError, match=r"set data\.name = 'diffusion_couple'"):
        DiffusionCouple(Config(), data=build_source({"name": "digits"}))
