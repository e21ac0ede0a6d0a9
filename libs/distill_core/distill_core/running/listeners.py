"""Listeners of a run, and requests to stop it, also while models that it needs are trained first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch

from distill_core.data.shards import filling
from distill_core.recipe import Recipe
from distill_core.training.run_folder import Listener

current_should_stop: ContextVar[Callable[[], bool]] = ContextVar("should_stop", default=lambda: False)
current_listener: ContextVar[Listener | None] = ContextVar(
    "listener of models that are trained first", default=None
)


class StoppedWhilePreparing(Exception):
    """A stop was asked for while a teacher or judge was trained first; its checkpoint is written."""


@contextlib.contextmanager
def listening(listener: Listener | None, should_stop: Callable[[], bool]) -> Iterator[None]:
    """Tell `listener`, and ask `should_stop`, of everything that is trained or rolled out inside."""
    stop_token, listener_token = current_should_stop.set(should_stop), current_listener.set(listener)
    filling_token = filling.set(_rolling_out)
    try:
        yield
    finally:
        filling.reset(filling_token)
        current_should_stop.reset(stop_token)
        current_listener.reset(listener_token)


def _rolling_out(made: int, count: int, left_s: float) -> None:
    """Tell of pairs or trajectories that have to be there first, and stop between two shards of them."""
    listener = current_listener.get()
    if listener is not None:
        event = {"event": "preparing", "model": "pairs of noise and picture"}
        listener({**event, "step": made, "steps": count, "eta_s": left_s})
    if current_should_stop.get()():
        raise StoppedWhilePreparing


def preparing(recipe: Recipe) -> Listener | None:
    """A listener that hands the progress of `recipe` on as that of a model which has to be there first."""
    outer = current_listener.get()
    if outer is None:
        return None

    def tell(event: Mapping[str, Any]) -> None:
        if event["event"] == "progress":
            outer({**event, "event": "preparing", "model": recipe.title or recipe.method})
        elif event["event"] == "preparing":
            outer(dict(event))

    return tell


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """The recipe's CPU threads for the duration; a teacher trained on the way must not change its student's."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
