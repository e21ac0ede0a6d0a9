"""One job in several processes, and steps that are split until they fit into memory."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from distill_core.errors import EXIT_STOPPED, ConfigError
from distill_core.job import launch
from distill_core.recipe import load_recipe
from distill_core.training.checkpoint import complete_checkpoints, load_latest
from tests.helpers import REPOSITORY
from tests.unit.training import scale_rank
from tests.unit.training.test_loop import Mean, trainer, weights

pytestmark = pytest.mark.slow

# Never touched, so never real memory, and more than malloc can have left over from what other tests freed.
ROOM = 5 * 2**30  # bytes that the process may ask for beyond what it has
PER_ITEM = 2**30


class Hungry(Mean):
    """Needs 1 GiB for each item of a micro-batch, and the kernel refuses more than `ROOM`."""

    def __init__(self, room: int = ROOM) -> None:
        super().__init__()
        self.room = room

    def updates(self, batch, step):
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + self.room, before[1]))
        try:
            torch.empty(batch.size * PER_ITEM, dtype=torch.uint8)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
        yield from super().updates(batch, step)


def test_a_step_is_split_until_it_fits_and_means_the_same(tmp_path):
    whole, split = trainer(tmp_path / "a"), trainer(tmp_path / "b", Hungry(), micro_batch="auto")
    whole.train()
    split.train()
    assert split.accumulate == 4  # 16 items are 16 GiB; 4 are 4 GiB
    assert torch.allclose(weights(whole), weights(split), atol=1e-6)


def test_what_does_not_fit_even_item_by_item_is_said(tmp_path):
    odd = trainer(tmp_path, Hungry(), micro_batch="auto", batch_size=15)  # which cannot be halved
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        odd.train()


def test_the_split_is_kept_in_the_checkpoint(tmp_path):
    """A resumed run on a device with more memory sums in the same order, so its weights are the same bits."""
    polls = iter([False] * 3 + [True])
    assert trainer(tmp_path, Hungry(), micro_batch="auto").train(lambda: next(polls)).stopped
    later = trainer(tmp_path, Hungry(room=8 * ROOM), micro_batch="auto")
    later.train()
    assert later.accumulate == 4


def launched(
    folder: Path, *, module: str = "tests.unit.training.scale_rank", **task: object
) -> tuple[int, dict]:
    """Two processes of a module; the exit code and what the first one said."""
    folder.mkdir(exist_ok=True)
    spec = folder / "spec.json"
    spec.write_text(json.dumps({"run_dir": str(folder), "spec": {"recipe": {}}, **task}))
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "distill_core.job.launch", "2", module, str(spec)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout, done.stderr[-2000:]
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_two_processes_stop_together_resume_exactly_and_can_be_read_by_one(tmp_path):
    code, said = launched(tmp_path / "straight")
    assert (code, said) == (0, {"event": "result", "step": 6, "world": 2})
    code, said = launched(tmp_path / "stopped", stop_at=4)
    assert (code, said["step"]) == (EXIT_STOPPED, 3)
    assert launched(tmp_path / "stopped")[0] == 0
    straight, resumed = (
        load_latest(tmp_path / name / "checkpoints", method="noisy") for name in ("straight", "stopped")
    )
    assert straight[0] == resumed[0] == 6
    for part, tensors in straight[1].items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, resumed[1][part][name]), (part, name)
    alone = scale_rank.trainer(tmp_path / "stopped", steps=8)
    alone.resume()
    assert alone.step == 6
    assert torch.equal(alone.method.model.weight, straight[1]["model"]["weight"])
    assert alone.train().step == 8
    assert len(complete_checkpoints(tmp_path / "stopped" / "checkpoints")) == 2


@pytest.mark.parametrize(
    ("codes", "killed", "code"),
    [
        ([0, 0], False, 0),
        ([EXIT_STOPPED, EXIT_STOPPED], False, EXIT_STOPPED),
        ([0, 68], False, 68),
        ([1, -9], False, 137),  # the first lost its peer
        ([70, -9], True, 70),  # the second waited for it and was killed by us
        ([-9, -11], True, 137),
    ],
)
def test_a_group_ends_with_the_code_that_tells_most(codes, killed, code):
    assert launch.worst(codes, killed_by_us=killed) == code


PROGRAMS = {
    "waits": "import os, signal, sys, time\n"
    "from pathlib import Path\n"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
    "Path(__file__).with_name('up-' + os.environ['RANK']).touch(); time.sleep(300)",
    "one_dies": "import os, signal, time\n"
    "os.kill(os.getpid(), signal.SIGKILL) if os.environ['RANK'] == '1' else time.sleep(300)",
}


def start(tmp_path: Path, program: str) -> subprocess.Popen[str]:
    (tmp_path / "program.py").write_text(PROGRAMS[program])
    code = (
        "import sys; from pathlib import Path; from distill_core.job import launch; launch._LAST_WORDS_S = 0.1\n"
        "sys.exit(launch.Launcher().run('program', Path('spec'), [{'RANK': '0'}, {'RANK': '1'}]))"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def wait_for_both(process: subprocess.Popen[str], folder: Path) -> None:
    while len(list(folder.glob("up-*"))) < 2:
        assert process.poll() is None
        time.sleep(0.01)


def test_a_group_is_stopped_together(tmp_path):
    process = start(tmp_path, "waits")
    wait_for_both(process, tmp_path)
    process.terminate()
    assert process.wait() == 7  # what they say themselves; of a signal alone it would be 143


def test_the_others_end_when_one_dies(tmp_path):
    process = start(tmp_path, "one_dies")
    assert process.wait() == 128 + signal.SIGKILL


def test_no_process_outlives_a_killed_launcher(tmp_path):
    process = start(tmp_path, "waits")
    wait_for_both(process, tmp_path)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    process.kill()
    assert psutil.wait_procs(ranks, timeout=40)[1] == []


def test_a_batch_that_the_processes_cannot_share_is_refused():
    with pytest.raises(ConfigError, match="batch_size = 9 is not divisible by processes = 2"):
        load_recipe({"method": "noisy", "steps": 1, "batch_size": 9, "processes": 2})
