"""Celery as a bell: a message says "there is work in this queue", the job table says what the work is.

A message may be lost or doubled without harm, so it is acknowledged early and its result is not kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import structlog
from celery import Celery
from kombu.exceptions import ChannelError, OperationalError

from distill_core.files.paths import path_of

RUN_NEXT = "distillery.run_next"
_FOLDER = "filesystem"
_FILESYSTEM = f"{_FOLDER}://"
_log = structlog.get_logger("distillery.broker")


def make_app(broker_url: str) -> Celery:
    """A Celery application on any broker; `filesystem:///folder` is the one that needs no server."""
    app = Celery("distillery", set_as_current=False)
    app.conf.update(
        broker_url=_FILESYSTEM if broker_url.startswith(_FILESYSTEM) else broker_url,
        broker_transport_options=_transport_options(broker_url),
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # a worker outlives any absence of the broker
        broker_connection_timeout=2,
        task_acks_late=False,
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_create_missing_queues=True,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=broker_url.startswith("redis"),  # ring at an idle worker
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        accept_content=["json"],
        task_serializer="json",
    )
    return app


def _transport_options(broker_url: str) -> dict[str, Any]:
    if broker_url.startswith(_FILESYSTEM):
        folder = path_of(broker_url, _FOLDER)
        messages, control = folder / "messages", folder / "control"
        for path in (messages, control):
            path.mkdir(parents=True, exist_ok=True)
        _drop_damaged(control)
        return {
            "data_folder_in": str(messages),
            "data_folder_out": str(messages),
            "control_folder": str(control),
            "polling_interval": 0.2,
        }
    if broker_url.startswith("redis"):
        return {
            "visibility_timeout": 86_400,
            "socket_keepalive": True,
            "socket_connect_timeout": 2,
            "socket_timeout": 5,  # a Redis that accepts and never answers must hold up nobody
            "health_check_interval": 30,
        }
    return {}


def _drop_damaged(control: Path) -> None:
    """Remove the queue lists that a full disk or a kill cut off: kombu cannot read them, but makes missing ones."""
    for file in control.iterdir():
        try:
            json.loads(file.read_text())
        except ValueError:
            file.unlink(missing_ok=True)
        except FileNotFoundError:
            continue


def wake(app: Celery, queues: Iterable[str]) -> bool:
    """Ring for each queue. False if the broker is gone: idle workers then find the work by themselves."""
    try:
        for queue in sorted(queues):
            app.send_task(RUN_NEXT, (queue,), queue=queue, retry=False, ignore_result=True)
    except (OperationalError, ChannelError, OSError, ValueError) as error:  # ValueError: a damaged folder
        _log.warning("broker not reached, workers will find the job by looking", error=str(error))
        return False
    return True
