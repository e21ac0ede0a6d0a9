"""One JSON line an event, whoever logs it."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import logging, warnings
import structlog
from distill_service.logs import configure_logging
from distill_service.settings import load_settings
configure_logging("sampler", load_settings(log_format="json"))
log = structlog.get_logger("distillery.sampler")
with structlog.contextvars.bound_contextvars(request_id="r1", job_id="j1"):
    log.info("ours", images=2)
    logging.getLogger("celery.app").warning("theirs %s", "with arguments")
    try:
        1 / 0
    except ZeroDivisionError:
        logging.getLogger("grpc").exception("broken")
logging.getLogger("sqlalchemy").info("a line\\nof two\\u2028or three")
logging.getLogger("kombu").info("too talkative")
warnings.warn("old")
"""


def lines() -> list[dict]:
    done = subprocess.run([sys.executable, "-c", PROGRAM], stderr=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stderr.splitlines()]  # all of it is JSON


def test_ours_and_other_libraries_lines_have_one_form():
    ours, theirs, broken, multiple, warned = lines()
    assert ours.items() >= {"event": "ours", "images": 2, "level": "info", "service": "sampler"}.items()
    assert theirs.items() >= {"event": "theirs with arguments", "level": "warning"}.items()
    assert theirs["logger"] == "celery.app"
    for line in (ours, theirs, broken):
        assert (line["request_id"], line["job_id"]) == ("r1", "j1")
        assert line["timestamp"].endswith("Z")
    assert "ZeroDivisionError" in broken["exception"]
    assert multiple["event"].splitlines() == ["a line", "of two", "or three"]
    assert "request_id" not in multiple
    assert "UserWarning: old" in warned["event"]
    assert all("trace_id" not in line for line in (ours, theirs))  # tracing is off
