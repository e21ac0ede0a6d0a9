"""What every student of a classifier must do: leave its teacher as it was, BatchNorm too, and see what it sees."""

from __future__ import annotations

import hashlib

import pytest
import torch

from distill_core.methods import find_method, method_names, needs
from tests.helpers import recipe_of, tiny_trainer

TAUGHT = [
    name
    for name in method_names()
    if ".recognition." in find_method(name).__module__ and "teacher" in needs(find_method(name))
]


def state_hash(module: torch.nn.Module) -> str:
    """A digest of all parameters and buffers."""
    state = sorted(module.state_dict().items())
    return hashlib.sha256(b"".join(value.numpy().tobytes() for _, value in state)).hexdigest()


@pytest.mark.parametrize("name", TAUGHT)
def test_a_teacher_is_the_same_afterwards_and_is_never_in_training_mode(name, context, tmp_path):
    """A method that calls `train()` on itself, as wrappers do, leaves the teacher in evaluation mode."""
    trainer = tiny_trainer(recipe_of(name), context, tmp_path)
    teacher = trainer.method.teacher
    # BatchNorm, which gradients that are off do not freeze
    norm = torch.nn.BatchNorm1d(2) if "iq" in trainer.source.columns else torch.nn.BatchNorm2d(1)
    teacher.add_module("norm", norm.eval())
    teacher.register_forward_pre_hook(lambda module, inputs: (module.norm(inputs[0]), *inputs[1:]))
    before = state_hash(teacher)
    trainer.method.train()
    trainer.train()
    assert not any(module.training for module in teacher.modules())
    assert state_hash(teacher) == before
    assert not any(
        value.requires_grad
        for value in teacher.parameters()
        if value is not norm.weight and value is not norm.bias
    )


@pytest.mark.parametrize("name", TAUGHT)
def test_a_step_is_of_the_batch_s_own_items(name, context, tmp_path):
    """Two batches of the same step differ in their loss: nothing is drawn that the batch does not say."""
    trainer = tiny_trainer(recipe_of(name), context, tmp_path)
    method, draw = trainer.method, trainer.draw()
    losses = []
    for step in (0, 0, 1):
        torch.manual_seed(0)
        (batch,) = trainer.batches.of(step, draw)
        updates = [update for update in method.updates(batch, 0) if update.loss is not None]
        losses.append([float(update.loss.detach()) for update in updates])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2] or not losses[0]
