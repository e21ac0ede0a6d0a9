"""Follows the store: new versions are swapped in while the old ones answer."""

from __future__ import annotations

import asyncio

import structlog

from distillery_sampler.models.registry import Registry

_log = structlog.get_logger("distillery.sampler")


async def watch_store(registry: Registry, poll_s: float) -> None:
    """Ask the store every `poll_s` seconds, until cancelled. A store that is away is asked again later."""
    while True:
        await asyncio.sleep(poll_s)
        try:
            await registry.refresh()
        except Exception as error:  # whatever the store raises, the models that are loaded go on answering
            _log.warning("the store cannot be followed", error=str(error), kind=type(error).__name__)
