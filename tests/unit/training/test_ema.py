"""The running average of a role: its weights and the statistics of BatchNorm, by hand at a decay of 0.8."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distill_core.method import Method, Update
from distill_core.training.ema import EMA
from tests.unit.training.test_loop import trainer

DECAY = 0.8


class Noisy(Method):
    """A network with dropout beside one that stays in evaluation mode, as denoisers do."""

    roles = ("model",)
    result = "model"

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 40), nn.Dropout(0.7), nn.BatchNorm1d(40))
        self.frozen = nn.Dropout(0.3).eval()

    def updates(self, batch, step):
        yield Update("model", self.model(batch.x0.flatten(1)).square().mean())


class Network(nn.Module):
    """A normalised layer, with a table that a checkpoint keeps and a scratch value that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2, momentum=0.3)
        self.register_buffer("table", torch.tensor([1.5, -2.0]))
        self.register_buffer("scratch", torch.tensor([4.0]), persistent=False)


AVERAGED = {
    "layer.weight",
    "layer.bias",
    "norm.weight",
    "norm.bias",
    "norm.running_mean",
    "norm.running_var",
    "table",
}


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network()


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def move(module: Network, step: int) -> None:
    """Change weights as an optimiser would, and statistics as a forward pass does."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * step + 0.07)
    module.norm(torch.randn(5, 2, generator=torch.Generator().manual_seed(step)) * 2 + 3)


def test_weights_and_statistics_keep_the_decay_of_what_they_were_and_whole_numbers_are_left_alone():
    module = network()
    ema, expected = EMA(module, DECAY), values(module)
    assert set(ema.weights) == AVERAGED
    for step in range(3):
        move(module, step)
        now = values(module)
        expected = {name: 0.8 * expected[name] + 0.2 * now[name] for name in AVERAGED}
        ema.update(module)
    for name in AVERAGED:
        assert torch.allclose(ema.weights[name], expected[name], atol=1e-6), name
    assert not torch.allclose(expected["norm.running_mean"], now["norm.running_mean"], atol=0.1)


def test_the_average_takes_the_place_of_weights_and_statistics_and_gives_it_back():
    module = network()
    ema = EMA(module, DECAY)
    move(module, 1)
    ema.update(module)
    trained = values(module)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(9))
    with ema.applied(module):
        inside = values(module)
        for name in AVERAGED:
            assert torch.equal(inside[name], ema.weights[name]), name
        assert int(inside["norm.num_batches_tracked"]) == 1
        averaged = module.norm.eval()(module.layer(x))
    assert all(torch.equal(value, trained[name]) for name, value in values(module).items())
    assert not torch.allclose(module.norm(module.layer(x)), averaged, atol=1e-3)


def test_the_trained_weights_come_back_when_what_is_done_with_the_average_fails():
    module = network()
    ema = EMA(module, DECAY)
    move(module, 1)
    trained = values(module)
    with pytest.raises(KeyError), ema.applied(module):
        raise KeyError
    assert all(torch.equal(value, trained[name]) for name, value in values(module).items())


def test_a_closed_form_is_copied_and_later_steps_are_averaged_from_there():
    module = network()
    ema = EMA(module, DECAY)
    move(module, 1)
    ema.copy(module)
    solved = values(module)
    for name in AVERAGED:
        assert torch.equal(ema.weights[name], solved[name]), name
    move(module, 2)
    assert torch.equal(ema.weights["layer.weight"], solved["layer.weight"]), (
        "a copy, not the weights themselves"
    )
    ema.update(module)
    assert torch.allclose(
        ema.weights["layer.bias"], 0.8 * solved["layer.bias"] + 0.2 * module.layer.bias, atol=1e-6
    )


def test_an_average_is_loaded_back_and_one_without_statistics_keeps_those_that_it_has():
    module = network()
    ema = EMA(module, DECAY)
    move(module, 1)
    ema.update(module)
    saved = {name: value.clone() for name, value in reversed(ema.weights.items())}  # another order of names
    again = EMA(network(3), DECAY)
    again.load(saved)
    assert all(torch.equal(again.weights[name], value) for name, value in saved.items())
    earlier = EMA(network(3), DECAY)
    earlier.load({name: value for name, value in saved.items() if name not in ("norm.running_mean", "table")})
    assert torch.equal(earlier.weights["norm.running_var"], saved["norm.running_var"])
    assert torch.equal(earlier.weights["norm.running_mean"], torch.zeros(2))
    with pytest.raises(KeyError, match=r"layer.bias"):
        earlier.load({name: value for name, value in saved.items() if name != "layer.bias"})


def test_what_is_published_is_seen_in_evaluation_mode_and_training_goes_on_as_before(tmp_path):
    run = trainer(tmp_path, Noisy(), ema={"model": 0.8})
    run.train_step()
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(4))
    with run.averaged():
        one, two = run.method.model(x), run.method.model(x)
        statistics = values(run.method.model)
        assert torch.equal(one, two)
    assert all(torch.equal(value, statistics[name]) for name, value in run.emas["model"].weights.items())
    assert [module.training for module in run.method.model] == [True, True, True]
    assert (run.method.training, run.method.frozen.training) == (True, False)
