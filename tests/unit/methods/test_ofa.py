"""OFA-KD: its loss written out, exits that train and stay behind, and taps that are checked before training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distill_core.data import build_source
from distill_core.errors import ConfigError
from distill_core.losses.distillation import kl
from distill_core.methods.recognition.ofa import OFA, Config, ofa_loss
from distill_core.networks.exits import Hint, as_map, exit_of
from distill_core.networks.predictor import image_classifier
from distill_core.networks.predictors import build_network
from distill_core.recipe.tables import NetworkConfig
from tests.helpers import tiny_trainer

STUDENT = torch.tensor([[0.3, -1.1, 2.4], [1.7, 0.2, -0.6]])
TEACHER = torch.tensor([[1.9, 0.4, -0.7], [-0.8, 1.3, 0.9]])
LABELS = torch.tensor([0, 2])
VIT = {"patch_size": 2, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}


def test_the_loss_is_the_formula_written_out():
    found = ofa_loss(STUDENT, TEACHER, LABELS, 1.7)
    for item in range(2):
        p_t, log_p = TEACHER[item].softmax(0), STUDENT[item].log_softmax(0)
        total = 0.0
        for c in range(3):
            m = float(c == int(LABELS[item]))
            total -= ((float(p_t[c]) + m) ** 1.7 - m) * float(log_p[c])
        assert float(found[item]) == pytest.approx(total, rel=1e-5)
    mixed = F.one_hot(LABELS, 3) * 0.7 + 0.1
    assert torch.equal(ofa_loss(STUDENT, TEACHER, mixed, 1.7), found)


def test_the_power_1_has_the_gradient_of_logit_distillation():
    own, other = (STUDENT.clone().requires_grad_() for _ in range(2))
    ofa_loss(own, TEACHER, LABELS, 1.0).sum().backward()
    kl(other, TEACHER).sum().backward()
    torch.testing.assert_close(own.grad, other.grad)


def test_a_step_moves_every_exit_and_the_published_student_has_none(context, tmp_path):
    trainer = tiny_trainer("ofa", context, tmp_path)
    exits = trainer.method.student.exits
    before = {name: value.clone() for name, value in exits.named_parameters()}
    trainer.step = 100  # past the warmup's first step, whose rate is 0
    trainer.train_step()
    still = [name for name, value in exits.named_parameters() if torch.equal(before[name], value)]
    assert still == []
    published = dict(trainer.method.published())["student"]
    assert not any("exits" in name for name, _ in published.named_parameters())
    assert published.card().parameters == sum(
        v.numel() for v in trainer.method.student.predictor.parameters()
    )


def test_hints_move_their_projections_too(context, tmp_path):
    trainer = tiny_trainer("ofa", context, tmp_path, **{"config.match": "features"})
    before = {name: value.clone() for name, value in trainer.method.student.exits.named_parameters()}
    trainer.step = 100
    trainer.train_step()
    assert all(not torch.equal(before[n], v) for n, v in trainer.method.student.exits.named_parameters())


def test_without_weights_the_step_is_that_of_the_labels_alone_bit_for_bit(context, tmp_path):
    own = tiny_trainer("ofa", context, tmp_path / "a", **{"config.weight": 0.0, "config.exit_weight": 0.0})
    args = own.recipe.network.args
    same = {"network": {"name": own.recipe.network.name, "args": args}, "data": own.recipe.data}
    optim = {"student": own.recipe.optim["student"].model_dump(exclude_none=True)}
    plain = tiny_trainer("kd", context, tmp_path / "b", **{"config.weight": 0.0, "optim": optim, **same})
    plain.method.student.load_state_dict(own.method.student.predictor.state_dict())
    for _ in range(3):
        one, two = own.train_step(), plain.train_step()
        assert torch.equal(one["student_loss"], two["student_loss"])
        own.step, plain.step = own.step + 1, plain.step + 1


@pytest.mark.parametrize(
    ("student", "taps", "teacher"),
    [
        (("classifier", {"width": 8}), ["blocks.0", "penultimate"], ("ViTForImageClassification", VIT)),
        (("ViTForImageClassification", VIT), ["model.vit.layers.1"], ("ResNetForImageClassification", {})),
    ],
)
def test_convolutions_learn_from_transformers_and_back(student, taps, teacher):
    torch.manual_seed(2)
    data = build_source({"name": "digits", "split": "train"})
    facts = {"shape": data.shape, "num_classes": 10}
    taught_by = NetworkConfig(name=teacher[0], args=teacher[1])
    network = build_network(taught_by, facts)
    model = image_classifier(network, taught_by, shape=data.shape, class_names=data.class_names)
    model.eval().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = Config(taps=taps, power=1.5)
    method = OFA(config, teacher=model, network=NetworkConfig(name=student[0], args=student[1]), data=data)
    method.train()
    assert not any(module.training for module in method.teacher.modules())
    update = next(method.updates(data.batch(12, epoch_seed=0, position=0), 0))
    update.loss.backward()
    assert all(value.grad is not None for value in method.student.exits.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_exits_halve_the_picture_as_often_as_stages_follow_and_no_further_than_a_pixel():
    assert exit_of((6, 8, 12), 2, 5, "x", field="f")(torch.randn(3, 6, 8, 12)).shape == (3, 5)
    assert exit_of((6, 8, 12), 2, 5, "x", field="f").last.in_features == 24
    assert exit_of((6, 1, 1), 3, 5, "x", field="f").last.in_features == 6
    assert exit_of((17, 24), 1, 5, "x", field="f").has_class_token
    assert not exit_of((16, 24), 1, 5, "x", field="f").has_class_token


def test_tokens_become_maps_without_those_before_their_grid_and_other_grids_are_refused():
    tokens = torch.arange(2 * 10 * 3.0).reshape(2, 10, 3)
    grid = as_map(tokens)
    assert grid.shape == (2, 3, 3, 3)
    assert torch.equal(grid[0, :, 0, 0], tokens[0, 1])
    assert torch.equal(grid[1, :, 2, 1], tokens[1, 8])
    with pytest.raises(ConfigError, match="gives 15 tokens: no square grid"):
        exit_of((15, 24), 1, 5, "layers.1", field="config.taps")
    assert Hint((17, 24), (6, 8, 8))(torch.randn(3, 17, 24), torch.randn(3, 6, 8, 8)).shape == (3,)


@pytest.mark.parametrize(
    ("changes", "said", "field"),
    [
        ({"config.taps": ["model.vit.layer.0"]}, "did you mean 'model.vit.layers.0'", "config.taps"),
        ({"config.taps": ["model.vit.layers.0"] * 2}, "names a module twice", "config.taps"),
        (
            {"config.match": "features", "config.teacher_taps": ["blocks"], "config.taps": ["model.vit.layers.0"] * 2},
            "needs one of teacher_taps for each of 2 taps",
            "config",
        ),
    ],
)  # fmt: skip
def test_taps_that_are_wrong_are_said_before_anything_is_trained(context, tmp_path, changes, said, field):
    with pytest.raises(ConfigError, match=said) as error:
        tiny_trainer("ofa", context, tmp_path, **changes)
    assert error.value.field == field
