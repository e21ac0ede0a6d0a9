"""Two processes remember what both predict, and label what both see."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CHILD = """
import sys, torch
from distill_core.data import build_source
from distill_core.methods.recognition._memory import PredictionMemory
from distill_core.methods.recognition.fkd_labels import Labels
from distill_core.reductions import alone

rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
memory = PredictionMemory(build_source({"name": "digits", "split": "test"}))
index, values = torch.tensor([3 + rank, 40 + rank]), torch.full((2, 10), 0.125 * (rank + 1))
memory.put(index, values)
expected = [0.125, 0.25, 0.125, 0.25]
assert memory.at(torch.tensor([3, 4, 40, 41]))[:, 0].tolist() == expected
with alone():  # a trial step, which the other does not take
    memory.put(torch.tensor([9]), torch.full((1, 10), 7.0))
labels = Labels(6, crops=2, top=1)
flip = torch.tensor([[True, False], [False, True]])
labels.put(torch.tensor([rank, 2 + rank]), flip=flip, soft_values=torch.full((2, 2, 1), 0.5 + rank).half(),
           soft_classes=torch.full((2, 2, 1), 4 + rank))
assert labels.done.tolist() == [True] * 4 + [False] * 2
assert labels.flip.tolist()[:4] == [[True, False], [True, False], [False, True], [False, True]]
assert labels.soft_classes[:4, 0, 0].tolist() == [4, 5, 4, 5]
assert labels.soft_values[:4, 1, 0].tolist() == [0.5, 1.5, 0.5, 1.5]
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_memories_and_labels_of_two_processes_are_equal(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", CHILD, str(rank), str(tmp_path / "store")], env=environment)
        for rank in range(2)
    ]
    assert [rank.wait(timeout=250) for rank in ranks] == [0, 0]
