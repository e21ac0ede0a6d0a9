"""Pairs of noise and the teacher's pictures: exact, made once, whoever asks and whenever they are killed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from distill_core.context import Context
from distill_core.data import build_source
from distill_core.data.pairs import build_pairs
from distill_core.data.shards import filling
from distill_core.diffusion.sampling import SamplerSpec
from distill_core.errors import ConfigError, DataError
from distill_core.networks.fake_tensors import fake_tensors
from distill_core.networks.generation import generate
from distill_core.recipe import Recipe, load_recipe
from distill_core.recipe.tables import PairsConfig
from tests.helpers import REPOSITORY
from tests.oracles import AffineDenoiser

MEAN, STD = 0.4, 0.3
LEVELS = 10.0


def teacher() -> AffineDenoiser:
    return AffineDenoiser(MEAN, STD).requires_grad_(False)


def make(folder, denoiser=None, **table: object):
    config = PairsConfig.parse({"count": 40, "num_steps": 16, **table})
    return build_pairs(
        denoiser or teacher(), build_source({"name": "classes", "num_classes": 3}), config, folder
    )


def test_the_target_is_the_end_of_the_ode_from_the_noise(tmp_path):
    pairs = make(tmp_path, num_steps=64)
    batch = pairs.at(torch.arange(40))
    exact = MEAN + (LEVELS * batch.z - MEAN) * STD / (STD**2 + LEVELS**2) ** 0.5
    torch.testing.assert_close(batch.x0, exact, atol=0.01, rtol=0)
    assert batch.cond["class_label"].tolist() == [index % 3 for index in range(40)]


def test_a_student_sampled_in_one_step_sees_the_noise_of_its_pairs(tmp_path):
    batch = make(tmp_path, seed=9).at(torch.arange(5))
    seen = []

    class Watching(AffineDenoiser):
        def forward(self, x_sigma, sigma, cond=None):
            seen.append(x_sigma)
            return super().forward(x_sigma, sigma, cond)

    spec = SamplerSpec.few_step((LEVELS,), noise_scale=LEVELS)
    generate(Watching(MEAN, STD), {}, 5, seed=9, sampler=spec)
    assert torch.equal(seen[0], LEVELS * batch.z)


def test_a_pair_depends_on_its_index_and_the_seed_and_not_on_the_batch_or_the_count(tmp_path):
    first = make(tmp_path / "a")
    other_batches = make(tmp_path / "b", batch_size=7, count=20)
    other_seed = make(tmp_path / "c", seed=1)
    torch.testing.assert_close(first.x0[:20], other_batches.x0, atol=1e-6, rtol=0)
    assert not torch.allclose(first.x0, other_seed.x0, atol=0.1)
    assert len(first.x0.flatten(1).unique(dim=0)) == 40


def test_the_guidance_is_the_tables_or_the_teachers_own(tmp_path):
    class Conditional(AffineDenoiser):
        """The mean is the class label; none is 0."""

        def forward(self, x_sigma, sigma, cond=None):
            return super().forward(x_sigma, sigma) - MEAN + cond["class_label"].reshape(-1, 1, 1, 1).float()

        def null_cond(self, batch):
            return {"class_label": torch.zeros(batch, dtype=torch.long)}

    plain, doubled = (make(tmp_path / str(g), Conditional(MEAN, STD), guidance=g) for g in (1.0, 2.0))
    labels = plain.at(torch.arange(40)).cond["class_label"]
    means = [(x0.flatten(1).mean(1) - labels).abs().mean() for x0 in (plain.x0, doubled.x0)]
    assert means[1] > 2 * means[0]
    own = Conditional(MEAN, STD)
    own.sampler = own.sampler.model_copy(update={"guidance": 2.0})
    assert torch.equal(make(tmp_path / "own", own).x0, doubled.x0)


@pytest.fixture
def folder_of(tmp_path):
    """The cache folder of pairs of a teacher folder, with these changes of the recipe."""
    for name in ("one", "two"):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet" / "model.safetensors").write_bytes(name.encode())
    context = Context(None, tmp_path / "cache", None)  # nothing is fetched or trained
    base = load_recipe("dmd2").override({"teacher.path": str(tmp_path / "one")})

    def folder(**changes: object):
        values = {"pairs": {"count": 8}, **{key.replace("__", "."): value for key, value in changes.items()}}
        recipe = Recipe.parse(base.override(values).model_dump())
        return context.pairs(recipe)

    folder.root = tmp_path
    return folder


def test_other_data_another_teacher_or_another_table_are_other_pairs(folder_of):
    found = [
        folder_of(),
        folder_of(pairs={"count": 9}),
        folder_of(pairs={"count": 8, "guidance": 2.0}),
        folder_of(data={"name": "digits", "split": "train"}),
        folder_of(teacher__path=str(folder_of.root / "two")),
    ]
    assert len(set(found)) == 5
    assert folder_of(steps=7, seed=3) == found[0]
    weights = folder_of.root / "one" / "unet" / "model.safetensors"
    weights.write_bytes(b"trained again")
    assert folder_of() not in found


MAKER = """
import sys, time
from pathlib import Path
import distill_core.data.pairs as pairs, distill_core.data.shards as shards
from tests.unit.data.test_pairs import make
shards.SHARD = 10
honest = pairs.generate_x0
def slow(*given, **named):
    print("batch", flush=True)
    sys.stdin.readline() if sys.argv[2] == "asks" else time.sleep(0.1)
    return honest(*given, **named)
pairs.generate_x0 = slow
make(Path(sys.argv[1]), batch_size=10)
"""


def maker(folder, pace: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAKER, str(folder), pace],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_a_killed_maker_leaves_whole_shards_that_the_next_one_goes_on_from(tmp_path, monkeypatch):
    process = maker(tmp_path, "asks")
    for _ in range(2):
        assert process.stdout.readline() == "batch\n"
        process.stdin.write("go on\n")
        process.stdin.flush()
    assert process.stdout.readline() == "batch\n"
    process.kill()
    process.wait()
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}
    assert len(kept) == 2
    monkeypatch.setattr("distill_core.data.shards.SHARD", 10)
    resumed = make(tmp_path, batch_size=10)
    assert all(file.stat().st_mtime_ns == made for file, made in kept.items())
    assert torch.equal(resumed.x0, make(tmp_path.parent / "straight", batch_size=10).x0)


@pytest.mark.slow
def test_two_makers_at_once_make_every_shard_once(tmp_path):
    makers = [maker(tmp_path, "pauses") for _ in range(2)]
    told = [process.communicate()[0] for process in makers]
    assert [process.returncode for process in makers] == [0, 0]
    assert sum(text.count("batch") for text in told) == 4


def test_a_model_that_is_being_trained_makes_pairs_of_the_same_noise_that_equal_weights_find_again(tmp_path):
    pairs = make(tmp_path / "made")
    other = pairs.remade(AffineDenoiser(-0.2, 0.7), num_steps=8)
    assert torch.equal(other.at(torch.arange(40)).z, pairs.at(torch.arange(40)).z)
    assert float((other.x0 - pairs.x0).abs().mean()) > 0.2
    written = {file: file.stat().st_mtime_ns for file in other.folder.glob("*.safetensors")}
    again = pairs.remade(AffineDenoiser(-0.2, 0.7), num_steps=8)
    assert again.folder == other.folder
    assert {file: file.stat().st_mtime_ns for file in again.folder.glob("*.safetensors")} == written
    folders = {pairs.folder, other.folder}
    folders.add(pairs.remade(AffineDenoiser(-0.2, 0.7000001), num_steps=8).folder)
    folders.add(pairs.remade(AffineDenoiser(-0.2, 0.7), num_steps=9).folder)
    folders.add(pairs.remade(AffineDenoiser(-0.2, 0.7), num_steps=8, guidance=2.5).folder)
    assert len(folders) == 5


def test_pairs_of_another_teacher_are_refused_by_name_wherever_they_come_from(tmp_path):
    make(tmp_path / "stale", AffineDenoiser(-0.2, 0.7))
    make(tmp_path / "now")
    (tmp_path / "stale" / "000000000.safetensors").replace(tmp_path / "now" / "000000000.safetensors")
    with pytest.raises(
        DataError, match=r"000000000.safetensors .* made by another model, .* \(stale\)"
    ) as told:
        make(tmp_path / "now")
    assert told.value.field == "pairs"


def test_damaged_and_short_files_of_pairs_are_refused_by_name(tmp_path):
    file = tmp_path / "000000000.safetensors"
    make(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    with pytest.raises(DataError, match="is damaged"):
        make(tmp_path)
    file.write_bytes(whole)
    with pytest.raises(DataError, match="does not hold the 41 items"):
        make(tmp_path, count=41)


def test_more_pairs_than_the_disk_was_given_are_refused_before_one_is_made(tmp_path):
    with pytest.raises(
        ConfigError, match=r"3000 items of shape \(1, 2, 2\) take 4.47e-05 GiB .* allows 4e-05"
    ) as told:
        make(tmp_path / "never", count=3000, max_gib=4e-5)
    assert told.value.field == "pairs.count"
    assert not (tmp_path / "never").exists()


def test_who_listens_hears_of_each_shard_and_may_stop_between_two(tmp_path, monkeypatch):
    monkeypatch.setattr("distill_core.data.shards.SHARD", 15)
    heard = []

    def listen(made: int, count: int, left_s: float) -> None:
        heard.append((made, count))
        if made == 30:
            raise KeyboardInterrupt

    token = filling.set(listen)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path)
    filling.reset(token)
    assert heard == [(15, 40), (30, 40)]
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert len(make(tmp_path)) == 40


def test_a_pair_is_the_same_row_whether_it_is_drawn_or_all_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("distill_core.data.shards.SHARD", 7)
    pairs = make(tmp_path)
    chosen = torch.tensor([39, 0, 6, 7, 13, 14, 7])
    assert torch.equal(pairs.at(chosen).x0, pairs.x0[chosen])


def test_a_plan_draws_pairs_that_nobody_made(tmp_path):
    with fake_tensors():
        drawn = make(tmp_path / "never").draw(5)
        assert drawn.x0.shape == drawn.z.shape == (5, 1, 2, 2)
    assert not (tmp_path / "never").exists()
