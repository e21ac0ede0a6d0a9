"""Hybrid Distillation: relations of one teacher, features of another, on patches that are more and more few."""

from __future__ import annotations

import math

import pytest
import torch

from distill_core.errors import ConfigError
from distill_core.methods.recognition.hybrid_distill import feature_loss, likeness, relation_loss
from distill_core.networks.masked import PROJECTIONS
from tests.helpers import tiny_trainer

PRETRAINING = {"steps": 400, "config.pretrain_steps": 200}


def test_relations_are_compared_as_written_out_and_widths_may_differ():
    generator = torch.Generator().manual_seed(5)
    own, other = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, 6, generator=generator)
    found = relation_loss(own, other, 2)

    def relations(tokens: torch.Tensor, width: int) -> list[torch.Tensor]:
        parts = [tokens[:, :width], tokens[:, width:]]
        return [torch.softmax(part @ part.T / math.sqrt(width), dim=1) for part in parts]

    for item in range(2):
        total = 0.0
        for r_t, r_s in zip(relations(other[item], 3), relations(own[item], 2)):
            total += float((r_t * (r_t / r_s).log()).sum())
        assert float(found[item]) == pytest.approx(total / 6, rel=1e-4)
    assert relation_loss(other, other, 2).abs().max() < 1e-6


def test_features_are_compared_with_normalised_ones():
    teacher = torch.tensor([[[1.0, 3.0, 8.0]]])
    normed = (teacher - 4) / math.sqrt((9 + 1 + 16) / 3)
    assert float(feature_loss(normed, teacher)) == pytest.approx(0, abs=1e-6)
    assert float(feature_loss(normed + 0.4, teacher)) == pytest.approx(0.08, rel=1e-3)


def test_the_patches_that_are_most_like_the_others_are_left_out_first_and_more_of_them_later(
    context, tmp_path
):
    method = tiny_trainer("hybrid_distill", context, tmp_path, **PRETRAINING).method
    x0 = method.unlabelled.all(3).x0
    assert method.mask_at(x0, 0) is None
    keys = method.related.with_projections(x0)[1]["keys"]
    like = likeness(keys[:, 1:])
    counts = []
    for step in (60, 120, 199):
        mask = method.mask_at(x0, step)
        counts.append(mask.kept.shape[1])
        assert like[mask.hidden].reshape(3, -1).amin(1).ge(like.gather(1, mask.kept).amax(1)).all()
    assert counts == [14, 12, 10]


def test_all_three_see_the_same_patches_and_the_loss_is_the_sum_of_both(context, tmp_path):
    method = tiny_trainer("hybrid_distill", context, tmp_path, **PRETRAINING).method
    x0 = method.unlabelled.all(3).x0
    mask = method.mask_at(x0, 150)
    hidden, own = method.encoder.with_projections(x0, mask)
    theirs = method.related.with_projections(x0, mask)[1]
    relations = torch.stack([relation_loss(own[name], theirs[name], 4).mean() for name in PROJECTIONS]).mean()
    features = feature_loss(method.student.exits[0](hidden), method.featured(x0, mask)).mean()
    losses = method.pretraining(x0, 150)
    torch.testing.assert_close(losses["relation_loss"], relations)
    torch.testing.assert_close(losses["feature_loss"], features)
    assert hidden.shape[1] == 1 + 12


def test_queries_keys_and_values_are_those_that_attention_is_made_of(context, tmp_path):
    method = tiny_trainer("hybrid_distill", context, tmp_path, **PRETRAINING).method
    x0 = method.unlabelled.all(2).x0
    found = method.encoder.with_projections(x0)[1]
    block = method.encoder.base.layers[-1]
    before = block.layernorm_before(method.encoder(x0, until=method.encoder.num_layers - 1))
    for name, part in zip(
        PROJECTIONS, (block.attention.q_proj, block.attention.k_proj, block.attention.v_proj)
    ):
        assert torch.equal(found[name], part(before))


@pytest.mark.parametrize("off", ["relation", "feature"])
def test_a_weight_of_0_asks_that_teacher_nothing(context, tmp_path, off):
    changes = {**PRETRAINING, "config.left_out": 0.0, f"config.{off}_weight": 0.0}
    method = tiny_trainer("hybrid_distill", context, tmp_path, **changes).method
    unasked = method.related if off == "relation" else method.featured
    unasked.base.layers[0].register_forward_hook(lambda *_: pytest.fail("it was run"))
    other = "feature" if off == "relation" else "relation"
    assert list(method.pretraining(method.unlabelled.all(2).x0, 7)) == [f"{other}_loss"]


def test_a_step_moves_the_projection_which_is_not_published(context, tmp_path):
    trainer = tiny_trainer("hybrid_distill", context, tmp_path, **PRETRAINING)
    before = trainer.method.student.exits[0].weight.clone()
    trainer.step = 100
    trainer.train_step()
    assert not torch.equal(before, trainer.method.student.exits[0].weight)
    published = trainer.method.published()["student"]
    assert not any("exits" in name for name, _ in published.named_parameters())


def test_attention_of_student_and_teachers_is_measured(context, tmp_path):
    method = tiny_trainer("hybrid_distill", context, tmp_path, **PRETRAINING).method
    figures = method.figures(type("Few", (), {"num_samples": 12}))
    names = ("attention_distance", "feature_rank", "head_similarity")
    assert set(figures) == {f"{owner}{name}" for owner in ("", "masked_", "classes_") for name in names}
    assert 1 < figures["feature_rank"] <= 16 < figures["classes_feature_rank"] * 2
    assert 0 < figures["head_similarity"] < 1


@pytest.mark.parametrize(
    ("changes", "said", "field"),
    [
        ({"config.relation_heads": 3}, "tokens of 16 values do not divide into so many", "config.relation_heads"),
        ({"teachers.features": {"recipe": "judge_digits"}}, "the teacher is a Classifier", "teachers.features"),
        ({"config.relation_weight": 0.0, "config.feature_weight": 0.0}, "are both 0", "config"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_anything_is_trained(context, tmp_path, changes, said, field):
    with pytest.raises(ConfigError, match=said) as error:
        tiny_trainer("hybrid_distill", context, tmp_path, **changes)
    assert error.value.field == field
