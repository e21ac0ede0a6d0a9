"""`config.compile`: the same training by torch.compile, of any number of samples without a new graph each."""

import shutil

import pytest
import torch

from distill_core.data.scenes import ProceduralScene
from distill_core.method import Batch
from distill_core.methods import find_method
from distill_core.recipe import load_recipe


@pytest.fixture(scope="module")
def scene():
    return ProceduralScene(ProceduralScene.Config(num_views=4, num_test_views=1, size=32))


def build(scene, *, compiled):
    torch.manual_seed(0)
    cls = find_method("radiance_field")
    network = load_recipe("nerf_procedural", {"network.args.levels": 2}).network
    sizes = {"max_samples": 1024, "num_steps": 24, "grid_resolution": 8}
    return cls(cls.Config(**sizes, compile=compiled), network=network, data=scene)


def steps(method):
    losses = []
    for number in range(3):
        torch.manual_seed(number)
        (update,) = method.updates(Batch.of(100 + 50 * number), 1 + number)
        update.loss.backward()
        losses.append(update.loss.detach())
    return torch.stack(losses), method.field.table.grad


@pytest.mark.slow
def test_a_compiled_field_has_the_same_loss_and_gradient(scene):
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    torch._dynamo.reset()
    losses, gradient = steps(build(scene, compiled=False))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled_losses, compiled_gradient = steps(build(scene, compiled=True))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    assert 1 <= graphs <= 2  # a first one, and one for any number of samples
    torch.testing.assert_close(compiled_losses, losses, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(compiled_gradient, gradient, atol=1e-6, rtol=1e-3)
