"""A short seed of `make chaos`: real trainings, a real installation, ten faults."""

from __future__ import annotations

import pytest

from tests.chaos import campaign
from tests.chaos.faults import FAULTS

SHORT = (  # the kinds whose chance comes soon and that are soon over
    "kill_trainer",
    "stop_trainer",
    "kill_worker",
    "preempt_worker",
    "kill_api",
    "freeze_api",
    "drop_messages",
    "double_messages",
    "break_message",
    "set_clock",
)


@pytest.mark.timeout(600)
def test_nothing_is_lost_run_twice_or_changed_by_ten_faults():
    assert set(SHORT) <= {fault.name for fault in FAULTS}
    options = campaign.Options(
        seed=6, faults=10, brokers=("filesystem",), minutes=4, kinds=("field",), only=SHORT
    )
    result = campaign.run(options)
    report = result.report()
    assert result.verdict.good, report
    assert (report["jobs"] > 0, report["models"] > 0) == (True, True), report
    assert report["faults"] == options.faults, report
