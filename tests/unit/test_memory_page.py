"""What `train --dry-run` says, and when it refuses."""

from __future__ import annotations

import json

import pytest

from distill_core.errors import ConfigError
from distill_core.training import memory
from distill_core.training.memory import Device, MemoryPlan, Part, too_large
from distillery_cli.training.memory_table import show_plan, size

GIB = 2**30
STUDENT = Part("student", True, 10_000_000, 10_000_000, GIB, 0, GIB, 2 * GIB, GIB)
PLAN = MemoryPlan((STUDENT,), activations=3 * GIB, step=4 * GIB)  # 8 GiB in all


@pytest.fixture
def device(monkeypatch):
    def of(size: int, *, is_gpu: bool) -> None:
        monkeypatch.setattr(memory, "training_device", lambda: Device("Some GPU", size, is_gpu))

    return of


def test_a_plan_is_too_large_from_the_first_byte_on():
    assert too_large(PLAN, Device("Some GPU", 8 * GIB, is_gpu=True)) is None
    said = too_large(PLAN, Device("Some GPU", 8 * GIB - 1, is_gpu=True))
    assert said is not None
    assert said.startswith("training needs 8.0 GiB and Some GPU has 8.0; lower batch_size")


def test_what_a_gpu_cannot_hold_is_refused_after_it_is_shown(device, capsys):
    device(6 * GIB, is_gpu=True)
    with pytest.raises(ConfigError, match="Some GPU has 6.0"):
        show_plan(PLAN, as_json=False)
    assert "8 GiB = 4 GiB that stays" in capsys.readouterr().out


def test_beside_a_cpu_it_is_a_warning(device, capsys):
    device(6 * GIB, is_gpu=False)
    assert show_plan(PLAN, as_json=True) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert (found["total"], found["standing"], found["fits"]) == (8 * GIB, 4 * GIB, False)
    assert found["parts"][0]["optimizer"] == 2 * GIB
    assert "warning: training needs 8.0 GiB" in told.err.replace("\n", " ")


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 B"), (1536, "1.5 KiB"), (3 * GIB, "3 GiB"), (2**45, "32 TiB")]
)
def test_sizes_are_for_people(count, said):
    assert size(count) == said


def test_where_weights_alone_are_too_large_the_fewest_devices_that_share_them_are_named():
    teacher = Part("teacher", False, 9_000_000, 0, GIB, 0, 0, 0, 0)
    plan = MemoryPlan(
        (teacher, STUDENT), activations=3 * GIB, step=3 * GIB
    )  # 5 GiB stay: 4 divide, 1 does not
    each = plan.sharded(4)
    assert each.total == (1 + (1 + 2 + 1) / 4 + 3 + 1) * GIB, "and room for one whole network"
    assert too_large(plan, Device("Some GPU", 7 * GIB, is_gpu=True)).endswith("or student.lora")
    said = too_large(plan, Device("Some GPU", 4.9 * GIB, is_gpu=True))
    assert "5.0 of them for weights, optimiser and EMA whatever the batch" in said
    assert said.endswith("set student.lora"), "not even 64 share it"
    roomy = MemoryPlan((teacher, STUDENT), activations=0, step=GIB // 8)
    assert roomy.processes_for(int(3.2 * GIB)) == 4
    assert "set processes = 4 with sharding" in too_large(
        roomy, Device("Some GPU", int(3.2 * GIB), is_gpu=True)
    )
