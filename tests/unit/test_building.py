"""Finding the models that a recipe names."""

from __future__ import annotations

import pytest
import torch

from distill_core import api, building
from distill_core.data import pairs, shards
from distill_core.data.pairs import Pairs
from distill_core.diffusion.sampling import heun
from distill_core.errors import ConfigError, DistilleryError
from distill_core.method import Method, MethodConfig
from distill_core.methods import find_method
from distill_core.networks.adapters import LoraDenoiser
from distill_core.networks.denoiser import Denoiser
from distill_core.recipe import load_recipe
from tests.helpers import tiny_context


def test_a_recipe_that_is_its_own_teacher_is_refused_instead_of_waiting_for_itself(tmp_path):
    recipe = tmp_path / "circle.toml"
    recipe.write_text(
        f"""
        method = "dmd2"
        steps = 1
        data = {{ name = "digits" }}
        teacher = {{ recipe = "{recipe}" }}
        """
    )
    with pytest.raises(ConfigError, match="needs itself as a teacher"):
        api.train(
            load_recipe(str(recipe)), tmp_path / "run", api.context(tmp_path / "store", tmp_path / "cache")
        )


class Imitation(Method):
    """The least that names everything a builder can give."""

    roles = ("student",)

    def __init__(
        self, config: MethodConfig, *, teacher: Denoiser, student: Denoiser, pairs: Pairs | None
    ) -> None:
        super().__init__()
        self.teacher, self.student, self.pairs = teacher, student, pairs


@pytest.fixture
def built(tmp_path, monkeypatch):
    """Builds `Imitation` over tiny digits teachers with these recipe tables."""
    monkeypatch.setattr(
        building, "find_method", lambda name: Imitation if name == "imitation" else find_method(name)
    )
    context = tiny_context(tmp_path)

    def build(**tables) -> Imitation:
        recipe = {"method": "imitation", "steps": 1, "data": {"name": "digits"}, **tables}
        return building.build(load_recipe({"teacher": {"recipe": "edm_digits"}, **recipe}), context)[0]

    build.context = context
    return build


def weights(module):
    return [value.detach() for value in module.state_dict().values()]


@pytest.mark.slow
def test_a_student_begins_as_a_trainable_copy_of_the_teacher(built):
    method = built()
    assert all(
        torch.equal(*pair) for pair in zip(weights(method.student), weights(method.teacher), strict=True)
    )
    assert all(p.requires_grad for p in method.student.parameters())
    assert not any(p.requires_grad for p in method.teacher.parameters())


@pytest.mark.slow
def test_a_student_can_begin_as_another_model(built):
    method = built(student={"recipe": "flow_matching_digits"})
    assert method.student.parameterisation == "flow"
    assert method.teacher.parameterisation == "edm"


@pytest.mark.slow
def test_a_student_can_be_an_adapter_over_the_teacher_s_own_weights(built):
    method = built(student={"lora": {"rank": 2, "targets": "all-linear"}})
    assert isinstance(method.student, LoraDenoiser)
    shared = {value.data_ptr() for value in method.teacher.parameters()}
    base = [p for n, p in method.student.adapted.named_parameters() if ".lora_" not in n]
    assert {value.data_ptr() for value in base} == shared
    assert {p.numel() for p in method.student.parameters() if p.requires_grad}
    assert len(list(method.student.parameters())) < len(shared)


@pytest.mark.slow
def test_a_student_of_another_size_takes_and_gives_what_the_teacher_does(built):
    network = {
        "name": "DiTTransformer2DModel",
        "args": {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, "patch_size": 8},
    }
    method, again = built(student={"network": network}), built(student={"network": network})
    assert sum(p.numel() for p in method.student.parameters()) * 10 < sum(
        p.numel() for p in method.teacher.parameters()
    )
    cond = {"class_label": torch.tensor([3, 10])}  # ten is "no class", as for the teacher
    assert method.student(torch.randn(2, 1, 8, 8), torch.ones(2), cond).shape == (2, 1, 8, 8)
    assert method.student.card() == method.teacher.card()
    assert all(
        torch.equal(*pair) for pair in zip(weights(method.student), weights(again.student), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"student": {"recipe": "dmd2", "path": "/x"}}, "at most one of artifact, path, recipe, network"),
        ({"student": {"network": {"name": "UNet2DModel"}}}, "cannot stand in for the teacher's DiT"),
        ({"student": {"network": {"name": "UNet2DModel"}, "lora": {}}}, "leave one out"),
        ({"student": {"recipe": "judge_digits"}}, "the student must be a Denoiser"),
        (
            {"method": "edm", "student": {"lora": {}}, "network": {"name": "DiTTransformer2DModel"}},
            r"leave \[student\] out",
        ),
        ({"method": "swiftbrush", "pairs": {}}, r"leave \[pairs\] out"),
    ],
)
def test_students_that_cannot_be_are_refused_in_a_sentence(built, tables, said):
    with pytest.raises(DistilleryError, match=said):
        built(**tables)


@pytest.mark.slow
def test_pairs_are_what_the_teacher_makes_of_their_noise_and_are_made_once(built, monkeypatch):
    table = {"count": 6, "num_steps": 2, "seed": 5, "batch_size": 4}
    method = built(pairs=table)
    batch = method.pairs.at(torch.tensor([1, 4]))
    x = batch.z * method.teacher.sampler.noise_scale
    levels = method.teacher.sampler.levels(2)
    x0 = heun(lambda x, s: method.teacher(x, x.new_full((2,), s), batch.cond), x, levels)
    # two in a batch here, four there: float32 rounds otherwise, as far as the largest values go
    assert torch.allclose(x0, batch.x0, rtol=0, atol=1e-5 * float(x0.abs().max()))
    assert torch.equal(batch.cond["class_label"], method.pairs.source.labels[[1, 4]])

    monkeypatch.setattr(pairs, "generate_x0", None)  # whatever is asked of the teacher now fails
    assert torch.equal(built(pairs=table).pairs.x0, method.pairs.x0)
    with pytest.raises(TypeError):
        built(pairs={**table, "num_steps": 3})


@pytest.mark.slow
def test_a_kill_costs_one_shard_of_pairs(built, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 4)
    whole = built(pairs={"count": 10, "num_steps": 1}).pairs
    (shard,) = tmp_path.glob("cache/pairs/*/000000004.safetensors")
    shard.unlink()
    asked = []
    honest = pairs.generate_x0
    monkeypatch.setattr(pairs, "generate_x0", lambda d, c, i, **k: asked.append(i) or honest(d, c, i, **k))
    assert torch.equal(built(pairs={"count": 10, "num_steps": 1}).pairs.x0, whole.x0)
    assert asked == [range(4, 8)]


@pytest.mark.slow
def test_pairs_are_drawn_by_the_global_generator(built):
    made = built(pairs={"count": 20, "num_steps": 1}).pairs
    torch.manual_seed(1)
    first = made.draw(5)
    torch.manual_seed(1)
    assert torch.equal(made.draw(5).z, first.z)
    assert not torch.equal(made.draw(5).z, first.z)
