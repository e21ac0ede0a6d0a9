"""`sharding = "fsdp"` on two processes, against the same training with whole networks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from distill_core.errors import ConfigError
from distill_core.kinds.loading import load_model
from distill_core.radiance.rendering.occupancy import OccupancyGrid
from distill_core.recipe import load_recipe
from distill_core.training.checkpoint import load_latest
from tests.unit.training import shard_rank
from tests.unit.training.test_scale_out import launched

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Checkpoint = dict[str, dict[str, torch.Tensor]]


class Group(NamedTuple):
    folder: Path
    ranks: list[dict[str, Any]]  # what each process found, by scene

    def checkpoint(self, name: str, step: int = 6) -> Checkpoint:
        found = load_latest(self.folder / name / "checkpoints", method="pair")
        assert found is not None
        assert found[0] == step
        return found[1]


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Group:
    folder = tmp_path_factory.mktemp("sharding")
    assert launched(folder, module="tests.unit.training.shard_rank") == (0, {"event": "result"})
    return Group(folder, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)])


def tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    for part, values in sorted(checkpoint.items()):
        for name, value in sorted(values.items()):
            yield f"{part}: {name}", value


def assert_close(one: Checkpoint, other: Checkpoint, start: Checkpoint) -> None:
    """Equal up to the order of summation.

    FSDP2 adds the gradients of a weight's two uses, and of micro-batches, after it has averaged each over processes.
    What the optimiser divides by its own size (AdamW's first steps) turns roundings of near-zero gradients into steps;
    so the bound is a thousandth of how far the weights went, the same in all.
    """
    assert dict(tensors(one)).keys() == dict(tensors(other)).keys()
    went = max(
        float((value - before).abs().max()) for (_, value), (_, before) in zip(tensors(one), tensors(start))
    )
    for (name, value), (_, expected) in zip(tensors(one), tensors(other)):
        assert value.shape == expected.shape, name
        assert torch.allclose(value.float(), expected.float(), rtol=1e-4, atol=1e-3 * went), name


def assert_equal(one: Checkpoint, other: Checkpoint) -> None:
    assert dict(tensors(one)).keys() == dict(tensors(other)).keys()
    for (name, value), (_, expected) in zip(tensors(one), tensors(other)):
        assert torch.equal(value, expected), name


def test_sharded_weights_are_those_of_whole_networks(group, tmp_path):
    start = shard_rank.trainer(tmp_path, sharding="fsdp").tensors()  # one process alone has nothing to divide
    weights = {role: start[role] for role in ("critic", "student")}
    sharded, replicated = group.checkpoint("sharded"), group.checkpoint("replicated")
    assert sharded.keys() == replicated.keys() == start.keys()
    for role, values in weights.items():
        assert_close({role: sharded[role]}, {role: replicated[role]}, {role: values})
    ema = {"student": weights["student"]}
    assert_close({"student": sharded["student.ema"]}, {"student": replicated["student.ema"]}, ema)


def test_each_process_holds_half_of_weights_optimiser_state_and_average(group):
    held = [rank["equals_replicated"]["shares"] for rank in group.ranks]
    for part in ("weights", "optimizer", "ema"):
        assert sum(shares[part] for shares in held) == pytest.approx(1)
        assert all(abs(shares[part] - 0.5) < 0.01 for shares in held)


def test_a_stopped_sharded_training_ends_bit_for_bit_where_an_undisturbed_one_does(group):
    assert_equal(group.checkpoint("stopped"), group.checkpoint("sharded"))


@pytest.mark.parametrize("before", ["None", "fsdp"])
def test_a_checkpoint_continues_sharded_or_not(group, before, tmp_path):
    start = shard_rank.trainer(tmp_path).tensors()
    continued, straight = group.checkpoint(f"from-{before}"), group.checkpoint("replicated")
    for role in ("critic", "student"):
        assert_close({role: continued[role]}, {role: straight[role]}, {role: start[role]})


def test_a_sharded_checkpoint_is_read_by_one_process(group):
    alone = shard_rank.trainer(group.folder / "sharded", steps=8)
    written = group.checkpoint("sharded")
    alone.resume()
    assert alone.step == 6
    assert_equal(alone.tensors(), written)
    assert alone.train().step == 8


def test_previews_are_drawn_by_whole_averaged_networks(group):
    pictures = [
        Image.open(group.folder / name / "samples/000000006.png") for name in ("sharded", "replicated")
    ]
    one, other = (torch.from_numpy(np.array(picture, dtype=np.float32)) for picture in pictures)
    assert one.std() > 0
    assert (one - other).abs().max() <= 1  # of 255


def test_a_sharded_transformer_is_measured_and_saved_by_the_first_process(group):
    first, second = (rank["publishes"] for rank in group.ranks)
    assert (first["main"], second["main"]) == (True, False)
    folder = group.folder / "edm" / "model"
    (config,) = (path for path in folder.rglob("config.json") if path.parent.name == "transformer")
    assert json.loads(config.read_text())["_class_name"] == "DiTTransformer2DModel"
    saved = load_model(folder).state_dict()
    average = load_latest(group.folder / "edm" / "checkpoints", method="edm")[1]["teacher.ema"]
    assert average
    assert all(torch.equal(saved[name], value) for name, value in average.items())


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("ReadsWeights", "weights outside of a call of the network"),
        ("OnlyWeights", "its loss reaches no weight of student"),
        ("SharedWeights", "student: it shares last.weight with another role"),
        ("HeldElsewhere", "student: blocks.0.weight is also used from outside of it"),
        ("OneNumber", "cannot divide student.temperature, a single number"),
    ],
)
def test_what_cannot_be_sharded_is_said_in_a_sentence(group, method, said):
    for rank in group.ranks:
        sentence, field = rank["refuses"][method]
        assert said in sentence
        assert sentence.startswith("sharding = 'fsdp' cannot")
        assert "\n" not in sentence
        assert field == "sharding"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "set processes to 2 or more"),
        ({"processes": 2, "micro_batch": "auto"}, "set accumulate instead"),
        ({"processes": 2, "precision": "fp16"}, "'fp32' or 'bf16'"),
    ],
)
def test_a_recipe_says_what_does_not_go_with_sharding(changes, said):
    with pytest.raises(ConfigError, match=said):
        load_recipe({"method": "pair", "steps": 1, "sharding": "fsdp", **changes})


# -- other things that processes must agree on


def test_all_processes_march_one_occupancy_grid(group):
    one, other = (torch.tensor(rank["sees_one_grid"]["grid"]) for rank in group.ranks)
    assert torch.equal(one, other)
    torch.manual_seed(0)
    alone = OccupancyGrid(8, bound=1.0, delta=0.1)
    alone.update(lambda positions: 4 * positions.norm(dim=-1), every_cell=False)
    assert (one >= alone.density.flatten()).all()
    assert (one > 0).sum() > (alone.density > 0).sum()  # what the other process looked at


def test_processes_with_different_room_agree_on_the_split(group):
    assert [rank["fits_together"]["accumulate"] for rank in group.ranks] == [8, 8]


def test_who_does_not_shard_does_not_wait_for_fsdp():
    script = "import sys, distill_core.training.loop; print('torch.distributed.fsdp' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
