"""Adapter guidance distillation: what is learnt where, over weights that stay, and on which checkpoints it works."""

from __future__ import annotations

import copy

import pytest
import torch

from distill_core.data import build_source
from distill_core.data.pairs import build_pairs
from distill_core.data.trajectories import build_trajectories, scales
from distill_core.diffusion.guidance import GuidanceLaw
from distill_core.errors import ArtifactError, ConfigError
from distill_core.method import Batch
from distill_core.methods.diffusion.agd import AGD, Config
from distill_core.networks.adapters import weights_sha256
from distill_core.networks.diffusers_adapted import FILE, AdaptedDenoiser
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.networks.generation import generate
from distill_core.networks.guidance_adapters import GuidanceAdapterConfig
from distill_core.recipe.tables import EvaluateConfig, NetworkConfig, PairsConfig
from tests.helpers import TINY_NETWORKS, WITH_ATTENTION
from tests.oracles import AffineDenoiser

COND = {"class_label": torch.arange(6) % 3}
LEVELS = torch.linspace(0.3, 6, 6)


def teacher_of(name="DiTTransformer2DModel", **args):
    torch.manual_seed(0)
    network = NetworkConfig(name=name, args={**TINY_NETWORKS[name], **args})
    teacher = build_denoiser(network, parameterisation="edm", shape=(1, 8, 8), num_classes=3)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    teacher.sampler = teacher.sampler.model_copy(update={"num_steps": 3})
    return teacher.requires_grad_(False)


def made(folder=None, teacher=None, sibling=None, **config):
    teacher = teacher or teacher_of()
    table = {"guidance_max": 5.0, "walk_steps": 5, "adapters": {"width": 12, "hidden": 9}, **config}
    pairs = None
    if folder is not None:
        source = build_source({"name": "classes", "num_classes": 3})
        pairs = build_pairs(teacher, source, PairsConfig(count=40, num_steps=2, seed=3), folder)
    return AGD(Config.parse(table, where="config"), teacher=teacher, pairs=pairs, sibling=sibling)


def adapted(seed=4):
    """Adapters that do something, over a teacher."""
    student = AdaptedDenoiser.over(teacher_of(), GuidanceAdapterConfig(width=12, hidden=9))
    torch.manual_seed(seed)
    for layer in student.adapters.layers:
        torch.nn.init.normal_(layer.up.weight)
    return student


def trained(method, steps):
    optimizer = torch.optim.Adam(method.student.parameters(), 2e-2)
    for step in range(steps):
        torch.manual_seed(step)
        (update,) = method.updates(
            Batch.of(30, torch.randn(30, 1, 8, 8), {"class_label": torch.arange(30) % 3}), step
        )
        optimizer.zero_grad()
        update.loss.backward()
        optimizer.step()


def test_adapters_alone_learn_guidance_and_where_none_is_told_the_weights_answer(tmp_path):
    sibling = teacher_of()
    with torch.no_grad():
        for parameter in sibling.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    method = made(tmp_path / "pairs", sibling=sibling)
    before = weights_sha256(method.teacher)
    start = method.figures(EvaluateConfig(num_samples=9))
    trained(method, 60)
    end = method.figures(EvaluateConfig(num_samples=9))
    assert start["guided_error_high"] == pytest.approx(start["unguided_error_high"])
    assert end["guided_error_high"] < 0.5 * start["guided_error_high"]
    assert end["guided_error_middle"] < 0.7 * start["guided_error_middle"]
    assert end["sibling_error"] < 0.6 * end["sibling_unguided_error"]
    assert end["evaluations_share"] == 0.5
    count = sum(value.numel() for value in method.student.parameters())
    assert end["trained_share"] == count / sum(value.numel() for value in method.teacher.parameters())
    assert weights_sha256(method.teacher) == weights_sha256(method.student) == before
    x = torch.randn(6, 1, 8, 8)
    assert torch.equal(method.student(x, LEVELS, COND), method.teacher(x, LEVELS, COND))


def test_a_stored_step_teaches_the_guided_prediction_that_it_was_made_of(tmp_path):
    method = made(tmp_path / "pairs")
    chosen, seen = torch.tensor([7, 31]), []
    method.loss = lambda answer, taught, sigma: seen.append((taught, sigma)) or answer.sum()
    torch.manual_seed(11)
    method.walked(16)
    torch.manual_seed(11)
    chosen, which = torch.randint(40, (16,)), torch.randint(5, (16,))
    walks = method.walks()
    batch = walks.steps(chosen, which)
    (taught, sigma), x = seen[0], batch.states[:, 0]
    wanted = method.teacher.guided(x, sigma, batch.cond, walks.scales(chosen))
    torch.testing.assert_close(taught, wanted, rtol=1e-3, atol=1e-3)
    assert len(walks.scales(chosen).unique()) == len(chosen.unique())


def test_walks_have_scales_of_their_own_that_fill_the_range_and_are_found_again(tmp_path):
    law = GuidanceLaw(2.0, 5.0)
    drawn = scales(law, torch.arange(300)).sort().values
    assert 2.0 <= float(drawn[0]) < 2.02
    assert 4.98 < float(drawn[-1]) <= 5.0
    assert float(drawn.diff().max()) < 0.03
    source = build_source({"name": "classes", "num_classes": 3})
    model = AffineDenoiser(0.4, 0.3)
    pairs = build_pairs(model, source, PairsConfig(count=8, num_steps=2), tmp_path / "pairs")
    levels = [8.0, 2.0, 0.5, 0.0]
    folders = [
        build_trajectories(pairs, model, levels, range(4), law).shards
        and set(tmp_path.glob("*/*.safetensors"))
        for law in (GuidanceLaw(2.0, 5.0), GuidanceLaw(2.0, 5.0), GuidanceLaw(2.0, 6.0))
    ]
    assert [len(found) for found in folders] == [2, 2, 3]
    walks = build_trajectories(pairs, model, levels, range(4), law)
    both = walks.steps(torch.tensor([5, 2]), torch.tensor([2, 0])).states
    whole = walks.at(torch.tensor([5, 2])).states
    assert torch.equal(both, torch.stack([whole[0, 2:4], whole[1, 0:2]]))


def test_a_batch_mixes_scales_and_one_is_the_base_bit_for_bit():
    student, x = adapted(), torch.randn(6, 1, 8, 8)
    told = torch.tensor([1.0, 3.0, 1.0, 2.2, 4.5, 1.0])
    answer = student(x, LEVELS, {**COND, "guidance": told})
    plain = student(x, LEVELS, COND)
    same = (answer == plain).flatten(1).all(1)
    assert same.tolist() == [True, False, True, False, False, True]
    alone = student(x[3:4], LEVELS[3:4], {"class_label": COND["class_label"][3:4], "guidance": told[3:4]})
    torch.testing.assert_close(alone, answer[3:4])


def test_a_network_in_half_precision_keeps_adapters_in_theirs():
    adapter = adapted().adapters.layers[1]
    h, told = torch.randn(3, 2, 16), torch.randn(3, 13)
    half = adapter(h.bfloat16(), told.bfloat16())
    assert half.dtype == torch.float32
    assert torch.equal(half, adapter(h.bfloat16().float(), told.bfloat16().float()))


def test_a_saved_folder_gives_the_adapters_back_and_names_a_damaged_file(tmp_path):
    student = adapted()
    student.sampler = student.sampler.model_copy(
        update={"guidance": 3.0, "guidance_range": (1.0, 5.0), "guidable": False}
    )
    student.save(tmp_path / "model")
    again = load_denoiser(tmp_path / "model")
    pictures = [
        generate(one, COND, 6, seed=5, guidance=4.0) for one in (student, again, copy.deepcopy(again))
    ]
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[0], pictures[2])
    assert not torch.equal(pictures[0], generate(again, COND, 6, seed=5, guidance=2.0))
    assert not (tmp_path / "model" / "model_index.json").exists()
    (tmp_path / "model" / FILE).write_bytes(b"no tensors")
    with pytest.raises(ArtifactError, match="missing, damaged or of another network"):
        load_denoiser(tmp_path / "model")


def test_adapters_move_to_a_base_of_their_shape_alone():
    student = adapted()
    other = teacher_of()
    moved = AdaptedDenoiser.over(other, student.adapters)
    x, told = torch.randn(6, 1, 8, 8), {**COND, "guidance": torch.full((6,), 3.0)}
    assert torch.equal(moved(x, LEVELS, told), student(x, LEVELS, told))
    with pytest.raises(ConfigError, match="network of another shape") as error:
        AdaptedDenoiser.over(teacher_of(num_layers=1), student.adapters)
    assert error.value.field == "adapters"


def test_networks_that_tell_attention_nothing_walks_without_noise_and_empty_ranges_are_refused():
    with pytest.raises(ConfigError, match="tells its attention layers nothing") as error:
        made(teacher=teacher_of("UNet2DModel", **WITH_ATTENTION))
    assert error.value.field == "teacher"
    with pytest.raises(ConfigError, match=r"add a \[pairs\] table") as error:
        made()
    assert error.value.field == "pairs"
    with pytest.raises(ConfigError, match="below guidance_max"):
        made(guidance_min=5.0)
    assert AGD.columns(Config(source="noised_data")).keys() == {"x0"}
    assert not AGD.columns(Config())
