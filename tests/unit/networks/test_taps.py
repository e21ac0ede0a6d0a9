"""Taps: what modules give is what they gave, the network stays as it was, and wrong paths are said before training."""

from __future__ import annotations

import pytest
import torch

from distill_core.errors import ConfigError
from distill_core.networks.predictors import build_network
from distill_core.networks.taps import dry_run, tapped
from distill_core.recipe.tables import NetworkConfig

SHAPE = (1, 8, 12)
SIZES = {"patch_size": 4, "hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 32}


def network(name="classifier", **args):
    torch.manual_seed(3)
    return build_network(NetworkConfig(name=name, args=args), {"shape": SHAPE, "num_classes": 3})


def test_a_tap_is_what_the_module_gave_and_leaves_no_hook():
    convolutional = network(width=8)
    x = torch.randn(5, *SHAPE)
    out, found = tapped(convolutional, ["blocks.0", "penultimate"], x)
    assert torch.equal(out, convolutional(x))
    assert torch.equal(found["blocks.0"], convolutional.blocks[0](convolutional.stem(x)))
    assert list(found) == ["blocks.0", "penultimate"]
    assert not any(module._forward_hooks for module in convolutional.modules())


def test_shapes_are_those_of_maps_tokens_and_vectors():
    assert dry_run(network(width=8), ["blocks.1", "penultimate"], SHAPE) == {
        "blocks.1": (16, 4, 6),
        "penultimate": (32,),
    }
    vit = network("ViTForImageClassification", **SIZES)
    layers = [name for name, module in vit.named_modules() if type(module).__name__ == "ViTLayer"]
    assert len(layers) == 3
    assert dry_run(vit, layers[1:2], SHAPE) == {layers[1]: (7, 24)}


def test_a_dry_run_moves_no_running_mean():
    convolutional = network("ResNetForImageClassification")
    before = {name: value.clone() for name, value in convolutional.state_dict().items()}
    path = next(
        name for name, module in convolutional.named_modules() if type(module).__name__ == "ResNetStage"
    )
    dry_run(convolutional, [path], (1, 8, 12))
    assert all(torch.equal(before[name], value) for name, value in convolutional.state_dict().items())
    assert convolutional.training


@pytest.mark.parametrize(
    ("path", "said"), [("blocks.7", "did you mean 'blocks.[01]'"), ("", "no such module")]
)
def test_a_path_that_is_not_there_names_the_nearest(path, said):
    with pytest.raises(ConfigError, match=said) as error:
        dry_run(network(width=8), [path], SHAPE, field="config.stages")
    assert error.value.field == "config.stages"


def test_a_module_that_never_runs_is_refused():
    convolutional = network(width=8)
    convolutional.idle = torch.nn.Linear(3, 3)
    with pytest.raises(ConfigError, match="'idle', which gives no tensor"):
        dry_run(convolutional, ["idle"], SHAPE)
    assert not any(module._forward_hooks for module in convolutional.modules())
